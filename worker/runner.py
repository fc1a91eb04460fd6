"""The story of one job, top to bottom: claim, train, record, end. Where database and trainer meet.

The row is asked before every write whether this attempt still owns the job; no transaction is open
while the device works.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.core import attempts, events
from app.core.attempts import Attempt, AttemptLost, Death
from app.core.db import transaction
from app.core.errors import ServiceError
from app.core.log import bind
from app.core.tables import Job
from worker import records
from worker.context import Context
from worker.inputs import JobInputError
from worker.lease import Lease
from worker.spec import make_spec
from worker.trainer import Trainer, TrainerDiedError
from worker.training.words import CheckpointReady, Failed, Finished, Log, StepDone, TrainSpec, TrainWord

log = logging.getLogger(__name__)
T = TypeVar("T")


class LeaseUnsafeError(Exception):
    """The lease could not be renewed and is about to run out: stop before someone else starts."""


class StoppingError(Exception):
    """This worker is being stopped."""


class Runner:
    """Runs waiting jobs one after another on one trainer."""

    def __init__(self, context: Context, trainer: Trainer) -> None:
        self._context = context
        self._trainer = trainer
        self._settings = context.settings
        self._busy = threading.Lock()
        self.stopping = threading.Event()

    def keep_warm(self) -> None:
        """Start the trainer when there is none, so that the next job finds it ready.

        Never while a job runs: a child started in place of one that just died would hide that death.
        """
        if not self.stopping.is_set() and self._busy.acquire(blocking=False):
            try:
                self._trainer.start()
            finally:
                self._busy.release()

    def run_waiting(self) -> None:
        """Run jobs until none waits. The message that led here named one; the best one is taken."""
        with self._busy:
            while not self.stopping.is_set() and self._run_best():
                pass

    def _run_best(self) -> bool:
        claimed_at = time.monotonic()  # before the database's clock starts, so that ours ends first
        with transaction(self._context.sessions) as session:
            job = attempts.claim_job(session, worker=self._context.worker, lease_s=self._settings.lease_s)
            if job is None:
                return False
            events.add_message(session, job, "Fine-tuning job started")
        # Half a heartbeat before the end, the trainer must be on its way down.
        margin_s = self._settings.trainer_grace_s + self._settings.heartbeat_s / 2
        safe_s = self._settings.lease_s - margin_s
        with (
            bind(job=job.id, attempt=str(job.attempt)),
            Lease(begun_at=claimed_at, safe_s=safe_s, on_unsafe=self._trainer.kill) as lease,
        ):
            _AttemptRun(self._context, self._trainer, job, lease=lease, stopping=self.stopping).run()
        return True


class _AttemptRun:
    """One attempt at one job, from its claim to its end."""

    def __init__(
        self, context: Context, trainer: Trainer, job: Job, *, lease: Lease, stopping: threading.Event
    ) -> None:
        self._context = context
        self._settings = context.settings
        self._trainer = trainer
        self._job = job
        self._attempt = Attempt(job.id, job.attempt)
        self._lease = lease
        self._stopping = stopping
        self._checked_at = time.monotonic()
        self._heard_at = time.monotonic()

    def run(self) -> None:
        """Train and record; whatever happens, the job's row tells it and the trainer is free again."""
        log.info("attempt started")
        try:
            self._train(self._write(lambda session: make_spec(self._context, session, self._job)))
        except JobInputError as missing:
            error = missing.error
            self._end(lambda session: attempts.fail(session, self._attempt, error=error))
        except AttemptLost:
            log.info("the job is no longer ours; stopping the trainer")
            self._trainer.stop()
        except LeaseUnsafeError:
            self._fence()
        except StoppingError:
            self._trainer.stop()
            self._end(lambda session: attempts.hand_back(session, self._attempt))
        except TrainerDiedError as death:
            if self._lease.is_unsafe:  # by the guard's hand
                self._fence()
            else:
                self._trainer.stop()
                self._died(Death(str(death)))
        except ServiceError as error:  # no room in storage
            self._trainer.stop()
            self._died(Death(error.message, error.code or "server_error"))
        except Exception:  # a bug of ours; the trainer must not go on with a job nobody listens to
            log.exception("the attempt ended by an error of the worker")
            self._trainer.stop()
            self._died(Death("The worker could not record what the trainer reported.", "server_error"))
        finally:
            records.drop_attempt_folder(self._context, self._attempt)

    def _train(self, spec: TrainSpec) -> None:
        self._trainer.start()
        started = time.monotonic()
        while not self._trainer.wait_ready(timeout_s=self._tick()):
            self._keep_alive()
            if time.monotonic() - started > self._settings.trainer_start_s:
                raise TrainerDiedError(f"The trainer did not start in {self._settings.trainer_start_s:g} s.")
        self._keep_alive()
        self._trainer.send(spec)
        self._heard_at = time.monotonic()
        while True:
            word = self._trainer.next_word(timeout_s=self._tick())
            if word is not None:
                self._heard_at = time.monotonic()
                if self._record(word):
                    return
            elif time.monotonic() - self._heard_at > self._settings.setup_limit_s:
                raise TrainerDiedError(
                    f"The trainer made no progress for {self._settings.setup_limit_s:g} s and was ended."
                )
            self._keep_alive()

    def _record(self, word: TrainWord) -> bool:
        """Write down one word; True when it was the last."""
        context, attempt = self._context, self._attempt
        match word:
            case StepDone():
                self._write(lambda session: records.record_step(session, attempt, word))
            case CheckpointReady():
                self._record_checkpoint(word)
            case Log():
                self._write(lambda session: records.record_log(session, attempt, word))
            case Finished():
                self._write(lambda session: records.record_success(context, session, attempt, word))
                log.info("succeeded after %d steps", word.steps)
                return True
            case Failed(retryable=True):
                self._died(Death(word.message, word.code))
                return True
            case Failed():
                error = {"code": word.code, "message": word.message, "param": word.param}
                self._end(lambda session: attempts.fail(session, attempt, error=error))
                return True
            case _:
                pass
        return False

    def _record_checkpoint(self, word: CheckpointReady) -> None:
        context, attempt = self._context, self._attempt
        records.publish_checkpoint(context, attempt, word)
        try:
            self._write(lambda session: records.record_checkpoint(context, session, attempt, word))
        except AttemptLost:
            key = records.checkpoint_key(attempt, word)
            self._write(lambda session: records.drop_unnamed_checkpoint(context, session, key))
            raise

    def _keep_alive(self) -> None:
        """Renew the lease in time, and notice soon when the job has been cancelled."""
        if self._stopping.is_set():
            raise StoppingError
        if self._lease.is_unsafe:
            raise LeaseUnsafeError
        now = time.monotonic()
        if self._lease.age_s >= self._settings.heartbeat_s:
            lease_s = self._settings.lease_s
            self._write(lambda session: attempts.renew_lease(session, self._attempt, lease_s=lease_s))
            self._lease.renewed(at=now)
            self._checked_at = now
        elif now - self._checked_at >= self._settings.cancel_poll_s:
            self._write(lambda session: attempts.check_alive(session, self._attempt))
            self._checked_at = now

    def _write(self, action: Callable[[Session], T]) -> T:
        """One short transaction, repeated while the database is away and the lease is safe."""
        while True:
            try:
                with transaction(self._context.sessions) as session:
                    return action(session)
            except OperationalError as error:
                if self._lease.is_unsafe or self._stopping.is_set():
                    raise LeaseUnsafeError from error
                log.warning("database away: %s", type(error.orig).__name__)
                time.sleep(min(0.5, self._settings.heartbeat_s / 2))

    def _fence(self) -> None:
        """Stop before someone else starts; the job goes back if the database answers just now."""
        log.warning("the lease cannot be renewed; stopping the trainer")
        self._trainer.stop()
        reason = "The worker lost touch with the database"
        self._end(lambda session: attempts.hand_back(session, self._attempt, reason=reason))

    def _died(self, death: Death) -> None:
        log.warning("attempt died: %s", death.reason)
        most = self._settings.max_attempts
        self._end(lambda session: attempts.requeue(session, self._attempt, death=death, max_attempts=most))

    def _end(self, action: Callable[[Session], object]) -> None:
        try:
            self._write(action)
        except (AttemptLost, LeaseUnsafeError):
            log.info("the job ended without us")

    def _tick(self) -> float:
        return min(self._settings.cancel_poll_s, self._settings.heartbeat_s / 2)
