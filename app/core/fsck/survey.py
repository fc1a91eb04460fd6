"""All checks over one installation, and the repairs an operator has asked for.

A system at work changes between two looks at it. So a finding counts only when the check that made it
makes it again a moment later; every repair looks a third time, under a lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from app.core.db import transaction
from app.core.fsck import files, history, jobs, leftovers, processes, tenants, weights
from app.core.fsck.finding import Check, Finding, Severity, Site
from app.core.tables import File, Job, TunedModel

CHECKS: tuple[Check, ...] = (
    files.check_files,
    files.check_named_files,
    jobs.check_states,
    history.check_attempts,
    jobs.check_waiting,
    weights.check_models,
    weights.check_successes,
    weights.check_resumes,
    history.check_metrics,
    history.check_messages,
    history.check_ends,
    history.check_cancelled,
    jobs.check_outcomes,
    files.check_file_bytes,
    files.check_purges,
    weights.check_states,
    weights.check_gone,
    leftovers.check_weights,
    leftovers.check_attempts,
    leftovers.check_unpublished,
    leftovers.check_idempotency,
    leftovers.check_stored,
    processes.check_trainers,
    tenants.check_jobs,
    tenants.check_weights,
    tenants.check_answers,
)


@dataclass(frozen=True, slots=True)
class Looked:
    """How much there was to look at."""

    jobs: int
    files: int
    models: int


def count(site: Site) -> Looked:
    """Rows of each kind; the first thing to do, it also shows that the database answers."""
    with site.snapshot() as session:
        counts = [
            session.scalar(select(func.count()).select_from(table)) for table in (Job, File, TunedModel)
        ]
    return Looked(*(number or 0 for number in counts))


def survey(site: Site, *, settle_s: float = 1.0, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """All findings that are still there `settle_s` later, in the order of the checks."""
    first = {check: list(check(site)) for check in checks}
    doubtful = [check for check, findings in first.items() if findings]
    if not doubtful:
        return []
    time.sleep(settle_s)
    result = []
    for check in doubtful:
        before = {finding.key for finding in first[check]}
        again = {finding.key: finding for finding in check(site)}  # one line for each, however often seen
        result += [finding for key, finding in again.items() if key in before]
    return result


def mend(site: Site, finding: Finding) -> bool:
    """Do the repair of a finding in a transaction of its own; whether it changed something."""
    assert finding.repair is not None
    with transaction(site.sessions) as session:
        return finding.repair(session)


def is_clean(findings: Sequence[Finding], *, strict: bool) -> bool:
    """Whether nothing is wrong; on a system that should be quiet (`strict`), whether nothing moves either."""
    return not findings if strict else not any(f.severity is Severity.ERROR for f in findings)
