"""What is true after a fault: rows, events, bytes, processes, and the witness in the trainers.

Reads the database directly; `luthier fsck` is asked as well, by whoever runs a fault.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from app.core.manifest import DamagedError, verify
from tests.chaos.service import Service
from tests.chaos.workload import Tenant

COMPLETED = "The job has successfully completed"


@dataclass
class Findings:
    """What was wrong."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as the trainer itself saw it."""

    at: float
    job: str
    attempt: int
    pid: int
    number: int  # of this attempt, from 1


def rows(engine: Engine, statement: str, **values: Any) -> list[Any]:
    """The rows of a statement, in a transaction of its own."""
    with engine.begin() as connection:
        return list(connection.execute(text(statement), values))


def steps(service: Service, job: str | None = None) -> list[Step]:
    """What the trainers did, in order."""
    found = []
    log = service.chaos / "steps.log"
    for line in log.read_text().splitlines() if log.exists() else ():
        at, name, attempt, pid, number = line.split()
        if job in (None, name):
            found.append(Step(float(at), name, int(attempt), int(pid), int(number)))
    return found


def claims(service: Service, job: str) -> dict[int, datetime]:
    """When each attempt of a job was claimed; of past ones, when they were first heard of."""
    found = rows(
        service.engine,
        "SELECT attempt, min(created_at) AS at FROM job_events WHERE job_id = :job AND attempt > 0"
        " GROUP BY attempt UNION ALL"
        " SELECT attempt, claimed_at FROM jobs WHERE id = :job AND claimed_at IS NOT NULL",
        job=job,
    )
    begun: dict[int, datetime] = {}
    for row in found:
        begun[row.attempt] = min(row.at, begun.get(row.attempt, row.at))
    return begun


def examine(service: Service, tenants: Iterable[Tenant], jobs: set[str], *, failed: set[str]) -> Findings:
    """Hold everything accepted against what is there. Jobs in `failed` were meant to fail."""
    findings = Findings()
    known = {row.id: row for row in rows(service.engine, "SELECT * FROM jobs")}
    events = defaultdict(list)
    for event in rows(service.engine, "SELECT * FROM job_events ORDER BY sequence"):
        events[event.job_id].append(event)
    witnessed = defaultdict(list)
    for step in steps(service):
        witnessed[step.job].append(step)
    for job_id in jobs:
        row = known.get(job_id)
        if row is None:
            findings.lost.append(f"{job_id} has no row")
            continue
        if row.status not in ("succeeded", "failed", "cancelled", "paused"):
            findings.lost.append(f"{job_id} is {row.status}: {row.worker}, hinted {row.hinted_at}")
        elif row.status == "failed" and job_id not in failed:
            findings.lost.append(f"{job_id} failed: {row.error}")
        _check_events(findings, row, events[job_id])
        _check_witness(findings, job_id, witnessed[job_id])
        if row.status == "succeeded":
            _check_result(findings, service, row)
    _check_files(findings, service, tenants)
    _check_leftovers(findings, service)
    return findings


def _check_events(findings: Findings, job: Any, events: list[Any]) -> None:
    ended = [event for event in events if event.message == COMPLETED]
    if len(ended) > 1 or (ended and job.status != "succeeded"):
        findings.doubled.append(f"{job.id} completed {len(ended)} times and is {job.status}")
    told = [event.step for event in events if event.type == "metrics"]
    if told != sorted(set(told)):
        findings.doubled.append(f"{job.id} tells its steps out of order or twice: {told[:20]}")
    if told and told != list(range(1, max(told) + 1)):
        findings.wrong.append(f"{job.id} has a gap in its steps: {len(told)} up to {max(told)}")
    attempts = [event.attempt for event in events if event.type == "metrics"]
    if attempts != sorted(attempts):
        findings.wrong.append(f"{job.id}: an older attempt wrote after a newer one")


def _check_witness(findings: Findings, job: str, seen: list[Step]) -> None:
    """No attempt trains on once a later one has begun: never two holders."""
    newest = 0
    for step in sorted(seen, key=lambda step: step.at):
        if step.attempt < newest:
            findings.doubled.append(f"{job}: attempt {step.attempt} trained beside attempt {newest}")
            return
        newest = step.attempt


def _check_result(findings: Findings, service: Service, job: Any) -> None:
    models = rows(
        service.engine,
        "SELECT storage_key FROM tuned_models WHERE job_id = :job AND NOT is_checkpoint",
        job=job.id,
    )
    if len(models) != 1:
        findings.doubled.append(f"{job.id} has {len(models)} models")
        return
    try:
        verify(service.storage / models[0].storage_key)
    except DamagedError as error:
        findings.wrong.append(f"the model of {job.id} is damaged: {error}")


def _check_files(findings: Findings, service: Service, tenants: Iterable[Tenant]) -> None:
    known = {row.id: row for row in rows(service.engine, "SELECT * FROM files")}
    for tenant in tenants:
        for file_id, digest in tenant.files.items():
            row = known.get(file_id)
            if row is None:
                findings.lost.append(f"{file_id} has no row")
            elif row.deleted_at is None and row.purged_at is None:
                path = service.storage / row.storage_key
                if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                    findings.lost.append(f"{file_id} does not hold what was sent")


def _check_leftovers(findings: Findings, service: Service) -> None:
    left = [str(path.relative_to(service.storage)) for path in (service.storage / "attempts").iterdir()]
    if left:
        findings.wrong.append(f"attempt folders are left: {left[:3]}")
    named = {row.storage_key for row in rows(service.engine, "SELECT storage_key FROM tuned_models")}
    folders = {f"weights/{path.name}" for path in (service.storage / "weights").iterdir()}
    if folders - named:
        findings.wrong.append(f"weights that no row names: {sorted(folders - named)[:3]}")


def adapter_digest(service: Service, job: str) -> str:
    """SHA-256 over the weights of a job's model."""
    found = rows(
        service.engine,
        "SELECT storage_key FROM tuned_models WHERE job_id = :job AND NOT is_checkpoint",
        job=job,
    )
    folder: Path = service.storage / found[0].storage_key
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
