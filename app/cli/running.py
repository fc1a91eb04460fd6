"""How other commands find what a running `up` started: URLs kept in the data dir while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.cli.data_dir import read_secret, write_secret
from app.cli.errors import CommandError
from app.core.settings import Settings


def load_settings(**options: Any) -> Settings:
    """The settings from the environment, with the options an operator gave on top.

    Without URLs of its own a command uses the servers of the `luthier up` that runs on the data dir.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"LUTHIER_{first['loc'][0]}".upper() if first["loc"] else "LUTHIER_*"
        reason = first["msg"].removeprefix("Value error, ")
        raise CommandError(f"{name} cannot be used: {reason}; correct it.") from error


def connected_settings(**options: Any) -> Settings:
    """As `load_settings`, with the servers of the running `luthier up` where no URL is set."""
    settings = load_settings(**options)
    urls = find_urls(settings.data_dir)
    found = {name: url for name, url in urls.items() if not getattr(settings, name)}
    return settings.model_copy(update=found)


def write_urls(data_dir: Path, settings: Settings) -> None:
    """Tell other commands where the servers are; only the owner may read it, it holds passwords."""
    urls = {"database_url": settings.database_url, "redis_url": settings.redis_url}
    write_secret(data_dir / "secrets" / "urls.json", json.dumps(urls))


def find_urls(data_dir: Path) -> dict[str, str]:
    """What `write_urls` told; empty where nothing runs."""
    text = read_secret(data_dir.expanduser() / "secrets" / "urls.json")
    return {} if text is None else json.loads(text)


def forget_urls(data_dir: Path) -> None:
    """The servers have stopped."""
    (data_dir / "secrets" / "urls.json").unlink(missing_ok=True)
