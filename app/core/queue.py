"""The Celery app, and the only place where queues and tasks are named.

A message about a job is a hint that holds an id; losing or doubling one costs nothing but time.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from functools import partial
from typing import Any

import kombu.entity
from celery import Celery
from kombu.pools import producers
from sqlalchemy.orm import Session

from app.core.errands import Errands
from app.core.outbox import after_commit
from app.core.settings import Settings

log = logging.getLogger(__name__)

# Without these a half-open connection leaves a worker deaf for good (celery#6348, kombu#2590).
SOCKET_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 5,  # a worker on a half-open line is deaf for twice that and a second
}


# A sender has a caller who waits: one try, and soon an answer. Workers keep trying instead.
SEND_OPTIONS: dict[str, Any] = SOCKET_OPTIONS | {
    "socket_timeout": 3,
    "socket_connect_timeout": 2,
    "max_retries": 0,
}


CANARY_KEPT_S = 60.0  # after its last use


class Queue(StrEnum):
    """Queues by the resource they need. Inference has one more for each base model."""

    CONTROL = "control"
    TRAINING = "training"
    INFERENCE = "inference"


class Task(StrEnum):
    """What a message asks for."""

    VALIDATE_JOB = "luthier.validate_job"
    ASSESS_JOB = "luthier.assess_job"
    RUN_JOB = "luthier.run_job"
    COMPLETE = "luthier.complete"
    CANARY = "luthier.canary"  # a worker to itself: it still hears


_QUEUES = {Task.VALIDATE_JOB: Queue.CONTROL, Task.RUN_JOB: Queue.TRAINING}


def inference_queue(base_model: str) -> str:
    """The queue of the workers that hold this base model."""
    return f"{Queue.INFERENCE}.{base_model}"


def add_canary_queue(celery: Celery, worker: str) -> str:
    """Name of the queue of messages that a worker sends to itself; the broker drops it after the worker."""
    name = f"canary.{worker}"
    queue = kombu.entity.Queue(name, kombu.entity.Exchange(name), routing_key=name, expires=CANARY_KEPT_S)  # type: ignore[no-untyped-call]
    celery.amqp.queues.add(queue)
    return name


def make_celery(settings: Settings) -> Celery:
    """A Celery app over this installation's broker."""
    app = Celery("luthier", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        broker_transport="app.core.transport:Transport",
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,  # the lease, not the broker, finds the dead
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # a waiting message must stay free for an idle worker
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,  # nobody uses it, and its pub/sub socket is one more to die
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=dict(SOCKET_OPTIONS),
        task_publish_retry=False,
        task_default_queue=str(Queue.CONTROL),
        enable_utc=True,
    )
    return app


class Sender:
    """Sends messages; knows nothing of who receives them."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._connection = celery.connection_for_write(transport_options=SEND_OPTIONS)
        self._hints = Errands("hints")

    def send(self, task: Task, queue: str, *args: Any) -> None:
        """Send now; raises when the broker cannot be reached. Arguments never reach a log."""
        with producers[self._connection].acquire(block=True, timeout=5) as producer:
            self._celery.send_task(
                str(task), args=args, queue=queue, producer=producer, argsrepr="(…)", kwargsrepr="{}"
            )

    def backlog(self, task: Task) -> int:
        """How many hints of that kind no worker has taken yet; raises when the broker cannot be reached."""
        with producers[self._connection].acquire(block=True, timeout=5) as producer:
            queue = self._celery.amqp.queues[str(_QUEUES[task])]
            return int(queue(producer.channel).queue_declare(passive=False).message_count)

    def hint(self, task: Task, job_id: str) -> None:
        """Tell the workers of a job, soon: who creates one does not wait for a broker that is slow or away.

        One that cannot be sent is no error: housekeeping tells them again.
        """
        if not self._hints.add(partial(self._hint, task, job_id)):
            log.warning("hint %s for %s dropped: too many wait for the broker", task, job_id)

    def hint_on_commit(self, session: Session, task: Task, job_id: str) -> None:
        """Tell the workers once the row is committed."""
        after_commit(session, partial(self.hint, task, job_id))

    def flush(self, *, timeout_s: float) -> bool:
        """Whether all hints so far are sent, or given up, within the time."""
        return self._hints.flush(timeout_s=timeout_s)

    def _hint(self, task: Task, job_id: str) -> None:
        try:
            self.send(task, str(_QUEUES[task]), job_id)
        except Exception as error:  # kombu raises a different class for each kind of failure
            log.warning("hint %s for %s not sent: %s", task, job_id, type(error).__name__)
