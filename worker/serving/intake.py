"""Turns a request into a `Completion`: tokens counted, limits checked, choices opened.

What cannot be answered is refused here, before any work on the device. Knows the tokenizer, the chat
template and the model's context length.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from app.core.completions import CompletionRequest, Failed
from worker.chat_template import ChatTemplate, ChatTemplateError
from worker.serving.grammar import GrammarError, Grammars
from worker.serving.rendering import Refused, Renderer, invalid
from worker.serving.sequence import Completion, open_sequences
from worker.serving.text import Decoder
from worker.serving.vocabulary import make_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class Intake:
    """Prompts of one model.

    `end_ids`: tokens that end an answer. `context_length`: tokens of prompt and answer together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        *,
        chat_template: str | None,
        context_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._vocabulary: int = model.config.vocab_size
        self._renderer = Renderer(tokenizer, chat_template, vocabulary=self._vocabulary)
        self.end_ids = find_end_ids(tokenizer, model, self._renderer.template)
        self._tokens = make_vocabulary(tokenizer, size=self._vocabulary, end_ids=self.end_ids)
        self._grammars = Grammars(self._tokens)

    def prepare(self, request: CompletionRequest) -> None:
        """Do what takes long, in the caller's thread, so that `open` stalls no stream. Raises Refused."""
        if request.grammar is None:
            return
        try:
            self._grammars.compile(request.grammar)
        except GrammarError as error:
            _log.warning("grammar of request %s: %s", request.id, error)
            text = "The response format or the tools cannot be kept to by this model. Simplify the schema."
            raise Refused(Failed(status=400, code="invalid_json_schema", message=text)) from error

    def open(self, request: CompletionRequest) -> Completion:
        """The completion of `request`, all choices waiting. Raises Refused."""
        self._check_bias(request)
        prompt_ids = self._renderer.encode(request)
        limit = self._limit(request, len(prompt_ids))
        end_ids = frozenset() if request.sampling.ignore_eos else self.end_ids
        completion = Completion(request, prompt_ids, end_ids, limit)
        open_sequences(completion, cast(Decoder, self.tokenizer), tokens=self._tokens)
        if request.grammar is not None:
            for sequence in completion.sequences:
                sequence.constrain(self._grammars.start(request.grammar))
        return completion

    def _check_bias(self, request: CompletionRequest) -> None:
        for token_id in request.sampling.logit_bias:
            if not 0 <= token_id < self._vocabulary:
                text = f"Invalid 'logit_bias': this model has no token {token_id}; "
                raise invalid("logit_bias", text + f"its tokens are 0 to {self._vocabulary - 1}.")

    def _limit(self, request: CompletionRequest, prompt_tokens: int) -> int:
        """Tokens each choice may have: `max_tokens`, or what the context leaves."""
        asked = request.sampling.max_tokens
        if asked is not None and asked < 1:
            raise invalid("max_tokens", f"max_tokens is {asked}, but must be at least 1.")
        what = "messages" if request.prompt is None else "prompt"
        if prompt_tokens == 0:
            raise invalid(what, f"The {what} comes to no tokens at all; write something in it.")
        if prompt_tokens + (asked or 1) > self.context_length:
            raise Refused(self._too_long(prompt_tokens, asked, what=what))
        return asked if asked is not None else self.context_length - prompt_tokens

    def _too_long(self, prompt_tokens: int, asked: int | None, *, what: str) -> Failed:
        limit = f"This model's maximum context length is {self.context_length} tokens."
        if asked is None or prompt_tokens >= self.context_length:
            counted = f"However, your {what} resulted in {prompt_tokens} tokens."
            cure = f"Please reduce the length of the {what} to at most {self.context_length - 1} tokens."
        else:
            counted = (
                f"However, you requested {prompt_tokens + asked} tokens "
                f"({prompt_tokens} in the {what}, {asked} in the completion)."
            )
            cure = (
                f"Please reduce the length of the {what}, "
                f"or max_tokens to at most {self.context_length - prompt_tokens}."
            )
        message = f"{limit} {counted} {cure}"
        return Failed(status=400, code="context_length_exceeded", message=message, param=what)


def find_end_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, template: ChatTemplate
) -> frozenset[int]:
    """All tokens that end an answer: the model's, the tokenizer's, and the template's end of turn.

    Base models often name only `<|endoftext|>`, while the template (and so the training) ends a turn with
    another token.
    """
    sources = (model.generation_config, model.config, tokenizer)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    ids = {
        id for value in found if value is not None for id in (value if isinstance(value, list) else [value])
    }
    ids |= _end_of_turn_ids(tokenizer, template)
    return frozenset(ids)


def _end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> set[int]:
    """The control token that closes an assistant message, if the template writes one."""
    turn: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        example = template.encode_example(turn)
    except ChatTemplateError:
        return set()
    labels = [id for id, is_label in zip(example.ids, example.is_label, strict=True) if is_label]
    return set(labels[-1:]) & set(tokenizer.added_tokens_decoder)
