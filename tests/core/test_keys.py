"""Keys, and the projects they open."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from app.core import keys
from app.core.errors import InvalidKey, InvalidRequest, NotFound
from app.core.tables import ApiKey, Project


@pytest.fixture
def project(session: Session) -> Project:
    return keys.ensure_project(session, project="one", organization="acme")


def test_a_new_key_opens_its_project(session: Session, project: Project) -> None:
    key, secret = keys.create_key(session, project=project, name="ci")
    caller = keys.authenticate(session, secret)
    assert (caller.key_id, caller.project_id, caller.organization_slug) == (key.id, project.id, "acme")
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", secret)


@pytest.mark.parametrize("secret", [None, "my-own-1", "a" * 200])
def test_the_table_holds_nothing_a_thief_could_use(
    session: Session, project: Project, secret: str | None
) -> None:
    _, secret = keys.create_key(session, project=project, name="ci", secret=secret)
    session.commit()
    dump = str(session.execute(text("SELECT api_keys::text FROM api_keys")).all())
    assert secret not in dump
    assert secret[: max(3, len(secret) // 3)] not in dump


def test_a_revoked_key_is_refused_by_the_next_request(
    session: Session, project: Project, sessions: sessionmaker[Session]
) -> None:
    key, secret = keys.create_key(session, project=project, name="ci")
    session.commit()
    with sessions() as other:
        keys.authenticate(other, secret)
        other.commit()
        keys.revoke_key(session, key.id)
        session.commit()
        with pytest.raises(InvalidKey):
            keys.authenticate(other, secret)
    first = key.revoked_at
    assert keys.revoke_key(session, key.id).revoked_at == first
    with pytest.raises(InvalidRequest):
        keys.create_key(session, project=project, name="again", secret=secret)


@pytest.mark.parametrize(
    "secret", ["", "sk-", "sk-wrong", "a\0b", "\ud800", "Bearer x", "é" * 50, "x" * 100_000]
)
def test_unknown_secrets_are_all_refused_alike(session: Session, project: Project, secret: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        keys.authenticate(session, secret)
    assert caught.value.code == "invalid_api_key"
    assert secret == "" or secret not in caught.value.message


def test_a_key_of_ones_own_may_be_registered_again_for_the_same_project(
    session: Session, project: Project
) -> None:
    first, _ = keys.create_key(session, project=project, name="a", secret="my-own-key")
    again, _ = keys.create_key(session, project=project, name="b", secret="my-own-key")
    assert again.id == first.id
    other = keys.ensure_project(session, project="two", organization="acme")
    with pytest.raises(InvalidRequest):
        keys.create_key(session, project=other, name="c", secret="my-own-key")


@pytest.mark.parametrize("secret", ["short", "has a space", "tab\tinside", "ümlaut-key"])
def test_a_key_that_no_header_can_carry_is_refused(session: Session, project: Project, secret: str) -> None:
    with pytest.raises(InvalidRequest):
        keys.create_key(session, project=project, name="x", secret=secret)
    assert session.query(ApiKey).count() == 0


def test_projects_and_organizations_are_made_once(session: Session, project: Project) -> None:
    assert keys.ensure_project(session, project="one", organization="acme").id == project.id
    second = keys.ensure_project(session, project="two", organization="acme")
    assert second.organization_id == project.organization_id


@pytest.mark.parametrize("slug", ["", "Acme", "a b", "-a", "a-", "a:b", "x" * 41])
def test_an_organization_needs_a_slug(session: Session, slug: str) -> None:
    with pytest.raises(InvalidRequest):
        keys.ensure_project(session, project="p", organization=slug)


def test_revoking_an_unknown_key_says_where_to_look(session: Session) -> None:
    with pytest.raises(NotFound, match="luthier keys list"):
        keys.revoke_key(session, "key_none")


def test_keys_are_listed_oldest_first(session: Session, project: Project) -> None:
    made = [keys.create_key(session, project=project, name=str(n))[0].id for n in range(3)]
    assert [key.id for key in keys.list_keys(session)] == made
