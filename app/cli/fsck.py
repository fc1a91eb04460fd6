"""`luthier fsck`: do rows, storage and processes agree, and what to do where they do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import typer
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.cli.errors import CommandError
from app.cli.operations import database_settings
from app.core.db import make_engine, make_sessions
from app.core.fsck import survey
from app.core.fsck.finding import Finding, Severity, Site
from app.core.migrate import is_current
from app.core.settings import Settings
from app.core.storage import Storage

CLEAN, WRONG, CANNOT_CHECK = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What the operator asked for."""

    repair: bool = False
    strict: bool = False
    quick: bool = False
    as_json: bool = False


def check_installation(data_dir: Path | None, wanted: Wanted) -> int:
    """Look, repair what is asked for, print what was found; the exit code."""
    try:
        settings = database_settings(data_dir)
        engine = make_engine(settings.database_url)
        try:
            return _examine(_site(settings, engine, quick=wanted.quick), wanted)
        finally:
            engine.dispose()
    except CommandError as error:
        reason = str(error)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0] + " - start the database"
    except OSError as error:
        reason = f"The storage cannot be read ({error.strerror}); correct its permissions"
    typer.echo(f"luthier: {reason}", err=True)
    return CANNOT_CHECK


def format_finding(finding: Finding, *, mended: bool = False) -> str:
    """`FAIL` or `note` or `done`, the invariant, what it is about, what is wrong, what to do."""
    mark = "done" if mended else "FAIL" if finding.severity is Severity.ERROR else "note"
    by_itself = " (--repair does it)" if finding.repair is not None and not mended else ""
    line = f"{mark:<5}{finding.invariant:<4}{finding.subject}: {finding.problem} -> {finding.cure}{by_itself}"
    # A name in storage may hold what no terminal should be sent.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _site(settings: Settings, engine: Engine, *, quick: bool) -> Site:
    if not is_current(engine):
        raise CommandError("The schema is not current: run luthier migrate.")
    if not settings.storage_dir.is_dir():  # one made here would be empty, and everything missing from it
        raise CommandError(f"There is no storage at {settings.storage_dir}: correct LUTHIER_DATA_DIR.")
    return Site(make_sessions(engine), Storage(settings.storage_dir), settings, quick=quick)


def _examine(site: Site, wanted: Wanted) -> int:
    looked = survey.count(site)
    findings = survey.survey(site)
    mended: list[Finding] = []
    if wanted.repair:
        mended = [f for f in findings if f.repair is not None and survey.mend(site, f)]
    left = [finding for finding in findings if finding not in mended]
    errors = sum(finding.severity is Severity.ERROR for finding in left)
    counts = dataclasses.asdict(looked) | {
        "errors": errors,
        "warnings": len(left) - errors,
        "repaired": len(mended),
    }
    clean = survey.is_clean(left, strict=wanted.strict)
    if wanted.as_json:
        _print_json(findings, mended, counts, clean=clean)
        return CLEAN if clean else WRONG
    for finding in findings:
        typer.echo(format_finding(finding, mended=finding in mended))
    looked_at = f"{looked.jobs} jobs, {looked.files} files, {looked.models} models"
    typer.echo(
        f"{'ok' if clean else 'FAIL':<5}{looked_at}: {errors} wrong, {counts['warnings']} to note, "
        f"{len(mended)} repaired{', read in part only (--quick)' if wanted.quick else ''}"
    )
    return CLEAN if clean else WRONG


def _print_json(
    findings: Sequence[Finding], mended: Sequence[Finding], counts: dict[str, int], *, clean: bool
) -> None:
    lines = [
        {
            "invariant": finding.invariant,
            "subject": finding.subject,
            "problem": finding.problem,
            "cure": finding.cure,
            "severity": finding.severity,
            "repairable": finding.repair is not None,
            "repaired": finding in mended,
        }
        for finding in findings
    ]
    typer.echo(json.dumps({"clean": clean, "counts": counts, "findings": lines}, indent=2))
