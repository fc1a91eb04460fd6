"""Starts one worker process: a Celery worker on one queue, and the threads that belong to it.

Which tasks a process knows follows from its queue, so a training worker's Celery process never
imports torch: only its child does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down

from app.core import presence
from app.core.base_models import find_model_dir
from app.core.log import configure
from app.core.queue import Queue, Task, add_canary_queue, inference_queue
from app.core.settings import Settings
from worker.beat import Beat
from worker.context import Context, make_context
from worker.hearing import CALL_EVERY_S, LOST_S, Ears
from worker.threads import wait_briefly

log = logging.getLogger(__name__)
_LAST_BEAT_S = 2.0  # how long all beats together may take to end
_LAST_WORDS_S = 5.0  # how long a deaf process may take to end in order
_DEAF = 69  # exit code, EX_UNAVAILABLE of sysexits.h: messages do not come any more


@dataclass(slots=True)
class Role:
    """What makes a process a control, a training or an inference worker."""

    queues: list[str]
    concurrency: int
    tasks: dict[Task, Callable[..., None]]
    about: Callable[[], dict[str, Any] | None]  # what it says of itself; None: not ready
    beats: list[Beat] = field(default_factory=list)
    on_stopping: Callable[[], None] = lambda: None  # asked to stop, perhaps twice; tasks still run
    on_stopped: Callable[[], None] = lambda: None  # all tasks are done
    may_end: Callable[[], bool] = lambda: True  # nothing is under way that needs no broker


def run(settings: Settings, queue: Queue) -> None:
    """Work on one queue until told to stop."""
    configure(f"worker.{queue}", level=settings.log_level)
    context = make_context(settings)
    role = _ROLES[queue](context)
    own = add_canary_queue(context.celery, context.worker)
    ears = Ears(lambda: context.sender.send(Task.CANARY, own), slots=role.concurrency)
    for name, action in {**role.tasks, Task.CANARY: lambda: None}.items():
        _register(context.celery, name, action, ears)
    canary = Beat("canary", lambda: _listen(ears, role), every_s=CALL_EVERY_S)
    role.beats += [canary, _presence_beat(context, queue, role, ears)]
    _connect_signals(context, queue, role, canary)
    context.celery.Worker(
        queues=[*role.queues, own],
        pool="threads",
        concurrency=role.concurrency,
        hostname=f"{queue}@{context.worker}",
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        task_events=False,
        quiet=True,
    ).start()


def _control(context: Context) -> Role:
    from worker import control

    tasks: dict[Task, Callable[..., None]] = {
        Task.VALIDATE_JOB: lambda job_id: control.validate_job(context, job_id),
        Task.ASSESS_JOB: lambda question: control.assess_job(context, question),
    }
    house = Beat("housekeeping", lambda: control.keep_house(context), every_s=context.settings.sweep_s)
    # Threads of their own, so that a disk that is slow or hangs keeps no dead job from its queue.
    waste = Beat("removing", lambda: control.remove_deleted(context), every_s=context.settings.sweep_s)
    tidy = Beat("tidying", lambda: control.tidy_up(context), every_s=12 * context.settings.sweep_s)
    return Role([str(Queue.CONTROL)], 3, tasks, lambda: {}, [house, waste, tidy])


def _training(context: Context) -> Role:
    from worker.runner import Runner
    from worker.trainer import Trainer

    settings = context.settings
    trainer = Trainer(
        grace_s=settings.trainer_grace_s, worker=context.worker, memory_bytes=settings.trainer_memory_bytes
    )
    runner = Runner(context, trainer)
    tasks = {Task.RUN_JOB: lambda _job_id: runner.run_waiting()}
    warm = Beat("trainer", runner.keep_warm, every_s=1.0)

    def about() -> dict[str, Any] | None:
        entries = context.catalogue.entries.values()
        here = [entry.name for entry in entries if find_model_dir(entry, context.settings.models_dir)]
        device = runner.device
        if device is None:
            return None
        return {"base_models": here, "busy": runner.is_busy} | device.model_dump(exclude={"word"})

    return Role(
        [str(Queue.TRAINING)],
        2,  # one runs jobs, the other hears meanwhile
        tasks,
        about,
        [warm],
        on_stopping=runner.stopping.set,
        on_stopped=trainer.stop,
        may_end=lambda: not runner.is_busy,
    )


def _inference(context: Context) -> Role:
    wait_briefly()
    from worker.inference import Inference

    inference = Inference(context)
    inference.preload()
    news = Beat("news", inference.listen, every_s=1.0)

    def about() -> dict[str, Any] | None:
        inference.end_if_broken()
        names = inference.available()
        return {"base_models": names} if names else None

    return Role(
        [inference_queue(entry.name) for entry in inference.entries()],
        context.settings.max_requests_in_flight,
        {Task.COMPLETE: inference.complete},
        about,
        [news],
        on_stopping=lambda: inference.stop_soon(drain_s=context.settings.drain_s),
        on_stopped=inference.stop,
    )


_ROLES: dict[Queue, Callable[[Context], Role]] = {
    Queue.CONTROL: _control,
    Queue.TRAINING: _training,
    Queue.INFERENCE: _inference,
}


def _register(celery: Celery, name: Task, action: Callable[..., None], ears: Ears) -> None:
    def guarded(*args: Any) -> None:
        with ears.working():
            try:
                action(*args)
            except Exception:  # the row or the client's deadline tells the rest; a task has no result
                log.exception("%s failed", name)

    celery.task(guarded, name=str(name), ignore_result=True)


def _listen(ears: Ears, role: Role) -> None:
    """One canary; ends this process when none has come for so long that only a new one can help."""
    if ears.silence_s > LOST_S and role.may_end():
        log.critical("no message has come for %d s though the broker takes them; this process ends", LOST_S)
        role.on_stopping()
        last_words = threading.Thread(target=role.on_stopped, name="last-words", daemon=True)
        last_words.start()
        last_words.join(_LAST_WORDS_S)
        os._exit(_DEAF)  # the main thread hangs on the connection that brings nothing
    ears.call()


def _presence_beat(context: Context, queue: Queue, role: Role, ears: Ears) -> Beat:
    ttl_s = context.settings.presence_s

    def announce() -> None:
        about = role.about()
        if about is None:
            presence.withdraw(context.redis, kind=queue, worker=context.worker)
        elif ears.deaf:
            presence.announce_deaf(context.redis, kind=queue, worker=context.worker, ttl_s=ttl_s)
        else:
            presence.announce(context.redis, kind=queue, worker=context.worker, about=about, ttl_s=ttl_s)

    return Beat("presence", announce, every_s=min(1.0, ttl_s / 3))


def _connect_signals(context: Context, queue: Queue, role: Role, canary: Beat) -> None:
    def ready(**_: Any) -> None:
        log.info("ready for %s", ", ".join(role.queues))
        for beat in role.beats:
            beat.start()

    def stopping(**_: Any) -> None:
        canary.stop()  # no message is taken any more
        role.on_stopping()

    def stopped(**_: Any) -> None:
        role.on_stopping()  # Celery may end without having said that it will
        for beat in role.beats:  # first: none may start again what is ended now
            beat.stop()
        role.on_stopped()
        deadline = time.monotonic() + _LAST_BEAT_S
        for beat in role.beats:
            beat.join(timeout_s=max(0.0, deadline - time.monotonic()))
        try:
            presence.withdraw(context.redis, kind=queue, worker=context.worker)
        except Exception:  # the entry ends by itself
            log.info("presence not withdrawn")

    worker_ready.connect(ready, weak=False)
    worker_shutting_down.connect(stopping, weak=False)
    worker_shutdown.connect(stopped, weak=False)
