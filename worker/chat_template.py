"""Turns conversations into token ids through a model's own chat template, for training and serving alike.

Two promises: text from users never becomes a control token, and the labels of an example are exactly what
its assistant would have had to write. Knows no files, no model and no device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]]

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # a Unicode plane without assigned characters
_PROBE: list[Message] = [{"role": "user", "content": "probe"}]
_PROBE_TOOL: Tools = [
    {
        "type": "function",
        "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
]
_PROBE_CALL = "probe_call"  # unlike the tool's name, which shows where tools are listed
_PROBE_CALLED: list[Message] = [
    *_PROBE,
    {  # Mistral's templates ask for ids of nine characters
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "probecall", "type": "function", "function": {"name": _PROBE_CALL, "arguments": {}}}
        ],
    },
]


class ChatTemplateError(ValueError):
    """A conversation the model's template cannot render. The text is shown to the user as it is."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A conversation as tokens. `is_label[t]` says whether the model is trained to produce `ids[t]`."""

    ids: list[int]
    is_label: list[bool]


class ChatTemplate:
    """The chat template of one tokenizer, or another one put in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is None and tokenizer.chat_template is None:
            raise ChatTemplateError("This model has no chat template.")
        self._tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        self._template = template
        self._guard = _Guard(tokenizer)
        self.supports_tools = self._find_supports_tools()
        self._shows_calls = self._find_shows_calls()

    def encode_prompt(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant's next message begins."""
        mark, messages, tools = self._guard.protect(normalize(messages), parse_tools(tools))
        text = self._render(messages, tools, generation_prompt=True)
        return [id for id, _, _ in self._encode(text, mark, cuts=())]

    def hides(self, message: Message) -> bool:
        """Whether it is an assistant's message to be trained of which the template shows nothing.

        That is one of tool calls alone, for a template that knows none.
        """
        return (
            not self._shows_calls
            and _is_trained(message)
            and bool(message.get("tool_calls"))
            and not _text(message.get("content"))
        )

    def encode_example(self, messages: list[Message], tools: Tools | None = None) -> TokenizedExample:
        """Token ids and labels of a whole conversation.

        Labels are the tokens of assistant messages whose `weight` is not 0, up to and including the token
        that ends the turn; never the header before them nor the line break some templates put after it.
        What the template hides has no labels: it would teach empty answers.
        """
        trained = [i for i, m in enumerate(messages) if _is_trained(m) and not self.hides(m)]
        mark, messages, tools = self._guard.protect(normalize(messages), parse_tools(tools))
        text = self._render(messages, tools)
        spans = [self._assistant_span(text, messages, tools, index) for index in trained]
        cuts = [edge for span in spans for edge in span]
        tokens = list(self._encode(text, mark, cuts=()))
        if any(start < cut < end for cut in cuts for _, start, end in tokens):
            # A token reaches over an edge; the server's prompt ends there, so training cuts there too.
            tokens = list(self._encode(text, mark, cuts=cuts))
        is_label = [any(a <= start and end <= b for a, b in spans) for _, start, end in tokens]
        return TokenizedExample([id for id, _, _ in tokens], is_label)

    def _assistant_span(
        self, text: str, messages: list[Message], tools: Tools | None, index: int
    ) -> tuple[int, int]:
        """Where message `index` stands in `text`, as (start, end) in characters, end of turn included.

        Found by comparing renders of growing prefixes, since few templates mark it themselves.
        """
        through = self._render(messages[: index + 1], tools)
        start = self._prompt_length(through, messages[:index], tools)
        if text[:start] != through[:start]:
            raise self._inconsistent(index)
        end_of_turn = self._guard.last_control(through[start:])
        if end_of_turn:  # users' text holds no control tokens any more, so the first one ends the turn
            at = text.find(end_of_turn, start)
            if at >= 0:
                return start, at + len(end_of_turn)
        elif text.startswith(through):
            return start, len(through)
        raise self._inconsistent(index)

    def _prompt_length(self, through: str, before: list[Message], tools: Tools | None) -> int:
        if before:
            prompt = self._render(before, tools, generation_prompt=True)
            if through.startswith(prompt):
                return len(prompt)
        else:  # templates refuse an empty conversation: look for the header they write elsewhere
            header = self._find_generation_prompt()
            at = through.find(header)
            if at >= 0:
                return at + len(header)
        raise self._inconsistent(len(before))

    def _inconsistent(self, index: int) -> ChatTemplateError:
        return ChatTemplateError(
            f"The model's chat template writes the text before message {index + 1} differently once that "
            "message is there, so its part cannot be told. Set its weight to 0 or split the example."
        )

    def _encode(
        self, text: str, mark: str, cuts: tuple[int, ...] | list[int]
    ) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token, in characters of `text`; marks vanish, nothing joins over them."""
        edges = {0, len(text), *cuts}
        edges |= {at + side for at in (found.start() for found in re.finditer(mark, text)) for side in (0, 1)}
        for start, end in pairwise(sorted(edges)):
            if text[start] == mark:
                continue
            encoding = self._backend.encode(text[start:end], add_special_tokens=False)
            for id, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
                yield id, start + left, start + right

    def _render(
        self, messages: list[Message], tools: Tools | None, *, generation_prompt: bool = False
    ) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=cast("list[Any] | None", tools),
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"The model's chat template refuses this conversation: {error}"
            ) from error
        return cast(str, text)

    def _find_generation_prompt(self) -> str:
        """What the template writes before an assistant's answer, such as `<|im_start|>assistant`."""
        without = self._render(_PROBE, None)
        return self._render(_PROBE, None, generation_prompt=True).removeprefix(without)

    def _find_supports_tools(self) -> bool:
        try:
            return self._render(_PROBE, _PROBE_TOOL) != self._render(_PROBE, None)
        except ChatTemplateError:
            return False

    def _find_shows_calls(self) -> bool:
        try:
            return _PROBE_CALL in self._render(_PROBE_CALLED, _PROBE_TOOL)
        except ChatTemplateError:
            return True  # one that refuses calls refuses the example itself, in words of its own


class _Guard:
    """Breaks up what would read as a control token in users' strings, with a character no string holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        # Single letters and pure white space (Gemma's "\n\n") are ordinary text, added or not.
        controls = sorted((text for text in added if len(text.strip()) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        self._beginnings = {text[:length] for text in controls for length in range(1, len(text))}
        self._longest = max(map(len, controls), default=0)
        self._normalizer = tokenizer.backend_tokenizer.normalizer

    def protect(
        self, messages: list[Message], tools: Tools | None
    ) -> tuple[str, list[Message], Tools | None]:
        """The mark chosen, and messages and tools in which it stands inside every control token."""
        used = set().union(*_strings([messages, tools]))
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise ChatTemplateError("The conversation holds every character of Unicode's private plane 15.")
        try:
            return mark, self._protect(messages, mark), self._protect(tools, mark)
        except RecursionError as error:
            raise ChatTemplateError("Tools or arguments of a tool call are nested too deeply.") from error

    def last_control(self, text: str) -> str | None:
        """The last control token written in `text`."""
        found = self._pattern.findall(text)
        return found[-1] if found else None

    def _protect(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._break(value, mark)
        if isinstance(value, list):
            return [self._protect(item, mark) for item in value]
        if isinstance(value, dict):
            return {self._break(key, mark): self._protect(item, mark) for key, item in value.items()}
        return value

    def _break(self, text: str, mark: str) -> str:
        """`text` with a mark inside every control token, and one after a tail that could begin one."""
        while self._pattern.search(text):  # once per level of tokens within tokens
            text = self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        if self._normalizer and self._pattern.search(self._normalizer.normalize_str(text)):
            text = mark.join(text)  # full-width letters and the like, which become one only inside
        could_begin = any(text[-length:] in self._beginnings for length in range(1, self._longest))
        return text + mark if could_begin else text


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's engine that adds nothing and reports whole offsets.

    Llama 3's post-processor trims white space out of offsets, which would hide tokens that cross an edge.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.encode_special_tokens = False
    backend.no_truncation()
    backend.no_padding()
    return backend


def normalize(messages: list[Message]) -> list[Message]:
    """OpenAI's messages as templates expect them: plain text, parsed arguments, known roles, no `weight`."""
    return [_normalize(message) for message in messages]


def parse_tools(tools: Tools | None) -> Tools | None:
    """None for an empty list: templates write a heading without tools below it."""
    return tools or None


def _normalize(message: Message) -> Message:
    role = "system" if message["role"] == "developer" else message["role"]
    plain: Message = {"role": role, "content": _text(message.get("content"))}
    plain |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [{**call, "function": _parse_call(call["function"])} for call in calls]
    return plain


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _parse_call(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (TypeError, ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value))
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
