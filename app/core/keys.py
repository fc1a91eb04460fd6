"""API keys, and the projects and organizations they open. A secret is stored as its hash only."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.core.db import utc_now
from app.core.errors import InvalidKey, InvalidRequest, NotFound
from app.core.ids import Prefix, new_id
from app.core.tables import ApiKey, Organization, Project

_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from, and what its rows belong to."""

    key_id: str
    project_id: str
    organization_id: str
    organization_slug: str


def create_key(
    session: Session, *, project: Project, name: str, secret: str | None = None
) -> tuple[ApiKey, str]:
    """Add a key; returns its row and the secret, which cannot be read again.

    A secret of one's own is registered as it is; registering the same one twice is refused unless
    it already opens this very project.
    """
    _check_name(name, "name")
    secret = secret or "sk-" + secrets.token_urlsafe(32)
    if len(secret) < 8 or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise InvalidRequest("A key needs at least 8 printable characters without spaces.", param="key")
    known = session.scalar(select(ApiKey).where(ApiKey.digest == _digest(secret)))
    if known is not None:
        if known.project_id != project.id or known.revoked_at is not None:
            raise InvalidRequest(
                "This key is already in use elsewhere, or revoked. Choose another.", param="key"
            )
        return known, secret
    key = ApiKey(
        id=new_id(Prefix.KEY), project_id=project.id, name=name, hint=_hint(secret), digest=_digest(secret)
    )
    session.add(key)
    session.flush()
    return key, secret


def authenticate(session: Session, secret: str) -> Caller:
    """Whom a secret belongs to; raises InvalidKey for unknown and revoked ones alike."""
    row = session.execute(
        select(ApiKey.id, Project.id, Organization.id, Organization.slug)
        .join(Project, Project.id == ApiKey.project_id)
        .join(Organization, Organization.id == Project.organization_id)
        .where(ApiKey.digest == _digest(secret), ApiKey.revoked_at.is_(None))
    ).one_or_none()
    if row is None:
        raise InvalidKey("Incorrect API key provided. Create one with `luthier keys create`.")
    return Caller(*row)


def list_keys(session: Session) -> Sequence[ApiKey]:
    """All keys, oldest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)).all()


def revoke_key(session: Session, key_id: str) -> ApiKey:
    """End a key at once; the next request with it is refused."""
    key = session.get(ApiKey, key_id)
    if key is None:
        raise NotFound(f"No such key: {key_id}. `luthier keys list` shows all ids.")
    key.revoked_at = key.revoked_at or utc_now()
    return key


def ensure_project(session: Session, *, project: str, organization: str) -> Project:
    """The project of that name, made with its organization when it is new."""
    _check_name(project, "project")
    found = session.scalar(select(Project).where(Project.name == project))
    if found is not None:
        return found
    if not _SLUG.fullmatch(organization):
        raise InvalidRequest(
            f"The organization '{organization}' must be a slug: "
            "lower-case letters, digits and '-', at most 40.",
            param="organization",
        )
    owner = session.scalar(select(Organization).where(Organization.slug == organization))
    if owner is None:
        owner = Organization(id=new_id(Prefix.ORGANIZATION), slug=organization)
        session.add(owner)
        session.flush()
    found = Project(id=new_id(Prefix.PROJECT), organization_id=owner.id, name=project)
    session.add(found)
    session.flush()
    return found


def _hint(secret: str) -> str:
    # Seven characters of forty-six tell keys apart; of a short key of one's own they would give it away.
    return secret[: min(7, len(secret) // 4)]


def _check_name(name: str, param: str) -> None:
    if not 0 < len(name) <= 64 or not name.isprintable():
        raise InvalidRequest(f"The {param} must have 1 to 64 printable characters.", param=param)


def _digest(secret: str) -> str:
    # A fast hash is right here: the secret has 256 random bits, so nothing can be guessed from it.
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
