"""`luthier models`: the catalogue, and bringing weights to this machine."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from app.cli.data_dir import CLOSED
from app.cli.errors import CommandError
from app.cli.running import load_settings
from app.core.base_models import BaseModelEntry, find_model_dir, load_catalogue


def show_catalogue(data_dir: Path | None) -> None:
    """Print every base model and where its weights are."""
    settings = load_settings(data_dir=data_dir)
    table = Table(box=None)
    for title in ("name", "context", "licence", "source", "weights"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for entry in load_catalogue(settings.models_file).entries.values():
        folder = find_model_dir(entry, settings.models_dir)
        here = str(folder) if folder else f"not here; luthier models pull {entry.name}"
        table.add_row(entry.name, str(entry.context_length), entry.licence, entry.source, here)
    Console().print(table)


def pull_weights(data_dir: Path | None, name: str | None) -> None:
    """Fetch one base model, or all; weights that are here already are read and checked."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-made folders are removed
    settings = load_settings(data_dir=data_dir)
    catalogue = load_catalogue(settings.models_file)
    if name is not None and catalogue.find(name) is None:
        raise CommandError(f"'{name}' is not in the catalogue; it holds {', '.join(catalogue.names)}.")
    with suppress(OSError):  # pulling says it better
        settings.data_dir.mkdir(mode=CLOSED, parents=True, exist_ok=True)
    for entry in catalogue.entries.values():
        if name in (None, entry.name):
            pull_one(entry, settings.models_dir)


def pull_one(entry: BaseModelEntry, models_dir: Path) -> None:
    """Fetch or check one base model, with a bar where there is a terminal and a line a step elsewhere."""
    from worker.weights import Progress, check_model_dir, pull

    broken = check_model_dir(entry, models_dir)
    if broken:
        typer.echo(f"{entry.name}: {', '.join(broken)} differ from what was pulled; fetching again.")
        (models_dir / entry.name / "luthier.json").unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(entry.name, total=None)
        step = ""

        def show(progress: Progress) -> None:
            nonlocal step
            if progress.step != step and not console.is_terminal:
                typer.echo(f"{entry.name}: {progress.step}")
            step = progress.step
            bar.update(
                task,
                description=f"{entry.name}: {progress.step}",
                completed=progress.done_bytes,
                total=progress.total_bytes,
            )

        folder = pull(entry, models_dir, show)
    typer.echo(f"{entry.name}: {folder}")
