"""A job that succeeds tells the inference workers at once, so that its model is in memory when asked for."""

from __future__ import annotations

from app.core.new_weights import NEW_WEIGHTS, NewWeights
from app.core.status import JobStatus
from tests.worker.desk import Desk, wait_for
from worker.runner import Runner
from worker.trainer import Trainer


def test_inference_workers_are_told_of_a_new_model_and_find_it_there(desk: Desk, trainer: Trainer) -> None:
    with desk.context.redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(NEW_WEIGHTS)
        job_id = desk.queue()
        Runner(desk.context, trainer).run_waiting()
        told: list[NewWeights] = []

        def look() -> bool:
            message = channel.get_message(timeout=0.1)
            told.extend([NewWeights.model_validate_json(message["data"])] if message else [])
            return bool(told)

        wait_for(look)
    assert desk.job(job_id).status is JobStatus.SUCCEEDED
    assert told[0].base_model == "tiny"
    assert (desk.context.storage.path(told[0].tuned.path) / "adapter_config.json").is_file()
