"""`luthier fsck` as an operator types it: what it prints and what it leaves with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.cli import fsck
from app.cli.fsck import CANNOT_CHECK, CLEAN, WRONG, Wanted, check_installation
from app.core.fsck import processes, survey
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import Job
from tests.factories import make_file, make_job, make_project


@pytest.fixture(autouse=True)
def _own_checks(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    """No waiting between two looks, and no eye on the trainers of other tests."""
    checks = tuple(check for check in survey.CHECKS if check is not processes.check_trainers)
    monkeypatch.setattr(survey.survey, "__kwdefaults__", {"settle_s": 0.0, "checks": checks})
    monkeypatch.setenv("LUTHIER_DATABASE_URL", database_url)


@pytest.fixture
def data_dir(tmp_path: Path, sessions: sessionmaker[Session]) -> Path:
    """An installation with one file, and a job that waits for it."""
    with sessions.begin() as session:
        project, _ = make_project(session)
        file = make_file(session, Storage(tmp_path / "storage"), project=project)
        make_job(session, project=project, status=JobStatus.PAUSED, training_file=file.id)
    return tmp_path


def bytes_of_the_file(data_dir: Path) -> Path:
    [path] = (data_dir / "storage" / "files").iterdir()
    return path


def test_a_sound_installation_is_said_to_be_so(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_installation(data_dir, Wanted(strict=True)) == CLEAN
    assert capsys.readouterr().out == "ok   1 jobs, 1 files, 0 models: 0 wrong, 0 to note, 0 repaired\n"


def test_what_is_wrong_is_a_line_and_exit_code_1(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bytes_of_the_file(data_dir)
    path.unlink()
    assert check_installation(data_dir, Wanted(repair=True)) == WRONG
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"FAIL I8  {path.name}: its bytes are gone -> bring files/{path.name} back")
    assert lines[1] == "FAIL 1 jobs, 1 files, 0 models: 1 wrong, 0 to note, 0 repaired"


def test_repair_does_what_it_announced(
    data_dir: Path, sessions: sessionmaker[Session], capsys: pytest.CaptureFixture[str]
) -> None:
    with sessions.begin() as session:
        job = session.query(Job).one()
        job.lease_expires_at = job.created_at
    assert check_installation(data_dir, Wanted()) == WRONG
    problem = f"I2  {job.id}: paused, but it holds a lease -> end the lease"
    assert capsys.readouterr().out.splitlines()[0] == f"FAIL {problem} (--repair does it)"
    assert check_installation(data_dir, Wanted(repair=True)) == CLEAN
    assert capsys.readouterr().out.splitlines() == [
        f"done {problem}",
        "ok   1 jobs, 1 files, 0 models: 0 wrong, 0 to note, 1 repaired",
    ]
    assert check_installation(data_dir, Wanted(strict=True)) == CLEAN


def test_what_is_in_flight_is_wrong_to_strict_eyes_only(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_dir / "storage" / "tmp" / "half").write_bytes(b"x")
    assert check_installation(data_dir, Wanted()) == CLEAN
    assert capsys.readouterr().out.startswith("note I10 tmp/half: unfinished")
    assert check_installation(data_dir, Wanted(strict=True)) == WRONG


def test_json_says_the_same(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bytes_of_the_file(data_dir).write_bytes(b"shorter")
    assert check_installation(data_dir, Wanted(quick=True, as_json=True)) == WRONG
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["clean"] is False
    assert said["counts"] == {"jobs": 1, "files": 1, "models": 0, "errors": 1, "warnings": 0, "repaired": 0}
    [finding] = said["findings"]
    assert (finding["invariant"], finding["severity"], finding["repairable"]) == ("I8", "error", False)


def test_what_cannot_be_checked_is_exit_code_2(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_dir / "storage").rename(data_dir / "moved")
    assert check_installation(data_dir, Wanted()) == CANNOT_CHECK
    assert "There is no storage at" in capsys.readouterr().err
    assert not (data_dir / "storage").exists()
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert check_installation(data_dir, Wanted()) == CANNOT_CHECK
    assert "start the database" in capsys.readouterr().err
    monkeypatch.delenv("LUTHIER_DATABASE_URL")
    assert check_installation(data_dir, Wanted()) == CANNOT_CHECK
    assert "No database: set LUTHIER_DATABASE_URL" in capsys.readouterr().err


def test_names_no_terminal_can_show_are_shown_all_the_same() -> None:
    from app.core.fsck.finding import Finding

    line = fsck.format_finding(Finding("I10", "files/\udcff\x1b[2J", "in storage", "delete it"))
    assert line == "FAIL I10 files/\\udcff\\x1b[2J: in storage -> delete it"
