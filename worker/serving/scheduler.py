"""The queue of sequences that wait for a row: first come first served within a project, projects in turn.

So a project with a thousand waiting requests delays another project's single one by one place, not by a
thousand. Knows nothing of memory: the batch decides which of the first ones can begin.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from worker.serving.sequence import Completion, Sequence


class FairQueue:
    """Waiting sequences, a line per project; the first line is served next."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        """All in the order in which they would be served; not to be changed meanwhile."""
        lines = [iter(line) for line in self._lines.values()]
        while lines:
            heads = [(line, next(line, None)) for line in lines]
            lines = [line for line, head in heads if head is not None]
            yield from (head for _, head in heads if head is not None)

    def push(self, sequence: Sequence) -> None:
        """Add at the end of its project's line; a new line starts last."""
        self._lines.setdefault(project_of(sequence), deque()).append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Make it the very next: a sequence that had to give its row back has waited already."""
        project = project_of(sequence)
        self._lines.setdefault(project, deque()).appendleft(sequence)
        self._lines.move_to_end(project, last=False)

    def peek(self) -> Sequence | None:
        """The one to be served next."""
        for line in self._lines.values():
            return line[0]
        return None

    def take(self, sequence: Sequence) -> None:
        """Serve this one now; its project goes behind the others."""
        project = project_of(sequence)
        line = self._lines[project]
        line.remove(sequence)
        if line:
            self._lines.move_to_end(project)
        else:
            del self._lines[project]

    def remove(self, completion: Completion) -> None:
        """Drop all waiting sequences of one completion."""
        project = completion.request.project_id
        line = self._lines.get(project, deque())
        kept = deque(sequence for sequence in line if sequence.completion is not completion)
        if kept:
            self._lines[project] = kept
        else:
            self._lines.pop(project, None)


def project_of(sequence: Sequence) -> str:
    """Whose it is."""
    return sequence.completion.request.project_id
