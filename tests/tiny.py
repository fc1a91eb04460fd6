"""A tiny random Llama with its own tokenizer, built on the spot: seconds-long tests of training and chat.

It speaks ChatML as SmolLM2 does (default system message, no generation tags) and, unlike it, knows tools.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT_LENGTH = 512
KV_TOKEN_BYTES = 512  # keys and values of 2 heads of 16 numbers in 2 layers, float32
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<call>' + call['function']['name'] + ' ' + (call['function']['arguments'] | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CALLS = CHAT_TEMPLATE[
    CHAT_TEMPLATE.index("{% for call") : CHAT_TEMPLATE.index("{{ '<|im_end|>\n' }}{% endfor")
]
# Like SmolLM2's own: neither tools nor calls of them are shown.
TOOLLESS_TEMPLATE = CHAT_TEMPLATE.replace(_CALLS, "").replace("{% if tools %}", "{% if false %}")
_CORPUS = (
    "system user assistant tool You are a helpful assistant. What is the answer? The answer is yes.",
    '{"intent": "refund", "urgency": "high", "product": "kettle", "reply": "We are sorry to hear that."}',
    "Hello, where is my order? Thank you very much! I want my money back. 0123456789",
)


def build_tiny_model(dir: Path, *, seed: int = 0) -> Path:
    """Write a whole model folder (about 100,000 float32 weights, tied embeddings) into `dir`; return it."""
    dir.mkdir(parents=True, exist_ok=True)
    tokenizer = _tiny_tokenizer()
    tokenizer.save_pretrained(dir)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(dir)
    return dir


def write_examples(path: Path, count: int, *, answer: str = "The answer is yes.") -> Path:
    """Write `count` one-turn examples of unequal length in OpenAI's JSONL format."""
    lines = []
    for number in range(count):
        question = f"Where is my order {number}?" + " Thank you." * (number % 4)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
