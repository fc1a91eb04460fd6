"""The story of one attempt, top to bottom: spec, train, record, end. Where database and trainer meet.

The row is asked before every write whether this attempt still owns the job; no transaction is open
while the device works.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.core import attempts
from app.core.attempts import Attempt, AttemptLost, Death
from app.core.db import is_away, transaction
from app.core.errors import ServiceError, StorageFull
from app.core.failures import FailureCode, is_retried
from app.core.ids import Prefix, new_id
from app.core.tables import Job
from worker import records
from worker.context import Context
from worker.inputs import JobInputError
from worker.lease import Lease
from worker.silence import Silence
from worker.spec import make_spec
from worker.trainer import Trainer, TrainerDiedError
from worker.training.words import (
    Baseline,
    CheckpointReady,
    Failed,
    Finished,
    Log,
    Started,
    StepDone,
    Stopped,
    TrainSpec,
    TrainWord,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


class LeaseUnsafeError(Exception):
    """The lease could not be renewed and is about to run out: stop before someone else starts."""


class AttemptRun:
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
        self._silence = Silence(context.settings)
        self._checked_at = time.monotonic()
        self._pausing = False
        self._asked_at: float | None = None  # when the trainer was asked to stop

    def run(self) -> None:
        """Train and record; whatever happens, the job's row tells it and the trainer is free again."""
        log.info("attempt started")
        try:
            self._train(self._write(lambda session: make_spec(self._context, session, self._job)))
        except JobInputError as missing:
            error = missing.error
            self._end(lambda session: attempts.fail(session, self._attempt, error=error))
        except AttemptLost:
            log.info("the job is no longer ours; killing the trainer")
            self._trainer.kill()
        except LeaseUnsafeError:
            self._fence()
        except TrainerDiedError as death:
            if self._lease.is_unsafe:  # by the guard's hand
                self._fence()
            else:
                self._died(Death(str(death), death.code))
        except StorageFull as error:
            self._died(Death(error.message, FailureCode.STORAGE_FULL))
        except ServiceError as error:
            self._died(Death(error.message, FailureCode.SERVER_ERROR))
        except OSError:
            log.exception("the attempt ended by an error of the machine")
            self._died(Death("The worker could not reach its storage.", FailureCode.SERVER_ERROR))
        except Exception:  # a bug of ours; the trainer must not go on with a job nobody listens to
            log.exception("the attempt ended by an error of the worker")
            reason = "The worker could not record what the trainer reported."
            self._died(Death(reason, FailureCode.SERVER_ERROR))
        finally:
            records.drop_attempt_folder(self._context, self._attempt)

    def _train(self, spec: TrainSpec) -> None:
        self._trainer.start()
        started = time.monotonic()
        while not self._trainer.wait_ready(timeout_s=self._tick()):
            self._keep_alive()
            if self._wants_stop:  # nothing has begun
                return self._hand_back()
            if time.monotonic() - started > self._settings.trainer_start_s:
                reason = f"The trainer did not start in {self._settings.trainer_start_s:g} s."
                raise TrainerDiedError(reason, code=FailureCode.TRAINER_STALLED)
        self._keep_alive()
        self._trainer.send(spec)
        self._silence.begin()
        while not self._over(self._trainer.next_word(timeout_s=self._tick())):
            self._keep_alive()
            self._stop_when_asked()

    def _over(self, word: TrainWord | None) -> bool:
        """Write down one word, or look how long there has been none; True at the attempt's end."""
        if word is not None:
            self._silence.broken_by(word)
            return self._record(word)
        told = self._silence.is_too_long()
        if told is not None:
            raise TrainerDiedError(told, code=FailureCode.TRAINER_STALLED)
        return False

    def _record(self, word: TrainWord) -> bool:
        context, attempt = self._context, self._attempt
        event_id = new_id(Prefix.EVENT)  # one for all repetitions of a write
        match word:
            case Started():
                self._write(lambda session: records.record_start(session, attempt, word, event_id=event_id))
            case Baseline():
                self._write(lambda session: records.record_baseline(session, attempt, word))
            case StepDone():
                self._write(lambda session: records.record_step(session, attempt, word))
            case CheckpointReady():
                self._record_checkpoint(word)
            case Log():
                self._write(lambda session: records.record_log(session, attempt, word, event_id=event_id))
            case Finished():
                self._write(lambda session: records.record_success(context, session, attempt, word))
                log.info("succeeded after %d steps", word.steps)
                return True
            case Stopped():
                self._hand_back()
                return True
            case Failed():
                self._record_failure(word)
                return True
            case _:
                pass
        return False

    def _record_failure(self, word: Failed) -> None:
        code = FailureCode(word.code)
        if is_retried(code):
            self._died(Death(word.message, code))
            return
        error = {"code": word.code, "message": word.message, "param": word.param}
        self._end(lambda session: attempts.fail(session, self._attempt, error=error))

    def _record_checkpoint(self, word: CheckpointReady) -> None:
        context, attempt = self._context, self._attempt
        records.publish_checkpoint(context, attempt, word)
        try:
            self._write(lambda session: records.record_checkpoint(context, session, attempt, word))
        except AttemptLost:
            key = records.checkpoint_key(attempt, word)
            self._write(lambda session: records.drop_unnamed_checkpoint(context, session, key))
            raise

    @property
    def _wants_stop(self) -> bool:
        return self._pausing or self._stopping.is_set()

    def _stop_when_asked(self) -> None:
        """Ask the trainer for a last checkpoint; one that takes too long while the worker ends is killed."""
        if not self._wants_stop:
            return
        now = time.monotonic()
        if self._asked_at is None:
            log.info("asking the trainer to stop")
            self._trainer.ask_to_stop()
            self._asked_at = now
        elif self._stopping.is_set() and now - self._asked_at > self._settings.trainer_grace_s:
            reason = "The trainer had no time left for a checkpoint."
            raise TrainerDiedError(reason, code=FailureCode.TRAINER_STALLED)

    def _keep_alive(self) -> None:
        """Renew the lease in time, and notice soon when the job was cancelled or shall pause."""
        if self._lease.is_unsafe:
            raise LeaseUnsafeError
        now = time.monotonic()
        if self._lease.age_s >= self._settings.heartbeat_s:
            lease_s = self._settings.lease_s
            self._write(lambda session: attempts.renew_lease(session, self._attempt, lease_s=lease_s))
            self._lease.renewed(at=now)
        if now - self._checked_at >= self._settings.cancel_poll_s:
            self._pausing = self._write(lambda session: attempts.wants_pause(session, self._attempt))
            self._checked_at = now

    def _write(self, action: Callable[[Session], T]) -> T:
        """One short transaction, repeated while the database is away and the lease is safe."""
        while True:
            try:
                with transaction(self._context.sessions) as session:
                    return action(session)
            except (DBAPIError, PoolTimeout) as error:
                if not is_away(error):
                    raise
                if self._lease.is_unsafe:
                    raise LeaseUnsafeError from error
                log.warning("database away: %s", type(error).__name__)
                time.sleep(min(0.5, self._settings.heartbeat_s / 2))

    def _fence(self) -> None:
        """Stop before someone else starts; the job goes back if the database answers just now."""
        log.warning("the lease cannot be renewed; killing the trainer")
        self._trainer.kill()
        self._hand_back(reason="The worker lost touch with the database")

    def _hand_back(self, *, reason: str | None = None) -> None:
        """`reason`: what a job that is queued again is told; None: its trainer was asked to stop, and has."""
        asked = attempts.STOPPED if self._stopping.is_set() else "A pause was withdrawn too late to go on"
        self._end(lambda session: attempts.hand_back(session, self._attempt, reason=reason or asked))

    def _died(self, death: Death) -> None:
        """The trainer is gone before anybody else may take the job."""
        log.warning("attempt died: %s", death.reason)
        self._trainer.kill()
        if self._stopping.is_set():
            return self._hand_back()
        most, pause_s = self._settings.max_attempts, self._settings.retry_pause_s
        self._end(
            lambda session: attempts.requeue(
                session, self._attempt, death=death, max_attempts=most, pause_s=pause_s
            )
        )

    def _end(self, action: Callable[[Session], object]) -> None:
        try:
            self._write(action)
        except (AttemptLost, LeaseUnsafeError):
            log.info("the job ended without us")

    def _tick(self) -> float:
        return min(self._settings.cancel_poll_s, self._settings.heartbeat_s / 2)
