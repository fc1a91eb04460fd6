"""llama.cpp's server as a peer: converts the model and its adapters to GGUF, then serves.

Runs in its own environment: `serve_llama.py MODEL FOLDER PORT STREAMS ADAPTER…`. Only Llama's architecture;
base Q8_0, adapters fp16. What is in FOLDER already is not made again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from safetensors.numpy import load_file

THREADS = 2
CONTEXT = 1024  # tokens of each stream
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def main() -> None:
    """Convert, serve until ended."""
    model, folder, port, streams = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    base = folder / "base-Q8_0.gguf"
    if not base.exists():
        write_base(model, config, base)
    adapters = []
    for number, source in enumerate(map(Path, sys.argv[5:])):
        target = folder / f"a{number}.gguf"
        if not target.exists():
            write_adapter(source, config, target)
        adapters.append(target)
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_parallel, params.n_ctx = streams, streams * CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.port, params.fit_params, params.cache_ram_mib, params.n_threads_http = port, False, 0, 8
    # Scale 0: otherwise a request of the base applies all of them.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    server = xllamacpp.Server(params)
    while server:
        time.sleep(3600)


def write_base(model: Path, config: dict[str, Any], target: Path) -> None:
    """Weights in Q8_0, norms in fp32, tokenizer as GGUF has it."""
    writer = gguf.GGUFWriter(target, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_tokenizer(writer, model, config)
    for name, tensor in tensors(model).items():
        data = permuted(name, tensor, config)
        if data.ndim == 1:
            writer.add_tensor(renamed(name), data)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(renamed(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    finish(writer)


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE as tokenizer.json holds it."""
    data = json.loads((model / "tokenizer.json").read_text())
    tokens = dict(data["model"]["vocab"])
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    names = {id: text for text, id in (tokens | added).items()}
    count = config["vocab_size"]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names.get(id, f"[PAD{id}]") for id in range(count)])
    special = set(added.values())
    writer.add_token_types(
        [control if id in special else normal if id in names else unused for id in range(count)]
    )
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end = config["eos_token_id"]
    writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)
    template = model / "chat_template.jinja"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    writer.add_chat_template(template.read_text() if template.exists() else settings["chat_template"])


def write_adapter(source: Path, config: dict[str, Any], target: Path) -> None:
    """A PEFT folder as llama.cpp reads it."""
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = json.loads((source / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        layer, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        data = tensor if factor.startswith("A") else permuted(layer, tensor, config)
        suffix = "lora_a" if factor.startswith("A") else "lora_b"
        writer.add_tensor(f"{renamed(layer + '.weight')}.{suffix}", data.astype(np.float16))
    finish(writer)


def tensors(model: Path) -> dict[str, np.ndarray]:
    """All tensors of the folder in float32; bfloat16 is widened by hand, numpy has none."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(size))
            for name, entry in entries.items():
                if name == "__metadata__" or name == "lm_head.weight":
                    continue
                begin, end = entry["data_offsets"]
                stream.seek(8 + size + begin)
                raw = stream.read(end - begin)
                if entry["dtype"] == "BF16":
                    data = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
                else:
                    data = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
                found[name] = data.astype(np.float32).reshape(entry["shape"])
    return found


def permuted(name: str, data: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k from halves to pairs, as llama.cpp rotates them."""
    if ".q_proj" in name:
        heads = config["num_attention_heads"]
    elif ".k_proj" in name:
        heads = config["num_key_value_heads"]
    else:
        return data
    rows = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(data.shape))


def renamed(name: str) -> str:
    """transformers' name as GGUF's."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, number, layer = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{LAYERS[layer]}.weight"


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
