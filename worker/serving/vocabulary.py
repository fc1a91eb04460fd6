"""The bytes of a model's tokens, as the grammar library knows them.

One table per model serves both log-probabilities, which show bytes, and grammars, which are matched on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llguidance import LLTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_vocabulary(tokenizer: PreTrainedTokenizerBase, *, size: int, end_ids: frozenset[int]) -> LLTokenizer:
    """The table of a fast tokenizer; takes half a second for 50,000 tokens, so make it once.

    `size`: logits of the model, which may have rows that no token uses. `end_ids` may come wherever a grammar
    is complete.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    known = backend.get_vocab_size(with_added_tokens=True)
    return LLTokenizer(backend.to_str(), n_vocab=max(size, known), eos_token=sorted(end_ids))
