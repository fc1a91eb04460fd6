"""What the engine does between two tokens: admit, compute, hand out words, drop who left or waited too long.

Single-threaded; `Engine` owns the thread. One request's trouble ends that request; trouble in a forward pass
of the batch ends the requests of that model, and only repeated trouble ends the loop.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future

import torch

from app.core.completions import CompletionRequest, Failed, TunedWeights, WeightsKind
from worker.serving.adapter_files import ModelUnavailable
from worker.serving.batch import CannotBegin, ModelGroup
from worker.serving.intake import Intake
from worker.serving.models import ModelSet
from worker.serving.outlet import Outlet
from worker.serving.rendering import Refused
from worker.serving.sequence import Completion, Sequence

MAX_FAILED_STEPS = 3  # in a row, prompts included; a CUDA error never goes away within a process
ENGINE_ERROR = Failed(
    status=503, code="engine_error", message="The inference engine failed while answering. Please try again."
)
TIMEOUT = Failed(
    status=503,
    code="timeout",
    message="The model had no capacity to begin an answer in time. Please try again.",
)
_log = logging.getLogger(__name__)


class Loop:
    """All completions under way. `prefill_tokens`: prompt tokens computed between two decoding steps."""

    def __init__(self, intake: Intake, models: ModelSet, outlet: Outlet, *, prefill_tokens: int) -> None:
        self._intake = intake
        self.models = models
        self._outlet = outlet
        self._prefill_tokens = prefill_tokens
        self._placed: dict[str, tuple[Completion, ModelGroup]] = {}
        self._unplaced: dict[str, Completion] = {}  # their whole model is not in memory yet
        self._warming: list[tuple[TunedWeights, Future[None]]] = []
        self._failed_steps = 0
        self._moved = False  # something began or ended in the last step, so the next one may find more
        self.made_tokens = 0
        self.errors = 0

    @property
    def busy(self) -> bool:
        """There is something to compute now; who waits for a file does not count."""
        return self._moved or any(group.rows or group.fillings for group in self.models.groups)

    @property
    def loading(self) -> int:
        """Requests whose model is still on its way into memory."""
        return len(self._unplaced)

    def open(self, request: CompletionRequest) -> None:
        """Take a request in; what cannot be answered is told so at once."""
        try:
            self._unplaced[request.id] = self._intake.open(request)
        except Refused as refused:
            self._outlet.fail(request.id, refused.failed)
        except Exception:
            _log.exception("request %s could not be prepared", request.id)
            self._outlet.fail(request.id, ENGINE_ERROR)

    def drop(self, request_id: str) -> None:
        """Forget a request: its sequences leave, its rows are free."""
        self._outlet.close(request_id)
        self._unplaced.pop(request_id, None)
        placed = self._placed.pop(request_id, None)
        if placed is not None:
            completion, group = placed
            group.drop(completion)

    def warm_up(self, tuned: TunedWeights, done: Future[None]) -> None:
        """Load weights ahead of their first request."""
        self._warming.append((tuned, done))

    def close(self) -> None:
        """Nothing is loaded any more; who waits for a warm-up is told."""
        for _, done in self._warming:
            done.set_exception(ModelUnavailable("the engine has stopped"))
        self.models.close()

    def step(self) -> None:
        """One token for every running sequence, after new ones were taken in."""
        self._moved = False
        self._expire()
        self.models.settle()
        self._place()
        self._warm()
        for group in self.models.groups:
            try:
                self._run(group)
            except Exception:
                self._fail_group(group)

    def _run(self, group: ModelGroup) -> None:
        self._admit(group)
        if group.rows:
            self._hand_out(group.decode())
            self._failed_steps = 0

    def _admit(self, group: ModelGroup) -> None:
        """Spend a step's prompt tokens: shortest first, and no project's prompt takes more than its share.

        What a short one leaves is spent on the longer ones, and on those that are admitted in its place.
        """
        left = self._prefill_tokens
        while left > 0:
            self._take_in(group)
            turns = sorted(group.fillings, key=group.missing)
            if not turns:
                return
            for others, sequence in zip(range(len(turns), 0, -1), turns, strict=True):
                if left > 0:
                    left -= self._fill(group, sequence, -(-left // others))

    def _take_in(self, group: ModelGroup) -> None:
        """Begin what can begin now."""
        while True:
            try:
                sequence = group.admit()
            except CannotBegin as error:
                self._moved = True
                self._fail(error.sequence.completion, unavailable(error.reason))
                continue
            if sequence is None:
                return
            self._moved = True
            try:
                group.begin(sequence)
                if sequence not in group.fillings:
                    self._hand_out([sequence])
            except Exception as error:
                self._fail_prompt(sequence, error)

    def _fill(self, group: ModelGroup, sequence: Sequence, limit: int) -> int:
        """Compute a part of a prompt; returns its tokens."""
        self._moved = True
        try:
            spent = group.prefill(sequence, limit)
            if sequence not in group.fillings:
                self._hand_out([sequence])
        except Exception as error:
            self._fail_prompt(sequence, error)
            return 0
        return spent

    def _fail_prompt(self, sequence: Sequence, error: Exception) -> None:
        """End the request of a prompt that failed; called while its exception is handled."""
        _log.exception("prompt of request %s failed", sequence.completion.request.id)
        self.errors += 1
        self._fail(sequence.completion, ENGINE_ERROR)
        self._failed_steps += not isinstance(error, torch.OutOfMemoryError)  # that one goes away
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise error

    def _hand_out(self, sequences: list[Sequence]) -> None:
        """Send what these sequences have to say, one message per request; close finished ones."""
        self.made_tokens += len(sequences)
        for completion in {id(s.completion): s.completion for s in sequences}.values():
            if completion.broken:
                self.errors += 1
                self._fail(completion, ENGINE_ERROR)
                continue
            words = completion.take_words()
            heard = not words or self._outlet.send(completion.request.id, words)
            if completion.finished or not heard:
                self.drop(completion.request.id)

    def _place(self) -> None:
        """Put completions whose model is in memory into that model's line."""
        for request_id, completion in list(self._unplaced.items()):
            try:
                group = self.models.get(completion.request.tuned)
            except ModelUnavailable as error:
                self._fail(completion, unavailable(error))
                continue
            if group is not None:
                del self._unplaced[request_id]
                self._placed[request_id] = (completion, group)
                for sequence in completion.sequences:
                    group.queue.push(sequence)

    def _warm(self) -> None:
        waiting, self._warming = self._warming, []
        for tuned, done in waiting:
            try:
                if self._is_loaded(tuned):
                    done.set_result(None)
                else:
                    self._warming.append((tuned, done))
            except ModelUnavailable as error:
                done.set_exception(error)

    def _is_loaded(self, tuned: TunedWeights) -> bool:
        if tuned.kind is WeightsKind.LORA:
            return self.models.base.adapters.load(tuned)
        return self.models.get(tuned) is not None

    def _expire(self) -> None:
        placed = [completion for completion, _ in self._placed.values()]
        for completion in [*self._unplaced.values(), *placed]:
            if completion.expired:
                self._fail(completion, TIMEOUT)

    def _fail(self, completion: Completion, failed: Failed) -> None:
        self._outlet.fail(completion.request.id, failed)
        self.drop(completion.request.id)

    def _fail_group(self, group: ModelGroup) -> None:
        """End all requests of a model whose forward pass failed; called while its exception is handled."""
        _log.exception("a step of the inference engine failed")
        self.errors += 1
        self._failed_steps += 1
        for completion, owner in list(self._placed.values()):
            if owner is group:
                self._fail(completion, ENGINE_ERROR)
        group.abandon()
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise


def unavailable(error: ModelUnavailable) -> Failed:
    """What a client is told when weights cannot be loaded; no paths."""
    message = (
        f"The model could not be loaded: {error}. If it was just created, try again, else train it anew."
    )
    return Failed(status=503, code="model_unavailable", message=message, param="model")
