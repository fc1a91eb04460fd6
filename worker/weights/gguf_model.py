"""A GGUF file turned into a folder of safetensors, tokenizer and configuration.

fp32 on disk: 4-bit blocks are `scale * q + minimum` with fp16 scales, which only fp32 holds exactly, and
a CPU worker maps the file straight into memory, shared by every process that serves it. Knows no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def convert_gguf(gguf: Path, target: Path, *, context_length: int) -> None:
    """Write the model of `gguf` into the empty folder `target`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    _write_tokenizer(gguf, target, context_length=context_length)
    # The weights are plain by now; what says otherwise would make every load quantize them again.
    config = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != tied}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _drop_local_name(target / "config.json")


def _write_tokenizer(gguf: Path, target: Path, *, context_length: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if _read_text(gguf, "tokenizer.ggml.pre") == "smollm":
        # transformers ignores this field and takes GPT-2's splitting, which joins a blank to the digit
        # behind it. SmolLM splits every digit off first (llama.cpp, llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(target)


def _read_text(gguf: Path, key: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(key)
    return None if field is None else str(field.contents())


def _drop_local_name(config: Path) -> None:
    """Take out the name of the file it came from: it is neither a path nor a repository."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
