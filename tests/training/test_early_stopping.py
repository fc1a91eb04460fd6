"""A run may end before its last epoch, and is then its best epoch, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_examples
from tests.training.conftest import told
from tests.training.test_resume import content, folders, metrics, run_until
from worker.training.loop import train
from worker.training.model import WarmBase
from worker.training.words import Adapter, Failed, Finished, Log, TrainSpec

MakeSpec = Callable[..., TrainSpec]
EPOCH = 3  # steps: 11 examples by 4


@pytest.fixture
def make_run(make_spec: MakeSpec, tmp_path: Path) -> MakeSpec:
    """Five epochs that learn one answer, so that another becomes less likely with each."""
    unlike = write_examples(tmp_path / "unlike.jsonl", 20, answer="#@%&~^ QZXJVK #@%&~^ QZXJVK")

    def make(name: str, **changes: object) -> TrainSpec:
        fields: dict[str, object] = {
            "validation_file": str(unlike),
            "adapter": Adapter.FULL,
            "n_epochs": 5,
            "require_improvement": False,
            "output_dir": str(tmp_path / name),
        }
        return make_spec(**(fields | changes))

    return make


@pytest.mark.parametrize("patience", [1, 2])
def test_a_run_ends_when_its_validation_loss_has_not_fallen_for_so_many_epochs(
    make_run: MakeSpec, warm: WarmBase, patience: int
) -> None:
    words = told(train(make_run("whole", early_stopping_patience=patience), warm))
    losses = [told.full_valid_loss for told in metrics(words)][EPOCH - 1 :: EPOCH]
    assert losses[0] == min(losses)
    assert len(metrics(words)) == (1 + patience) * EPOCH
    last, said = words[-1], words[-2]
    assert isinstance(last, Finished)
    assert (last.step, last.steps, last.full_valid_loss) == (EPOCH, (1 + patience) * EPOCH, losses[0])
    whole = told(train(make_run("all", n_epochs=1 + patience), warm))[-1]
    assert isinstance(whole, Finished)
    assert last.trained_tokens == whole.trained_tokens
    assert isinstance(said, Log)
    assert f"ended after step {last.steps} of 15. The model is the checkpoint of step 3:" in said.message


def test_without_the_option_all_epochs_are_trained_and_the_last_is_the_model(
    make_run: MakeSpec, warm: WarmBase
) -> None:
    last = told(train(make_run("whole"), warm))[-1]
    assert isinstance(last, Finished)
    assert (last.step, last.steps) == (15, 15)


def test_where_all_epochs_were_trained_the_best_is_the_model_all_the_same(
    make_run: MakeSpec, warm: WarmBase
) -> None:
    last = told(train(make_run("whole", n_epochs=2, early_stopping_patience=2), warm))[-1]
    assert isinstance(last, Finished)
    assert (last.step, last.steps) == (EPOCH, 2 * EPOCH)


def test_a_run_whose_loss_keeps_falling_is_not_cut_short(
    make_run: MakeSpec, warm: WarmBase, tmp_path: Path
) -> None:
    like = str(write_examples(tmp_path / "like.jsonl", 5))
    words = told(
        train(make_run("w", validation_file=like, early_stopping_patience=1, learning_rate=1e-3), warm)
    )
    last = words[-1]
    assert isinstance(last, Finished)
    assert (last.step, last.steps) == (15, 15)
    assert not [word for word in words if isinstance(word, Log)]


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_a_run_that_was_interrupted_stops_where_the_whole_one_did(
    make_run: MakeSpec, warm: WarmBase, step: int
) -> None:
    """Also where the last step was done, and only the last words were never heard."""
    whole = told(train(make_run("whole", early_stopping_patience=1), warm))
    first = run_until(make_run("first", early_stopping_patience=1), warm, step=step)
    changes = {"early_stopping_patience": 1, "resume_from": tuple(folders(first))}
    second = told(train(make_run("second", **changes), warm))
    assert metrics(first) + metrics(second) == metrics(whole)
    assert second[-2:] == whole[-2:]
    if step < 2 * EPOCH:
        assert content(folders(second)[0]) == content(folders(whole)[0])


def test_the_best_epoch_has_to_beat_what_the_run_began_from(make_run: MakeSpec, warm: WarmBase) -> None:
    spec = make_run("worse", early_stopping_patience=1, require_improvement=True)
    words = told(train(spec, warm))
    failed = words[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "no_improvement"
    assert f"its loss is {metrics(words)[EPOCH - 1].full_valid_loss:.4f}," in failed.message
