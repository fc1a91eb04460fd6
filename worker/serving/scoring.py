"""What the engine makes of answers that are known already: so that a trainer can be held against it.

Puts the engine's own layers, cache and attention over a model that somebody else has in memory, scores, and
takes them off again. Knows nothing of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from app.core.completions import CompletionRequest
from worker.serving.adapter_files import ModelUnavailable, read_adapter
from worker.serving.adapters import BASE, Layers
from worker.serving.attention import use_row_attention
from worker.serving.batch import refuse_special_attention
from worker.serving.cache import SlotCache
from worker.serving.forward import forward
from worker.serving.intake import find_end_ids
from worker.serving.rendering import Refused, Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PART = 64  # prompt tokens of one pass; a long prompt is always computed in parts here
TOGETHER = 8  # answer tokens computed one at a time, all rows side by side; the rest comes in one pass
_TUNED = "tuned"


class AnswerScorer:
    """The engine's view of one model. Raises ValueError, also later, where the engine could not serve it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
    ) -> None:
        refuse_special_attention(model)
        self._model = model
        self._renderer = Renderer(tokenizer, chat_template, vocabulary=model.config.vocab_size)
        self._end_ids = find_end_ids(tokenizer, model, self._renderer.template)

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """The prompt of a request with these messages."""
        request = CompletionRequest(
            id="", project_id="", base_model="", messages=messages, tools=tools, reply_to="", expires_at=0.0
        )
        try:
            return self._renderer.encode(request)
        except Refused as refused:
            raise ValueError(str(refused)) from refused

    def ends_answer(self, token_id: int) -> bool:
        """Whether an answer stops at this token."""
        return token_id in self._end_ids

    def log_probabilities(
        self, adapter_dir: Path | None, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[list[float]]:
        """log p of each answer token in nats, for rows of (prompt ids, answer ids), under a PEFT folder.

        None: the model is scored as it is. It has its own layers back afterwards.
        """
        layers = Layers(self._model, max_slots=1)
        with _served(self._model, layers), torch.no_grad():
            if adapter_dir is not None:
                try:
                    adapter = read_adapter(adapter_dir, sizes=layers.sizes, like=layers.like)
                except ModelUnavailable as error:
                    raise ValueError(str(error)) from error
                layers.place(_TUNED, adapter, in_use=Counter())
            return self._score(layers, BASE if adapter_dir is None else _TUNED, rows)

    def _score(
        self, layers: Layers, name: str, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[list[float]]:
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        cache = SlotCache(
            self._model.config.num_hidden_layers,
            max_rows=len(rows),
            max_tokens=len(rows) * longest,
            device=self._model.device,
        )
        cache.reserve(len(rows), longest)
        found: list[list[float]] = []

        def run(ids: list[list[int]], first: int, keep: int = 1) -> Tensor:
            layers.route([name] * len(ids), one_token=len(ids[0]) == 1)
            return forward(self._model, cache, ids, first=first, keep=keep)

        for row, (prompt, answer) in enumerate(rows):
            cache.add_row()
            for start in range(0, len(prompt), PART):
                logits_BKV = run([prompt[start : start + PART]], row)
            found.append(_log_p(logits_BKV[0], answer[:1]))
        together = min(TOGETHER, min(len(answer) for _, answer in rows) - 1)
        for at in range(together):
            logits_BKV = run([[answer[at]] for _, answer in rows], 0)
            for row, (_, answer) in enumerate(rows):
                found[row] += _log_p(logits_BKV[row], answer[at + 1 : at + 2])
        for row, (_, answer) in enumerate(rows):
            rest = answer[together:-1]
            if rest:
                found[row] += _log_p(run([rest], row, len(rest))[0], answer[together + 1 :])
        return found


@contextmanager
def _served(model: PreTrainedModel, layers: Layers) -> Iterator[None]:
    before: str = model.config._attn_implementation
    use_row_attention(model)
    try:
        yield
    finally:
        layers.unwrap()
        model.set_attn_implementation(before)


def _log_p(logits_KV: Tensor, ids: list[int]) -> list[float]:
    ids_K1 = torch.tensor(ids, device=logits_KV.device)[:, None]
    found: list[float] = logits_KV.float().log_softmax(-1).gather(1, ids_K1)[:, 0].tolist()
    return found
