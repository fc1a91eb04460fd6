"""Token ids of what a request asks: a conversation through the chat template, or a plain prompt.

Knows the tokenizer and the template, no model and no limits.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from app.core.completions import CompletionRequest, Failed
from worker.chat_template import ChatTemplate, ChatTemplateError
from worker.serving.prompts import PromptError, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class Refused(Exception):
    """The request cannot be answered; `failed` is what its sender is told."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class Renderer:
    """Requests as the model reads them. `vocabulary`: tokens the model knows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, vocabulary: int
    ) -> None:
        self.template = ChatTemplate(tokenizer, chat_template)
        self._prompts = Prompts(tokenizer, vocabulary=vocabulary)

    def encode(self, request: CompletionRequest) -> list[int]:
        """Raises Refused."""
        if request.prompt is not None:
            try:
                return self._prompts.encode(request.prompt)
            except PromptError as error:
                raise invalid("prompt", str(error)) from error
        try:
            return self.template.encode_prompt(request.messages, request.tools)
        except ChatTemplateError as error:
            raise invalid("messages", str(error)) from error
        except Exception as error:  # a template may fail in any way; the request is at fault, not the engine
            _log.warning("chat template failed: %s: %s", type(error).__name__, error)
            raise invalid("messages", "The model's chat template cannot render these messages.") from error


def invalid(param: str, message: str) -> Refused:
    """A value of the request that no model can do anything with."""
    return Refused(Failed(status=400, code="invalid_value", message=message, param=param))
