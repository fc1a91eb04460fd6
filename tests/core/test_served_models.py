"""Names of models: who sees them, what they stand for, and when their weights go."""

from __future__ import annotations

import dataclasses

import pytest

from app.core import jobs, served_models
from app.core.completions import WeightsKind
from app.core.errors import InvalidRequest, NotFound
from app.core.served_models import ServedModel
from tests.core.rows import CATALOGUE, House, make_caller


def resolve(house: House, name: str) -> ServedModel:
    return served_models.resolve(house.session, CATALOGUE, project_id=house.caller.project_id, name=name)


def names(house: House) -> list[str]:
    rows = served_models.list_models(house.session, CATALOGUE, project_id=house.caller.project_id)
    return [row.id for row in rows]


def delete(house: House, name: str) -> None:
    served_models.delete_model(house.session, CATALOGUE, project_id=house.caller.project_id, name=name)
    house.session.commit()


def test_names_follow_openais_pattern(house: House) -> None:
    name = served_models.new_model_name(house.job(suffix="shop"), organization_slug="acme")
    assert name.startswith("ft:tiny:acme:shop:")
    assert len(name.rsplit(":", 1)[1]) == 8
    assert served_models.new_model_name(house.job(), organization_slug="acme").startswith("ft:tiny:acme::")


def test_base_and_tuned_models_are_listed_and_checkpoints_found_by_name(house: House) -> None:
    job = house.job()
    tuned = house.model(job, uid="one")
    checkpoint = house.model(job, uid="two:ckpt-step-3", key="weights/two", is_checkpoint=True)
    assert names(house) == ["tiny", tuned.id]
    assert resolve(house, "tiny").tuned is None
    weights = resolve(house, checkpoint.id).tuned
    assert weights is not None
    assert (weights.id, weights.kind) == ("two", WeightsKind.LORA)
    assert weights.path == "weights/two"


def test_a_full_job_makes_full_weights(house: House) -> None:
    model = house.model(house.job(luthier={"adapter": "full"}))
    assert model.kind is WeightsKind.FULL


@pytest.mark.parametrize("name", ["gpt-4", "", "ft:tiny:acme::none", "a\0b", "../x", "x" * 9999])
def test_an_unknown_name_is_not_found(house: House, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve(house, name)
    assert caught.value.code == "model_not_found"


def test_a_foreign_model_answers_like_none(house: House) -> None:
    other = dataclasses.replace(house, caller=make_caller(house.session, "two"))
    foreign = other.model(other.job())
    assert foreign.id not in names(house)
    for action in (resolve, delete):
        with pytest.raises(NotFound):
            action(house, foreign.id)
    with pytest.raises(InvalidRequest) as caught:
        house.job(model=foreign.id)
    assert caught.value.code == "model_not_available"
    assert resolve(other, foreign.id).id == foreign.id


def test_a_base_model_cannot_be_deleted(house: House) -> None:
    with pytest.raises(InvalidRequest, match="base model"):
        delete(house, "tiny")


def test_weights_go_when_the_last_name_that_shares_them_goes(house: House) -> None:
    job = house.ended_job()
    final = house.model(job, uid="final")
    checkpoint = house.model(job, uid="final:ckpt-step-1", is_checkpoint=True)
    folder = house.storage.path(final.storage_key)
    delete(house, final.id)
    assert served_models.purge_deleted(house.session, house.storage) == 1
    house.session.commit()
    assert folder.exists()
    assert resolve(house, checkpoint.id).tuned is not None
    delete(house, checkpoint.id)
    assert served_models.purge_deleted(house.session, house.storage) == 1
    assert not folder.exists()


def test_a_model_an_open_job_starts_from_is_kept(house: House) -> None:
    model = house.model(house.ended_job())
    job = house.job(model=model.id)
    with pytest.raises(InvalidRequest, match=job.id) as caught:
        delete(house, model.id)
    assert caught.value.code == "model_in_use"
    house.session.rollback()
    jobs.cancel_job(house.session, project_id=job.project_id, job_id=job.id)
    delete(house, model.id)
    with pytest.raises(NotFound):
        resolve(house, model.id)


def test_a_model_is_kept_while_its_job_still_makes_it(house: House) -> None:
    job = house.job()
    model = house.model(job, is_checkpoint=True)
    with pytest.raises(InvalidRequest, match=job.id):
        delete(house, model.id)


def test_a_job_on_a_tuned_model_has_its_shape_or_one_that_holds_it(house: House) -> None:
    made = house.job(luthier={"adapter": "lora", "rank": 8, "target_modules": ["q_proj"]})
    model = house.model(made)
    job = house.job(model=model.id)
    assert job.base_model == "tiny"
    assert {key: job.luthier[key] for key in ("adapter", "rank", "alpha", "target_modules")} == {
        "adapter": "lora",
        "rank": 8,
        "alpha": 16,
        "target_modules": ["q_proj"],
    }
    assert house.job(model=model.id, luthier={"rank": 8}).luthier["rank"] == 8
    wider = house.job(model=model.id, luthier={"rank": 12, "target_modules": ["v_proj", "q_proj"]}).luthier
    assert (wider["rank"], wider["alpha"], wider["target_modules"]) == (12, 24, ["v_proj", "q_proj"])
    assert house.job(model=model.id, luthier={"rank": 12, "alpha": 99.0}).luthier["alpha"] == 99.0
    plain = house.job(luthier={"adapter": "lora", "rank": 8})
    all_layers = house.model(plain, uid="plain", key="weights/plain").id
    assert house.job(model=all_layers, luthier={"rank": 9}).luthier["target_modules"] is None
    with pytest.raises(InvalidRequest, match="must hold all linear layers: leave it out"):
        house.job(model=all_layers, luthier={"target_modules": ["q_proj"]})
    house.session.rollback()
    for wrong in ({"rank": 4}, {"adapter": "qlora"}, {"target_modules": ["v_proj"]}):
        with pytest.raises(InvalidRequest, match="begins as exactly that model") as caught:
            house.job(model=model.id, luthier=wrong)
        assert caught.value.param == f"luthier.{next(iter(wrong))}"
        house.session.rollback()
