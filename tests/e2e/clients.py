"""Runs the whole flow with older releases of the official client: `make clients`.

Each release gets a virtual environment of its own, so this needs the package index and is no test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.e2e.service import KEY, running_service

VERSIONS = ("1.109.1", "2.54.0")  # the last of each
FLOW = Path(__file__).with_name("flow.py")


def main(versions: tuple[str, ...]) -> None:
    """Print one line per release; stop at the first that fails."""
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder)) as service:
        for version in versions:
            home = Path(folder) / version
            venv.create(home, with_pip=True)
            python = home / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "-q", f"openai=={version}"], check=True)
            environment = os.environ | {"OPENAI_BASE_URL": service.base_url, "OPENAI_API_KEY": KEY}
            subprocess.run([python, FLOW, "tiny"], env=environment, check=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or VERSIONS)
