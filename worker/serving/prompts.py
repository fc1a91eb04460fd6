"""Prompts that are plain text or token ids, as the old completions give them: no chat, no template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """A prompt this model cannot read. The text is shown to the user as it is."""


class Prompts:
    """Tokens of plain prompts. Text that spells a control token stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = vocabulary
        self._start: int | None = tokenizer.bos_token_id

    def encode(self, prompt: str | tuple[int, ...]) -> list[int]:
        """Token ids; an empty prompt is the beginning of a document. Raises PromptError."""
        if isinstance(prompt, str):
            ids = list(self._backend.encode(prompt).ids)
        else:
            ids = list(prompt)
            wrong = next((id for id in ids if not 0 <= id < self._vocabulary), None)
            if wrong is not None:
                raise PromptError(
                    f"This model has no token {wrong}; its tokens are 0 to {self._vocabulary - 1}."
                )
        if ids or self._start is None:
            return ids
        return [self._start]
