"""The supervisor keeps parts running, says what happened, and ends them in order."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.cli import supervisor as module
from app.cli.process_commands import leashed
from app.cli.supervisor import Part, Supervisor


@pytest.fixture
def echoed() -> list[str]:
    return []


@pytest.fixture
def supervisor(echoed: list[str]) -> Iterator[Supervisor]:
    running = Supervisor(echoed.append)
    yield running
    running.stop()


def shell(name: str, script: str, folder: Path, *, grace_s: float = 2.0) -> Part:
    argv = leashed(["/bin/sh", "-c", script], options=("--grace", str(grace_s)))
    return Part(name, argv, folder / f"{name}.log", grace_s=grace_s)


def tick_until(supervisor: Supervisor, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        supervisor.tick()
        time.sleep(0.02)


def test_a_part_that_dies_is_started_again_after_ever_longer_pauses(
    supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.05)
    with caplog.at_level(logging.WARNING):
        supervisor.start(shell("dying", "exit 3", tmp_path))
        tick_until(supervisor, lambda: supervisor.starts("dying") == 4)
    lines = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
    pauses = [float(re.search(r"again_in_s=([\d.]+)", line)[1]) for line in lines]  # type: ignore[index]
    assert "part=dying cause=exit code 3" in lines[0]
    assert pauses[:3] == sorted(pauses[:3])
    assert pauses[0] < pauses[2]


def test_a_part_that_was_killed_is_said_to_be(
    supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.start(shell("killed", "kill -9 $$", tmp_path))
    tick_until(supervisor, lambda: supervisor.pid("killed") is None and "signal 9" in caplog.text)


def test_a_part_that_lives_is_left_alone(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("living", "sleep 600", tmp_path))
    pid = supervisor.pid("living")
    for _ in range(10):
        supervisor.tick()
        time.sleep(0.02)
    assert supervisor.starts("living") == 1
    assert supervisor.pid("living") == pid


def test_warnings_reach_the_operator_and_the_rest_only_the_log(
    supervisor: Supervisor, echoed: list[str], tmp_path: Path
) -> None:
    script = "echo INFO well; echo WARNING low disk; printf 'ERROR half a'; sleep 0.3; echo ' line'; sleep 9"
    supervisor.start(shell("talking", script, tmp_path))
    tick_until(supervisor, lambda: len(echoed) == 2)
    assert echoed == ["talking: WARNING low disk", "talking: ERROR half a line"]
    assert "INFO well" in (tmp_path / "talking.log").read_text()


def test_what_a_server_said_while_it_started_is_not_shown(
    supervisor: Supervisor, echoed: list[str], tmp_path: Path
) -> None:
    supervisor.start(
        shell("server", "echo FATAL starting up; sleep 0.3; echo ERROR later; sleep 600", tmp_path)
    )
    while not (tmp_path / "server.log").read_text():
        time.sleep(0.02)
    supervisor.mark_read("server")
    tick_until(supervisor, lambda: bool(echoed))
    assert echoed == ["server: ERROR later"]


def test_a_large_log_is_moved_aside_and_goes_on(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_LOG_BYTES", 1000)
    script = (
        "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; sleep 0.3; echo WARNING end; sleep 600"
    )
    supervisor.start(shell("chatty", script, tmp_path))
    tick_until(supervisor, lambda: (tmp_path / "chatty.log").read_text() == "WARNING end\n")
    assert "line 199" in (tmp_path / "chatty.old.log").read_text()


def test_a_log_that_cannot_be_copied_is_emptied_all_the_same(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_LOG_BYTES", 1000)
    (tmp_path / "chatty.old.log").symlink_to("/dev/full")  # every write there finds no room
    script = "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; sleep 600"
    supervisor.start(shell("chatty", script, tmp_path))
    tick_until(supervisor, lambda: not (tmp_path / "chatty.old.log").is_symlink())
    assert (tmp_path / "chatty.log").stat().st_size < 1000


def test_a_part_that_cannot_be_started_again_is_tried_later_and_the_others_live(
    supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.05)
    supervisor.start(shell("living", "sleep 600", tmp_path))
    supervisor.start(shell("dying", "exit 3", tmp_path / "logs"))
    (tmp_path / "logs").rename(tmp_path / "aside")
    (tmp_path / "logs").symlink_to("/dev/full")  # no log can be opened below it
    tick_until(supervisor, lambda: caplog.text.count("part=dying cause=no start") >= 2)
    assert supervisor.pid("living") is not None
    starts = supervisor.starts("dying")
    (tmp_path / "logs").unlink()
    tick_until(supervisor, lambda: supervisor.starts("dying") > starts)


def test_parts_end_in_the_opposite_order_of_their_start(supervisor: Supervisor, tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        script = f"trap 'echo {name} >> {tmp_path}/ends; exit 0' TERM; echo up; while :; do sleep 0.05; done"
        supervisor.start(shell(name, script, tmp_path))
        tick_until(supervisor, lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())  # type: ignore[misc]
    supervisor.stop()
    assert (tmp_path / "ends").read_text().split() == ["third", "second", "first"]


def test_parts_stopped_together_share_one_grace(supervisor: Supervisor, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        script = "trap '' TERM; echo up; while :; do sleep 0.05; done"
        supervisor.start(shell(name, script, tmp_path, grace_s=1.0))
        tick_until(supervisor, lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())  # type: ignore[misc]
    began = time.monotonic()
    supervisor.stop(["one", "two", "three"])
    assert time.monotonic() - began < 2.9  # three graces one after the other would take longer


def test_a_part_waiting_for_its_next_start_can_be_stopped(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("gone", "exit 1", tmp_path))
    tick_until(supervisor, lambda: supervisor.pid("gone") is None)
    supervisor.tick()
    supervisor.stop(["gone"])
    supervisor.tick()
    with pytest.raises(KeyError):
        supervisor.starts("gone")
