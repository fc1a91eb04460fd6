"""A GGUF file turned into a folder of safetensors, tokenizer and configuration.

fp32 on disk: 4-bit blocks are `scale * q + minimum` with fp16 scales, which only fp32 holds exactly, and
a CPU worker maps the file straight into memory, shared by every process that serves it. Knows no network.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

_TEXT, _ARRAY = 8, 9  # kinds of values in a GGUF header; the others have a fixed size in bytes
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def convert_gguf(gguf: Path, target: Path, *, context_length: int) -> None:
    """Write the model of `gguf` into the empty folder `target`."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):  # a progress bar that no switch of transformers turns off
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _write_tokenizer(gguf, target, context_length=context_length)
    # The weights are plain by now; what says otherwise would make every load quantize them again.
    config = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != tied}
    try:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # it hides the system's error in a text
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    _drop_local_name(target / "config.json")


def _write_tokenizer(gguf: Path, target: Path, *, context_length: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if read_gguf_text(gguf, "tokenizer.ggml.pre") == "smollm":
        # transformers ignores this field and takes GPT-2's splitting, which joins a blank to the digit
        # behind it. SmolLM splits every digit off first
        # (llama.cpp, llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(target)


def read_gguf_text(gguf: Path, key: str) -> str | None:
    """A text value of the file's header, or None where there is none.

    Stops at the key: the gguf package takes seconds to build all 49,152 tokens first.
    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with gguf.open("rb") as file:
        file.seek(16)  # magic, version, number of tensors
        (count,) = struct.unpack("<Q", file.read(8))
        for _ in range(count):
            name = _read_string(file)
            (kind,) = struct.unpack("<I", file.read(4))
            value = _read_value(file, kind)
            if name == key:
                return value if isinstance(value, str) else None
    return None


def _read_string(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", file.read(8))
    return file.read(size).decode("utf-8", "replace")


def _read_value(file: BinaryIO, kind: int) -> str | None:
    """A text, or None for everything else, which is skipped."""
    if kind == _TEXT:
        return _read_string(file)
    if kind != _ARRAY:
        file.seek(_SIZES[kind], 1)
        return None
    inner, length = struct.unpack("<IQ", file.read(12))
    if inner == _TEXT:
        for _ in range(length):
            _read_string(file)
    else:
        file.seek(_SIZES[inner] * length, 1)
    return None


def _drop_local_name(config: Path) -> None:
    """Take out the name of the file it came from: it is neither a path nor a repository."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
