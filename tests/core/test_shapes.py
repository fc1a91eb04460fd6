"""What is read of a model's folder without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.core.shapes import read_shape

CONFIG: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
}
TENSORS = {
    "model.embed_tokens.weight": [100, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.mlp.gate_proj.weight": [32, 8],
    "model.layers.0.input_layernorm.weight": [8],
}


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, size in tensors.items():
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes_come_from_the_configuration_and_the_headers(tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, CONFIG, TENSORS))
    assert shape is not None
    assert (shape.parameters, shape.linear_parameters) == (800 + 64 + 256 + 8, 64 + 256)
    assert (shape.heads, shape.key_heads, shape.head_size, shape.vocabulary) == (2, 1, 4, 100)
    assert shape.is_gated
    assert [one.name for one in shape.adapted(["q_proj"])] == ["model.layers.0.self_attn.q_proj"]
    assert len(shape.adapted(None)) == 2


def test_the_older_names_of_gpt2_and_a_text_part_are_known(tmp_path: Path) -> None:
    old = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    tensors = {"h.0.attn.c_attn.weight": [8, 24], "wte.weight": [100, 8]}
    shape = read_shape(write_model(tmp_path, {"text_config": old}, tensors))
    assert shape is not None
    assert (shape.hidden, shape.intermediate, shape.is_gated, shape.key_heads) == (8, 32, False, 2)


@pytest.mark.parametrize(
    "change",
    [{"num_experts": 8}, {"num_attention_heads": 0}, {"vocab_size": None}, {"hidden_size": "wide"}],
    ids=str,
)
def test_what_cannot_be_told_is_not_guessed(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read_shape(write_model(tmp_path, CONFIG | change, TENSORS)) is None


def test_a_folder_without_whole_weights_has_no_shape(tmp_path: Path) -> None:
    assert read_shape(tmp_path) is None
    write_model(tmp_path, CONFIG, {})
    assert read_shape(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert read_shape(tmp_path) is None
