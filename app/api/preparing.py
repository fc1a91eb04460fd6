"""From a conversation to a request that an engine can run: the model, its tools, the grammar, the bounds.

Knows no body of a request: chat completions and responses bring theirs in one shape.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from app.api.asking import Asked, check_work, expires_at
from app.api.calls import Said, with_calls
from app.api.context import Context
from app.api.formats import Offer, use_tools
from app.api.grammars import Schema, make_grammar
from app.core.completions import CompletionRequest, Sampling
from app.core.errors import InvalidRequest
from app.core.served_models import ServedModel, resolve


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is asked, checked as far as that goes without knowing the model. `format` None: any text."""

    id: str
    model: str
    messages: list[dict[str, Any]]
    sampling: Sampling
    offer: Offer
    format: Schema | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be done. `reads_calls`: tool calls are looked for in the answer."""

    model: ServedModel
    ask: CompletionRequest
    reads_calls: bool

    def words(self, asked: Asked) -> AsyncIterator[list[Said]]:
        """The words of the answer, with calls where they may be."""
        words: Any = asked.words()
        return with_calls(words, n=self.ask.sampling.n) if self.reads_calls else words


def prepare(context: Context, project_id: str, asked: Conversation) -> Prepared:
    """Find the model and refuse what it cannot do. Raises NotFound, InvalidRequest."""
    with context.sessions() as session:
        model = resolve(session, context.catalogue, project_id=project_id, name=asked.model)
    entry = context.catalogue.find(model.base_model)
    check_work(context.settings, asked.sampling, entry)
    use = use_tools(asked.offer, model=model.base_model, format=entry.tool_format if entry else None)
    grammar = make_grammar(asked.format, use.calls if use else None)
    if grammar and asked.sampling.ignore_eos:
        text = "'luthier.ignore_eos' cannot be kept to together with a response format or forced tool calls."
        raise InvalidRequest(text, code="invalid_value", param="luthier.ignore_eos")
    ask = CompletionRequest(
        id=asked.id,
        project_id=project_id,
        base_model=model.base_model,
        tuned=model.tuned,
        messages=asked.messages,
        tools=use.shown if use else None,
        sampling=asked.sampling,
        grammar=grammar,
        reply_to=context.replies.stream,
        expires_at=expires_at(context.settings),
    )
    return Prepared(model, ask, use is not None)
