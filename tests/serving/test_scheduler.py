"""Projects take turns in the line; within one, first come is first served."""

from __future__ import annotations

import pytest

from worker.serving.scheduler import FairQueue
from worker.serving.sequence import Completion, Sequence


@pytest.fixture
def wait(make_request):
    def make(project: str, n: int = 1) -> Completion:
        completion = Completion(make_request(project_id=project, n=n), [1], frozenset(), 5)
        completion.sequences = [Sequence(completion, index, tokenizer=None) for index in range(n)]
        return completion

    return make


def served(queue: FairQueue) -> list[str]:
    return [take(queue).completion.request.project_id for _ in range(len(queue))]


def take(queue: FairQueue) -> Sequence:
    sequence = queue.peek()
    assert sequence is not None
    queue.take(sequence)
    return sequence


def test_a_single_request_waits_behind_one_of_a_crowd_not_behind_all(wait):
    queue = FairQueue()
    for project in ["crowd"] * 5 + ["single"] + ["third"] * 2:
        queue.push(wait(project).sequences[0])
    order = ["crowd", "single", "third", "crowd", "third", "crowd", "crowd", "crowd"]
    assert [sequence.completion.request.project_id for sequence in queue] == order
    assert served(queue) == order


def test_who_gave_a_row_back_is_next(wait):
    queue = FairQueue()
    for project in ("a", "b", "a"):
        queue.push(wait(project).sequences[0])
    first = take(queue)
    queue.push_front(first)
    assert queue.peek() is first
    assert served(queue) == ["a", "b", "a"]


def test_removing_a_completion_takes_all_its_choices(wait):
    queue = FairQueue()
    many, other = wait("a", n=4), wait("a")
    for sequence in [*many.sequences, *other.sequences]:
        queue.push(sequence)
    queue.remove(many)
    assert list(queue) == other.sequences
    queue.remove(other)
    assert queue.peek() is None
