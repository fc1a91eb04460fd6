"""The `luthier` command: what can be typed, and how failures are told. Work is done in the modules it opens.

Every command imports what it needs when it runs: `--help` stays quick, and an image without torch or
without the servers has all commands that need neither.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from app.cli.errors import CommandError

app = typer.Typer(
    name="luthier",
    help="Fine-tune models behind OpenAI's API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
models_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the installation. [default: LUTHIER_DATA_DIR or data]"),
]
ModelName = Annotated[str | None, typer.Argument(help="A name of the catalogue; all of it when absent.")]


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 takes any. [default: 8000]")
    ] = None,
    data_dir: DataDir = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LUTHIER_API_KEY",
            help="Use this key instead of a new one. Better set LUTHIER_API_KEY: "
            "everybody on this machine can read the options of a running command.",
        ),
    ] = None,
) -> None:
    """Run everything on this machine: database, broker, API and workers."""
    from app.cli.running import load_settings
    from app.cli.up import up as run_up
    from app.core.log import configure

    settings = load_settings(host=host, port=port, data_dir=data_dir)
    # The parts log for themselves; this terminal shows what goes wrong unless more is asked for.
    configure("up", level=settings.log_level if "log_level" in settings.model_fields_set else "WARNING")
    run_up(settings, api_key=api_key)


@app.command()
def api() -> None:
    """Run the API alone."""
    from app.cli.processes import run_api

    run_api()


@app.command()
def worker(
    queues: Annotated[str, typer.Option(help="Of training, inference, control; separated by commas.")],
) -> None:
    """Run workers, one process for each queue named."""
    from app.cli.processes import run_workers

    run_workers(queues)


@app.command()
def migrate(data_dir: DataDir = None) -> None:
    """Bring the database to the schema this version needs."""
    from app.cli.operations import run_migrations

    run_migrations(data_dir)


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Check database, broker, storage, disk, weights, device and versions; say what to do."""
    from app.cli.doctor import examine

    raise typer.Exit(examine(data_dir))


@app.command()
def fsck(
    data_dir: DataDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Do what is safe to do.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Nothing may be in flight either.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes, not every byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that rows, storage and processes agree. Exit code 0: they do, 1: not, 2: cannot check."""
    from app.cli.fsck import Wanted, check_installation

    wanted = Wanted(repair=repair, strict=strict, quick=quick, as_json=as_json)
    raise typer.Exit(check_installation(data_dir, wanted))


@app.command()
def demo(data_dir: DataDir = None) -> None:
    """Fine-tune the built-in model on the example data and show it against the base."""
    from app.cli.demo import demo as run_demo
    from app.cli.running import load_settings

    run_demo(load_settings(data_dir=data_dir))


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    project: Annotated[str | None, typer.Option(help="Project it opens; made when new.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Create a key and show it, this once."""
    from app.cli.operations import show_new_key

    show_new_key(data_dir, name=name, project=project)


@keys_app.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List all keys, without their secrets."""
    from app.cli.operations import show_keys

    show_keys(data_dir)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The id `keys list` shows.")], data_dir: DataDir = None
) -> None:
    """End a key at once."""
    from app.cli.operations import end_key

    end_key(data_dir, key_id)


@models_app.command("list")
def list_models(data_dir: DataDir = None) -> None:
    """List the catalogue and which weights are here."""
    from app.cli.models import show_catalogue

    show_catalogue(data_dir)


@models_app.command("pull")
def pull_models(name: ModelName = None, data_dir: DataDir = None) -> None:
    """Bring the weights of a base model to this machine."""
    from app.cli.models import pull_weights

    pull_weights(data_dir, name)


def run() -> None:
    """Entry point: an expected failure is one sentence and exit code 1, any other is logged in full."""
    try:
        app()
    except (CommandError, KeyboardInterrupt) as error:
        fail(str(error) or "Interrupted.")
    except Exception as error:
        from app.cli.failures import explain

        sentence = explain(error)
        if sentence is None:
            logging.getLogger("luthier").exception("unexpected failure")
            fail("This should not have happened; the lines above say where.")
        fail(sentence)


def fail(sentence: str) -> NoReturn:
    """Say why and leave."""
    sys.stdout.flush()
    typer.echo(f"luthier: {sentence}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    run()
