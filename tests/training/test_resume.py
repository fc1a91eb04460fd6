"""A run that was stopped or killed and goes on is the same run, to the last bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.core import memory
from app.core.manifest import MANIFEST, TRAINING_STATE, verify
from tests.tiny import write_examples
from tests.training.conftest import told
from worker.chat_template import TokenizedExample
from worker.training.loop import train
from worker.training.model import TunedModel, WarmBase
from worker.training.resume import PROGRESS
from worker.training.words import (
    Adapter,
    CheckpointReady,
    Finished,
    Log,
    Metrics,
    Section,
    Started,
    StepDone,
    Stopped,
    TrainSpec,
    TrainWord,
    Working,
)

MakeSpec = Callable[..., TrainSpec]
TOTAL = 6  # 11 examples by 4, twice; epochs end at 3 and 6


def metrics(words: Sequence[TrainWord]) -> list[Metrics]:
    return [word.metrics for word in words if isinstance(word, StepDone)]


def folders(words: Sequence[TrainWord]) -> list[str]:
    """Checkpoints, the newest first."""
    return [word.dir for word in reversed(words) if isinstance(word, CheckpointReady)]


def content(folder: str) -> dict[str, str]:
    """Digests of all that must be equal: everything but times."""
    files = {path.relative_to(folder): path for path in Path(folder).rglob("*") if path.is_file()}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if str(name) not in (MANIFEST, PROGRESS)
    }


def run_until(spec: TrainSpec, warm: WarmBase, *, step: int) -> list[TrainWord]:
    """Ask the run to stop when it has told `step`."""
    stop = threading.Event()
    words = []
    for word in train(spec, warm, stop=stop):
        words.append(word)
        if isinstance(word, StepDone) and word.metrics.step == step:
            stop.set()
    return told(words)


@pytest.fixture
def make_run(make_spec: MakeSpec, tmp_path: Path) -> MakeSpec:
    """A run with everything that draws random numbers or measures."""
    valid = write_examples(tmp_path / "valid.jsonl", 20, answer="The answer is no.")

    def make(number: int, **changes: object) -> TrainSpec:
        fields = {"dropout": 0.2, "validation_file": str(valid), "learning_rate": 3e-3}
        return make_spec(**(fields | {"output_dir": str(tmp_path / f"attempt-{number}")} | changes))

    return make


@pytest.mark.parametrize("adapter", list(Adapter))
def test_a_run_stopped_after_any_step_ends_with_the_same_bytes_and_metrics(
    make_run: MakeSpec, warm: WarmBase, adapter: Adapter
) -> None:
    whole = told(train(make_run(0, adapter=adapter), warm))
    for step in range(1, TOTAL):
        first = run_until(make_run(step, adapter=adapter), warm, step=step)
        assert first[-1] == Stopped(step=step)
        assert len(folders(first)) == len(set(folders(first))) == 1 + (step > 3)
        changes = {"adapter": adapter, "resume_from": tuple(folders(first))}
        second = told(train(make_run(10 + step, **changes), warm))
        assert second[0] == Started(step=step)
        assert second[-1] == whole[-1]
        assert metrics(first) + metrics(second) == metrics(whole)
        assert content(folders(second)[0]) == content(folders(whole)[0])


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_step_left_in_the_middle_is_as_if_it_had_not_begun(
    make_run: MakeSpec, warm: WarmBase, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Asked to stop between two parts of a step: on a slow machine its end can be minutes away."""
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", 64)  # two or more parts a step
    whole = told(train(make_run(0), warm))
    stop, begun, first = threading.Event(), False, []
    for word in train(make_run(step), warm, stop=stop):
        first.append(word)
        begun = begun or (isinstance(word, Working) and (word.section, word.step) == (Section.STEP, step))
        if begun and not stop.is_set():
            real = TunedModel.sums

            def sums(self: TunedModel, part: Sequence[TokenizedExample], run: Any = real) -> Any:
                stop.set()
                return run(self, part)

            monkeypatch.setattr(TunedModel, "sums", sums)
    monkeypatch.undo()
    monkeypatch.setitem(memory.MOST_TOKENS, "cpu", 64)
    assert first[-1] == Stopped(step=step - 1)
    assert [word.step for word in metrics(first)] == list(range(1, step))
    second = told(train(make_run(10, resume_from=tuple(folders(first))), warm))
    assert metrics(first) + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])


def test_a_run_stopped_after_every_step_ends_with_the_same_bytes(make_run: MakeSpec, warm: WarmBase) -> None:
    whole = told(train(make_run(0), warm))
    kept: list[str] = []
    seen: list[Metrics] = []
    for step in range(1, TOTAL + 1):
        words = run_until(make_run(step, resume_from=tuple(kept)), warm, step=step)
        seen += metrics(words)
        kept = folders(words)
    assert isinstance(words[-1], Finished)
    assert seen == metrics(whole)
    assert content(kept[0]) == content(folders(whole)[0])


def test_a_run_killed_between_checkpoints_trains_the_lost_steps_again_to_the_same_numbers(
    make_run: MakeSpec, warm: WarmBase
) -> None:
    whole = told(train(make_run(0), warm))
    words = train(make_run(1), warm)
    first = []
    while not (first and isinstance(first[-1], StepDone) and first[-1].metrics.step == 5):
        first.append(next(words))
    words.close()
    second = told(train(make_run(2, resume_from=tuple(folders(first))), warm))
    assert second[0] == Started(step=3)
    assert metrics(first)[:3] + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])


def test_a_run_from_a_tuned_adapter_resumes_as_well(
    make_run: MakeSpec, warm: WarmBase, tmp_path: Path
) -> None:
    start = folders(told(train(make_run(9, n_epochs=1, rank=2, target_modules=("q_proj",)), warm)))[0]
    whole = told(train(make_run(0, start_from_dir=start), warm))
    first = run_until(make_run(1, start_from_dir=start), warm, step=2)
    second = told(train(make_run(2, start_from_dir=start, resume_from=tuple(folders(first))), warm))
    assert metrics(first) + metrics(second) == metrics(whole)
    assert content(folders(second)[0]) == content(folders(whole)[0])


def test_the_base_is_as_it_was_after_a_resumed_run(make_run: MakeSpec, warm: WarmBase) -> None:
    whole = told(train(make_run(0), warm))
    first = run_until(make_run(1), warm, step=4)
    told(train(make_run(2, resume_from=tuple(folders(first))), warm))
    assert metrics(told(train(make_run(3), warm))) == metrics(whole)


def test_where_all_steps_are_done_the_run_is_finished_without_another_checkpoint(
    make_run: MakeSpec, warm: WarmBase
) -> None:
    whole = told(train(make_run(0), warm))
    again = told(train(make_run(1, resume_from=tuple(folders(whole))), warm))
    assert again == [Started(step=TOTAL), whole[-1]]


def test_a_stop_asked_for_with_the_last_step_is_too_late(make_run: MakeSpec, warm: WarmBase) -> None:
    words = run_until(make_run(0), warm, step=TOTAL)
    assert isinstance(words[-1], Finished)
    assert len(folders(words)) == 2


def test_a_stop_before_the_first_step_keeps_nothing_and_names_the_step_to_go_on_from(
    make_run: MakeSpec, warm: WarmBase
) -> None:
    stop = threading.Event()
    stop.set()
    assert told(train(make_run(0), warm, stop=stop)) == [Stopped(step=0)]
    kept = tuple(folders(told(train(make_run(1, n_epochs=1), warm))))
    assert told(train(make_run(2, resume_from=kept), warm, stop=stop)) == [Stopped(step=3)]


def test_time_and_tokens_go_on_counting(make_run: MakeSpec, warm: WarmBase) -> None:
    first = run_until(make_run(1), warm, step=4)
    second = told(train(make_run(2, resume_from=tuple(folders(first))), warm))
    before = [word for word in first if isinstance(word, StepDone)]
    after = [word for word in second if isinstance(word, StepDone)]
    assert before[-1].elapsed_s < after[0].elapsed_s < after[1].elapsed_s
    tokens = sum(word.tokens for word in before + after)
    assert after[-1].tokens_per_second == pytest.approx(tokens / after[-1].elapsed_s)


def damage(folder: str) -> None:
    file = Path(folder) / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make_run: MakeSpec, warm: WarmBase) -> None:
    whole = told(train(make_run(0), warm))
    first = run_until(make_run(1), warm, step=5)
    damage(folders(first)[0])
    second = told(train(make_run(2, resume_from=tuple(folders(first))), warm))
    warning, started, *_ = second
    assert isinstance(warning, Log)
    assert warning.level == "warn"
    assert warning.message == (
        "The checkpoint of step 5 cannot be used: adapter_model.safetensors has changed since it was written."
    )
    assert started == Started(step=3)
    assert content(folders(second)[0]) == content(folders(whole)[0])


def test_without_a_whole_checkpoint_the_run_begins_anew(make_run: MakeSpec, warm: WarmBase) -> None:
    whole = told(train(make_run(0), warm))
    first = run_until(make_run(1), warm, step=5)
    damage(folders(first)[0])
    shutil.rmtree(Path(folders(first)[1]) / TRAINING_STATE)
    verify(Path(folders(first)[1]))  # whole enough for chat
    second = told(train(make_run(2, resume_from=tuple(folders(first))), warm))
    said = [word.message for word in second if isinstance(word, Log)]
    assert [text.split(":")[0] for text in said[:2]] == [
        "The checkpoint of step 5 cannot be used",
        "The checkpoint of step 3 cannot be used",
    ]
    assert said[2] == "No checkpoint can be used; training starts from the beginning."
    assert second[3] == Started(step=0)
    assert content(folders(second)[0]) == content(folders(whole)[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed"),
        ({"n_epochs": 3}, "total_steps"),
        ({"batch_size": 3}, "batch_size, total_steps"),
        ({"max_length": 40}, "training_file, validation_file"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_used(
    make_run: MakeSpec, warm: WarmBase, change: dict[str, int], named: str
) -> None:
    first = run_until(make_run(1), warm, step=2)
    second = told(train(make_run(2, resume_from=tuple(folders(first)), **change), warm))
    said = [word.message for word in second if isinstance(word, Log)]
    assert f"The checkpoint of step 2 cannot be used: it was made with another {named}." in said
    assert Started(step=0) in second


def test_checkpoints_come_by_the_clock_too(make_run: MakeSpec, warm: WarmBase) -> None:
    words = told(train(make_run(0, checkpoint_every_s=1e-9), warm))
    assert len(folders(words)) == TOTAL
    assert len(folders(told(train(make_run(1, checkpoint_every_s=3600.0), warm)))) == 2


def test_the_state_holds_no_pickle_and_no_path(make_run: MakeSpec, warm: WarmBase, tmp_path: Path) -> None:
    folder = Path(folders(told(train(make_run(0), warm)))[0])
    state = folder / TRAINING_STATE
    names = sorted(path.name for path in state.iterdir())
    assert names == ["optimizer.safetensors", "progress.json", "random.safetensors"]
    assert json.loads((folder / PROGRESS).read_text())["progress"]["step"] == TOTAL
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in state.iterdir())
