"""Takes waiting jobs one after another and runs each on the trainer. What one attempt is: attempt_run.py."""

from __future__ import annotations

import logging
import threading
import time

from app.core import attempts, events
from app.core.base_models import find_model_dir
from app.core.db import transaction
from app.core.log import bind
from app.core.settings import KILL_S
from app.core.tables import Job
from worker.attempt_run import AttemptRun
from worker.context import Context
from worker.lease import Lease
from worker.trainer import Trainer, TrainerDiedError
from worker.training.words import Ready

log = logging.getLogger(__name__)


class Runner:
    """Runs waiting jobs on one trainer. Any thread may call any method."""

    def __init__(self, context: Context, trainer: Trainer) -> None:
        self._context = context
        self._trainer = trainer
        self._settings = context.settings
        self._asked = threading.Event()  # to look for jobs; the message that led here is only a nudge
        self._looking = threading.Lock()  # held while jobs run: one at a time
        self._device = threading.Lock()  # held by whoever starts or uses the trainer
        self.stopping = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether a job runs now."""
        return self._looking.locked()

    @property
    def device(self) -> Ready | None:
        """The device on which a job could begin; None where none could."""
        return self._trainer.device if self._context.storage.is_there() else None

    def keep_warm(self) -> None:
        """Start the trainer when there is none, so that the next job finds it ready.

        Never while a job runs: a child started in place of one that just died would hide that death.
        """
        if not self.stopping.is_set() and self._device.acquire(blocking=False):
            try:
                self._trainer.start()
            finally:
                self._device.release()

    def run_waiting(self) -> None:
        """Run jobs until none waits; returns at once where another thread is at it, which will look again."""
        self._asked.set()
        while self._asked.is_set() and self._looking.acquire(blocking=False):
            try:
                while self._asked.is_set():
                    self._asked.clear()
                    self._run_all()
            finally:
                self._looking.release()

    def _run_all(self) -> None:
        with self._device:
            while not self.stopping.is_set() and self._may_begin() and self._run_best():
                pass

    def _may_begin(self) -> bool:
        """Whether a job taken now would not die of this machine at once."""
        if not self._context.storage.is_there():
            log.error("the storage is not there; no job is taken")
            return False
        return self._device_is_free()

    def _device_is_free(self) -> bool:
        """Whether nothing of an earlier attempt is left; what cannot be killed may hold the device."""
        try:
            self._trainer.start()
        except TrainerDiedError:
            log.error("processes of an earlier attempt cannot be ended; no job is taken")
            return False
        return True

    def _run_best(self) -> bool:
        claimed_at = time.monotonic()  # before the database's clock starts, so that ours ends first
        job = self._claim()
        if job is None:
            return False
        # Half a heartbeat before it is too late to kill the trainer inside the lease.
        safe_s = self._settings.lease_s - KILL_S - self._settings.heartbeat_s / 2
        with (
            bind(job=job.id, attempt=str(job.attempt)),
            Lease(begun_at=claimed_at, safe_s=safe_s, on_unsafe=self._trainer.kill) as lease,
        ):
            AttemptRun(self._context, self._trainer, job, lease=lease, stopping=self.stopping).run()
        self._trainer.end_strays()
        return True

    def _claim(self) -> Job | None:
        context = self._context
        here = [
            entry.name
            for entry in context.catalogue.entries.values()
            if find_model_dir(entry, self._settings.models_dir) is not None
        ]
        with transaction(context.sessions) as session:
            attempts.hand_back_strays(session, worker=context.worker)
        with transaction(context.sessions) as session:
            job = attempts.claim_job(
                session, worker=context.worker, lease_s=self._settings.lease_s, base_models=here
            )
            if job is not None and job.attempt == 1:
                events.add_message(session, job, "Fine-tuning job started")
        return job
