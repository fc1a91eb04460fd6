"""The API as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from app.core.settings import Settings

CODE = """
import sys
from app.api.serve import serve
from app.core.log import configure
from app.core.settings import Settings
configure("api")
serve(Settings())
print("left in order", "torch" in sys.modules)
"""


@contextmanager
def api_process(
    settings: Settings, *, through: Sequence[str] = (), drain: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The API in an interpreter of its own; `through` is a command that runs the interpreter."""
    given = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    given |= {"DATA_DIR": str(settings.data_dir), "PORT": "0"}
    env = {**os.environ, **{f"LUTHIER_{key}": value for key, value in given.items()}}
    with subprocess.Popen(
        [*through, sys.executable, "-c", CODE],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "listening on" in line:
                    url = line.split()[-1]
                if "startup complete" in line:
                    break
            threading.Thread(target=process.stderr.read, daemon=True).start() if drain else None
            yield process, url
        finally:
            process.kill()
