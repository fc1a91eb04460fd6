"""Bytes without an owner: found and removed, and nothing else."""

from __future__ import annotations

from pathlib import Path

from app.core import attempts, orphans, training_states
from app.core.attempts import Attempt
from app.core.ids import Prefix, new_id
from app.core.tables import Checkpoint, Job, TunedModel
from tests.core.rows import House

NUMBERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}


def running(house: House) -> Job:
    job = house.job()
    attempts.finish_validation(house.session, job.id, hyperparameters=NUMBERS)
    house.session.commit()
    claimed = attempts.claim_job(house.session, worker="w1", lease_s=30)
    house.session.commit()
    assert claimed is not None
    return claimed


def put(house: House, key: str) -> Path:
    folder = house.storage.path(key)
    folder.mkdir()
    (folder / "part").write_bytes(b"x")
    return folder


def checkpoint(house: House, job: Job, step: int) -> Path:
    key = f"weights/{job.id}-{job.attempt}-{step}"
    model = house.model(job, uid=f"u:ckpt-step-{step}", key=key, is_checkpoint=True)
    house.session.add(
        Checkpoint(
            id=new_id(Prefix.CHECKPOINT),
            job_id=job.id,
            model_id=model.id,
            step_number=step,
            metrics={},
            resumable=True,
        )
    )
    house.session.commit()
    state = house.storage.path(key) / "training_state"
    state.mkdir()
    (state / "optimizer").write_bytes(b"x")
    return state


def drop(house: House) -> int:
    count = orphans.drop(house.session, house.storage, age_s=3600)
    house.session.commit()
    return count


def test_folders_of_a_living_attempt_stay_and_those_of_an_older_one_go(house: House) -> None:
    job = running(house)
    attempts.hand_back(house.session, Attempt(job.id, 1))
    house.session.commit()
    again = attempts.claim_job(house.session, worker="w2", lease_s=30)
    house.session.commit()
    assert again is not None
    old = [put(house, f"attempts/{job.id}-1"), put(house, f"weights/{job.id}-1-4")]
    new = [put(house, f"attempts/{job.id}-2"), put(house, f"weights/{job.id}-2-4")]
    assert drop(house) == 2
    assert [folder.exists() for folder in old + new] == [False, False, True, True]


def test_named_weights_stay_whatever_became_of_their_job(house: House) -> None:
    job = house.ended_job()
    house.model(job, key=f"weights/{job.id}-1-4")
    assert drop(house) == 0
    assert house.storage.path(f"weights/{job.id}-1-4").exists()


def test_a_file_without_a_row_goes_when_no_upload_can_be_so_slow(house: House) -> None:
    kept = house.file()
    path = house.storage.path("files/file-lost")
    path.write_bytes(b"x")
    assert drop(house) == 0
    assert orphans.drop(house.session, house.storage, age_s=-1) == 1
    assert not path.exists()
    assert house.storage.path(kept.storage_key).exists()


def test_two_training_states_of_an_open_job_are_kept(house: House) -> None:
    job = running(house)
    states = [checkpoint(house, job, step) for step in (1, 2, 3, 4)]
    assert training_states.drop_unneeded(house.session, house.storage) == 2
    house.session.commit()
    assert [state.exists() for state in states] == [False, False, True, True]
    keys = training_states.resume_keys(house.session, job.id)
    assert keys == [f"weights/{job.id}-1-4", f"weights/{job.id}-1-3"]
    assert all((state.parent / "adapter.safetensors").exists() for state in states)


def test_a_finished_job_keeps_weights_and_no_training_state(house: House) -> None:
    job = running(house)
    states = [checkpoint(house, job, step) for step in (1, 2)]
    attempts.succeed(house.session, Attempt(job.id, 1), values={})
    house.session.commit()
    assert training_states.drop_unneeded(house.session, house.storage) == 2
    house.session.commit()
    assert not any(state.exists() for state in states)
    assert training_states.resume_keys(house.session, job.id) == []
    assert house.session.query(TunedModel).count() == 2
