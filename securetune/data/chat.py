"""Chats rendered through the tokenizer's own template, with every character's origin known."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from securetune.data.records import Message
from securetune.data.tokens import Span
from securetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# private-use characters: no template mentions them
_MARK_OPEN, _MARK_CLOSE = "\ue000", "\ue001"
_REWRITTEN = "cannot be rendered: the chat template rewrites the text of a message"


class RenderedChat(NamedTuple):
    """A chat as one string.

    Attributes:
        string: What the model reads.
        untrusted: Characters that come from the messages rather than from the template.
        user: Characters of the user's messages.
        assistant: Characters the model must learn to write: each assistant message and the end of its turn.
    """

    string: str
    untrusted: list[Span]
    user: list[Span]
    assistant: list[Span]


def render_chat(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> RenderedChat:
    """Render a chat and find in it what each message became.

    The chat is rendered twice: as it is, and with a mark in place of each message. What stands between the
    marks is the template's, so the text of a message cannot pass for a part of the template. The assistant's
    turns begin where the template's generation prompt ends.

    Args:
        messages: At least one message.
        tokenizer: A tokenizer with a chat template.

    Returns:
        The string and the origin of its characters.

    Raises:
        ConfigError: If the tokenizer has no chat template.
        DataError: If the template refuses this chat, or rewrites it so that its parts cannot be told apart.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "The data are chats, but the model's tokenizer has no chat template. Use an instruction-tuned"
            " model, or give the data as prompt and completion."
        )
    if messages[0].role == "assistant":
        raise DataError(
            "begins with an assistant message, so nothing says what it answers. Begin with a user message"
        )
    marks = [f"{_MARK_OPEN}{index}{_MARK_CLOSE}" for index in range(len(messages))]
    marked = [Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)]
    string = _render(messages, tokenizer)
    skeleton = _render(marked, tokenizer)
    template_parts: list[str] = []
    rest = skeleton
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise DataError("cannot be rendered: the chat template leaves out or repeats a message")
        template_parts.append(before)
    template_parts.append(rest)

    spans: list[Span] = []
    position = 0
    for index, message in enumerate(messages):
        before, after = template_parts[index : index + 2]
        position += len(before)
        # many templates trim a message
        candidates = (message.content, message.content.strip())
        shown = next((text for text in candidates if string.startswith(text + after, position)), None)
        if shown is None:
            raise DataError(_REWRITTEN)
        spans.append(Span(position, position + len(shown)))
        position += len(shown)
    if not string.startswith(template_parts[0]) or position + len(template_parts[-1]) != len(string):
        raise DataError(_REWRITTEN)

    assistant: list[Span] = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        opening = _render(marked[:index], tokenizer, add_generation_prompt=True)
        through = _render(marked[: index + 1], tokenizer)
        before_mark = skeleton.index(marks[index])
        if not skeleton.startswith(opening) or not skeleton.startswith(through) or len(opening) > before_mark:
            raise DataError(
                "cannot be rendered: the chat template writes an assistant message differently when more"
                " follows, so the tokens to learn cannot be told apart. Split the chat into prompt and"
                " completion, or use a template that only appends"
            )
        start = spans[index].start - (before_mark - len(opening))
        closing = through[before_mark + len(marks[index]) :]
        assistant.append(Span(start, spans[index].end + len(_end_of_turn(closing, tokenizer))))
    user = [span for span, message in zip(spans, messages, strict=True) if message.role == "user"]
    return RenderedChat(string, spans, user, assistant)


def _end_of_turn(closing: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Leave out white space behind the token that ends a turn: generation stops before it."""
    shown = closing.rstrip()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return shown if any(shown.endswith(string) for string in special) else closing


def _render(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, IndexError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages) or "none"
        # the template's own message may quote the chat, so it is not repeated
        raise DataError(f"is refused by the chat template (roles: {roles})") from error
    if not isinstance(rendered, str):
        raise DataError("cannot be rendered: the chat template did not give a string")
    return rendered
