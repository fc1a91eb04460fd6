"""Loads base models and their tokenizers from a folder, and chooses device and number type.

Knows no names, catalogues or downloads, and nothing of adapters. Only safetensors are read and no code
of a model's folder is ever run.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from worker.cgroup import memory_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Set before anything loads bitsandbytes, which on CPUs with AVX512-BF16 warns at import of a downloadable
# kernel it did not find. That kernel wants repacked NF4 weights, which `load_base_model` rules out.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    On a CPU without bf16 units a bf16 product is emulated and about 7 times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16_units() else torch.float32


def memory_of(device: torch.device) -> int | None:
    """Bytes of the device's own memory; of a CPU what the machine has or the control group allows."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [memory_limit("self")]
    with suppress(OSError, ValueError):  # names that this system does not know
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def load_tokenizer(dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from local files only."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(dir, local_files_only=True, trust_remote_code=False)


def load_base_model(
    dir: str | Path, *, quantize_4bit: bool, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of a folder, frozen in evaluation mode, on `device`.

    `quantize_4bit` stores the linear layers of the blocks as NF4 with double quantization (Dettmers et
    al. 2023, "QLoRA", section 3) and multiplies in `dtype`; `dtype` None means `compute_dtype(device)`.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or compute_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(
        dir,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
        dtype=dtype,
        device_map={"": device},
        quantization_config=_nf4(dtype) if quantize_4bit else None,
    )
    model.requires_grad_(False)
    for module in model.modules():
        # Else bitsandbytes 0.50 repacks NF4 weights in place at the first evaluation on CPUs with
        # AVX512-BF16: scales rounded to bfloat16, and no gradient from then on, also back in training mode.
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return cast("PreTrainedModel", model.train(False))


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig  # its constructor carries no types
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _cpu_has_bf16_units() -> bool:
    """True on CPUs with AVX512-BF16 or AMX-BF16; ARM is left at float32, which is fast there."""
    find = getattr(torch.cpu, "get_capabilities", None)  # torch 2.13; elsewhere float32 is always right
    capabilities = find() if find else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
