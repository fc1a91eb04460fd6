"""Files of a project: life, expiry, quota, and what still needs them."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
from sqlalchemy import update

from app.core import files, jobs
from app.core.db import utc_now
from app.core.errors import InvalidRequest, NotFound, TooLarge
from app.core.files import clean_filename
from app.core.pages import Cursor
from app.core.tables import File
from app.core.vocabulary import Purpose
from tests.core.rows import House, make_caller


def delete(house: House, file: File) -> None:
    files.delete_file(house.session, house.storage, project_id=house.caller.project_id, file_id=file.id)
    house.session.commit()


def listed(house: House, purpose: str | None = None) -> list[str]:
    page = files.list_files(
        house.session, project_id=house.caller.project_id, purpose=purpose, cursor=Cursor()
    )
    return [file.id for file in page.data]


def test_a_file_keeps_its_bytes_size_and_digest(house: House) -> None:
    file = house.file(b"abc")
    with house.storage.open(file.storage_key) as stored:
        assert stored.read() == b"abc"
    assert file.size_bytes == 3
    assert file.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_are_listed_by_purpose(house: House) -> None:
    one, two = house.file(), house.file(purpose=Purpose.BATCH)
    assert listed(house) == [two.id, one.id]
    assert listed(house, "batch") == [two.id]
    with pytest.raises(InvalidRequest) as caught:
        listed(house, "fun")
    assert caught.value.param == "purpose"


def test_a_deleted_file_is_gone_with_its_bytes(house: House) -> None:
    file = house.file()
    delete(house, file)
    assert listed(house) == []
    assert not house.storage.path(file.storage_key).exists()
    with pytest.raises(NotFound):
        delete(house, file)


def test_bytes_stay_when_a_deletion_is_rolled_back(house: House) -> None:
    file = house.file()
    files.delete_file(house.session, house.storage, project_id=house.caller.project_id, file_id=file.id)
    house.session.rollback()
    assert house.storage.path(file.storage_key).exists()
    assert listed(house) == [file.id]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_in_use_is_not_deleted_until_its_job_ends(house: House, param: str) -> None:
    file = house.file()
    job = house.job(house.file(), **{param: file.id})
    with pytest.raises(InvalidRequest, match=f"in use by job {job.id}") as caught:
        delete(house, file)
    assert caught.value.code == "file_in_use"
    house.session.rollback()
    jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    delete(house, file)
    assert file.id not in listed(house)


def test_a_foreign_file_answers_like_none(house: House) -> None:
    other = dataclasses.replace(house, caller=make_caller(house.session, "two"))
    file = other.file()
    for action in (
        lambda: delete(house, file),
        lambda: files.get_file(house.session, project_id=house.caller.project_id, file_id=file.id),
    ):
        with pytest.raises(NotFound) as caught:
            action()
        assert caught.value.message == f"No such File object: {file.id}"
        house.session.rollback()
    assert listed(other) == [file.id]


@pytest.mark.parametrize("file_id", ["", "a/b", "..", "a\0b", "\ud800", "x" * 10_000, "'; DROP TABLE files"])
def test_an_id_that_cannot_exist_is_not_found(house: House, file_id: str) -> None:
    with pytest.raises(NotFound):
        files.get_file(house.session, project_id=house.caller.project_id, file_id=file_id)


def test_an_expired_file_is_gone_at_once_and_swept_later(house: House) -> None:
    file = house.file(expires_after_s=3600)
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == timedelta(hours=1)
    assert files.expire_files(house.session) == 0
    house.session.execute(update(File).values(expires_at=utc_now() - timedelta(seconds=1)))
    house.session.commit()
    assert listed(house) == []
    assert files.expire_files(house.session) == 1
    assert files.purge_deleted(house.session, house.storage) == 1
    house.session.commit()
    assert not house.storage.path(file.storage_key).exists()
    assert files.purge_deleted(house.session, house.storage) == 0


def test_an_expired_file_in_use_waits_for_its_job(house: House) -> None:
    job = house.job(house.file(expires_after_s=3600))
    idle = house.file(expires_after_s=3600)
    house.session.execute(update(File).values(expires_at=utc_now() - timedelta(seconds=1)))
    house.session.commit()
    assert files.expire_files(house.session) == 1
    house.session.commit()
    assert idle.deleted_at is not None
    jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    assert files.expire_files(house.session) == 1


def test_a_project_that_holds_its_share_may_not_add_more(house: House) -> None:
    file = house.file(b"12345")
    project_id = house.caller.project_id
    files.check_room(house.session, project_id=project_id, max_bytes=6)
    with pytest.raises(TooLarge) as caught:
        files.check_room(house.session, project_id=project_id, max_bytes=5)
    assert caught.value.code == "storage_quota"
    files.check_room(house.session, project_id=make_caller(house.session, "two").project_id, max_bytes=5)
    delete(house, file)
    files.check_room(house.session, project_id=project_id, max_bytes=5)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("data.jsonl", "data.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\data.jsonl", "data.jsonl"),
        ("a\0b\nc\x1b[31m\u202ed.jsonl", "abc[31md.jsonl"),
        ("", "upload"),
        ("///", "upload"),
        ("\ud800", "upload"),
        ("ü" * 1000, "ü" * 255),
    ],
)
def test_filenames_are_cleaned_for_display(name: str, shown: str) -> None:
    assert clean_filename(name) == shown
