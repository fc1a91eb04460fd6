"""What a download reports while files come and go."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from worker.weights.words import size_of


def test_folders_that_vanish_while_their_bytes_are_counted_count_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"12345")
    over = threading.Event()

    def unpack() -> None:
        while not over.is_set():
            for number in range(20):
                folder = tmp_path / f"unpacked-{number}" / "deep"
                folder.mkdir(parents=True)
                (folder / "file").write_bytes(b"")
            for number in range(20):
                shutil.rmtree(tmp_path / f"unpacked-{number}")

    thread = threading.Thread(target=unpack)
    thread.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert size_of(tmp_path) == 5
    finally:
        over.set()
        thread.join()
