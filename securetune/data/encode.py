"""Records to token ids: what the model reads, what an adversary may touch, what is learnt."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from securetune.data.chat import render_chat
from securetune.data.records import Record
from securetune.data.tokens import SafeTokenizer, Span, Tokens
from securetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnOverlong = Literal["error", "truncate", "drop"]

_logger = logging.getLogger(__name__)
_PLACEHOLDER = "{text}"
_LISTED_RECORDS = 5


@dataclass(frozen=True)
class Example:
    """One tokenised record of ``T`` tokens.

    Attributes:
        unit_id: The record's privacy unit.
        input_ids: ``T`` token ids, without padding.
        attack_mask: ``T`` flags, true for tokens that carry at least one character of the text to classify,
            of the prompt, or of a user's message.
        label: Index of the label to read at the last token; ``None`` for a record without one.
        supervised: ``T`` flags, true for tokens the model is trained to predict from those before. Never true
            for the first token; all false where ``label`` is learnt instead.
        is_truncated: Whether text was cut off to fit the length limit.
        user_id: The user it belongs to, where users are the privacy unit; then ``unit_id`` is the record's.
    """

    unit_id: str
    input_ids: tuple[int, ...]
    attack_mask: tuple[bool, ...]
    label: int | None
    supervised: tuple[bool, ...]
    is_truncated: bool = False
    user_id: str | None = None

    def __repr__(self) -> str:
        """Show id and length only: token ids are private text."""
        return f"Example(unit_id={self.unit_id[:12]!r}..., {len(self.input_ids)} tokens)"


def encode_records(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: Literal["classify", "generate"],
    max_length: int,
    prompt: str = "{text}\nLabel:",
    on_overlong: OnOverlong = "error",
) -> list[Example]:
    """Tokenise records for training or evaluation.

    Each example depends on its own record alone, so truncating and dropping leave the privacy unit intact.

    Guarantees:
        Private text never yields a special token. Messages of errors hold record numbers and lengths, no
        text.

    Args:
        records: Labelled texts for ``classify``; completions or chats for ``generate``.
        tokenizer: The base model's fast tokenizer.
        task: What the model learns: the label after the prompt, or the completion.
        max_length: Most tokens of an example, >= 2.
        prompt: For ``classify``: the text goes where ``{text}`` stands, exactly once.
        on_overlong: ``error``; ``truncate`` (``classify`` cuts the end of the text and keeps the template
            whole, ``generate`` cuts the end of the record); or ``drop`` the record.

    Returns:
        Examples in the order of ``records``; with ``drop``, without the overlong ones.

    Raises:
        ConfigError: If ``prompt`` or the tokenizer cannot serve the task.
        DataError: If records are too long, empty, or hold nothing to learn.
    """
    safe = SafeTokenizer(tokenizer)
    if task == "classify":
        head, tail = split_prompt(prompt)

        def encode(record: Record) -> _Encoded:
            if record.text is None:
                raise DataError("has no text; task classify needs text and label")
            return _encode_text(record.text, safe, head=head, tail=tail, max_length=max_length)
    else:

        def encode(record: Record) -> _Encoded:
            return _encode_generation(record, safe)

    return _encode_all(records, encode, task=task, max_length=max_length, on_overlong=on_overlong)


def encode_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    prompt: str = "{text}\nLabel:",
    on_overlong: OnOverlong = "error",
) -> list[Example]:
    """Tokenise texts without labels exactly as :func:`encode_records` does for ``classify``.

    Args:
        texts: Texts to classify.
        tokenizer: The base model's fast tokenizer.
        max_length: See :func:`encode_records`.
        prompt: See :func:`encode_records`.
        on_overlong: See :func:`encode_records`.

    Returns:
        Examples whose ``label`` is ``None``; their ``unit_id`` is that of no record.
    """
    records = [Record(unit_id="", text=text, number=number) for number, text in enumerate(texts, start=1)]
    return encode_records(
        records, tokenizer, task="classify", max_length=max_length, prompt=prompt, on_overlong=on_overlong
    )


def label_token_ids(
    tokenizer: "PreTrainedTokenizerBase", label_words: Sequence[str], *, prompt: str = "{text}\nLabel:"
) -> list[int]:
    """Find the single token each label word is, right after the prompt.

    Args:
        tokenizer: The base model's fast tokenizer.
        label_words: At least two words, such as ``" positive"``; a leading space usually belongs to the word.
        prompt: The prompt of the task; what it ends with decides how a word is tokenised.

    Returns:
        One token id per word, all different.

    Raises:
        ConfigError: If a word is not exactly one token there, or two words share one.
    """
    if len(label_words) < 2:
        raise ConfigError(f"label words: at least two are needed, got {len(label_words)}.")
    safe = SafeTokenizer(tokenizer)
    head, tail = split_prompt(prompt)
    filled = f"{head}text{tail}"
    before = safe.encode(filled).ids
    found: dict[int, str] = {}
    for word in label_words:
        ids = safe.encode(filled + word, [Span(len(filled), len(filled) + len(word))]).ids
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            shared = 0
            while shared < min(len(ids), len(before)) and ids[shared] == before[shared]:
                shared += 1
            pieces = tokenizer.convert_ids_to_tokens(ids[shared:])
            raise ConfigError(
                f"label word {word!r} is not one token after the prompt: it becomes {pieces}. Each label word"
                " must be a single token and must leave the prompt's own tokens as they are; choose another"
                " word in data.label_words, with or without a leading space."
            )
        token = ids[-1]
        if token in found:
            raise ConfigError(
                f"label words {found[token]!r} and {word!r} are the same token ({token}). Choose different"
                " words in data.label_words."
            )
        found[token] = word
    return list(found)


def split_prompt(prompt: str) -> tuple[str, str]:
    """Split a classification prompt at its ``{text}``.

    Args:
        prompt: A template that holds ``{text}`` exactly once; other braces are ordinary characters.

    Returns:
        What comes before the text and what comes after.

    Raises:
        ConfigError: If ``{text}`` does not appear exactly once, or nothing comes after it.
    """
    if prompt.count(_PLACEHOLDER) != 1:
        raise ConfigError(
            f"data.prompt must hold {_PLACEHOLDER} exactly once, got {prompt.count(_PLACEHOLDER)} times in"
            f" {prompt!r}."
        )
    head, _, tail = prompt.partition(_PLACEHOLDER)
    if not tail:
        raise ConfigError(
            f"data.prompt ends with {_PLACEHOLDER}, got {prompt!r}: the label is read after the prompt, so"
            " the text must be followed by a cue, such as '\\nLabel:'."
        )
    return head, tail


class _Encoded(NamedTuple):
    """One record before the length limit; ``shorten(n)`` gives it again with at most ``n`` tokens."""

    tokens: Tokens
    attack_mask: tuple[bool, ...]
    supervised: tuple[bool, ...]
    shorten: "Callable[[int], _Encoded | None]"


def _encode_text(text: str, safe: SafeTokenizer, *, head: str, tail: str, max_length: int) -> _Encoded:
    if not text.strip():
        raise DataError("has an empty text")

    def encode(shown: str) -> _Encoded:
        span = Span(len(head), len(head) + len(shown))
        tokens = safe.encode(head + shown + tail, [span])
        return _Encoded(tokens, tokens.touching([span]), (False,) * len(tokens.ids), shorten)

    def shorten(limit: int) -> _Encoded | None:
        # Cut characters, not ids, so that the result is the tokenisation of a real string. Cutting may merge
        # or split a token at the edge, hence the loop; each round removes at least one character.
        shown, encoded = text, encode(text)
        while len(encoded.tokens.ids) > limit:
            excess = len(encoded.tokens.ids) - limit
            marked = [
                span for span, mark in zip(encoded.tokens.spans, encoded.attack_mask, strict=True) if mark
            ]
            if len(marked) <= excess:
                return None
            shown = shown[: min(marked[-excess].start - len(head), len(shown) - 1)]
            if not shown.strip():
                return None
            encoded = encode(shown)
        return encoded

    return encode(text)


def _encode_generation(record: Record, safe: SafeTokenizer) -> _Encoded:
    if record.messages is not None:
        chat = render_chat(record.messages, safe.tokenizer)
        tokens = safe.encode(chat.string, chat.untrusted, add_prefix=False)
        attack_mask = tokens.touching(chat.user)
        supervised = tuple(
            any(s.start <= token.start < s.end for s in chat.assistant) for token in tokens.spans
        )
    elif record.prompt is not None and record.completion is not None:
        if not record.completion:
            raise DataError("has an empty completion")
        tokens, num_prompt = _join_completion(record.prompt, record.completion, safe)
        attack_mask = (*tokens.touching([Span(0, len(record.prompt))])[:num_prompt],)
        attack_mask += (False,) * (len(tokens.ids) - num_prompt)
        supervised = (False,) * num_prompt + (True,) * (len(tokens.ids) - num_prompt)
    else:
        raise DataError(
            "has neither completion nor messages; task generate needs prompt and completion, or messages"
        )

    def cut(limit: int) -> _Encoded:
        return _Encoded(
            Tokens(tokens.ids[:limit], tokens.spans[:limit]), attack_mask[:limit], supervised[:limit], cut
        )

    # nothing comes before the first token, so it cannot be predicted
    supervised = (False, *supervised[1:])
    return cut(len(tokens.ids))


def _join_completion(prompt: str, completion: str, safe: SafeTokenizer) -> tuple[Tokens, int]:
    eos = safe.tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where a completion"
            " ends. Set eos_token in its tokenizer_config.json."
        )
    whole_span = Span(0, len(prompt) + len(completion))
    before = safe.encode(prompt, [Span(0, len(prompt))])
    whole = safe.encode(prompt + completion, [whole_span])
    if whole.ids[: len(before.ids)] != before.ids:
        # A token spans the border. At inference the prompt is tokenised alone, so train on that.
        after = safe.encode(completion, [Span(0, len(completion))], add_prefix=False)
        shifted = [Span(start + len(prompt), end + len(prompt)) for start, end in after.spans]
        whole = Tokens(before.ids + after.ids, before.spans + shifted)
    ended = Tokens([*whole.ids, eos], [*whole.spans, Span(whole_span.end, whole_span.end)])
    return ended, len(before.ids)


def _encode_all(
    records: Sequence[Record],
    encode: Callable[[Record], _Encoded],
    *,
    task: str,
    max_length: int,
    on_overlong: OnOverlong,
) -> list[Example]:
    if max_length < 2:
        raise ConfigError(f"data.max_length must be >= 2, got {max_length}.")
    examples: list[Example] = []
    overlong: list[str] = []
    problems: list[str] = []
    num_truncated = 0
    for position, record in enumerate(records, start=1):
        name = f"record {record.number or position}"
        try:
            encoded = encode(record)
        except DataError as error:
            problems.append(f"{name} {error}")
            continue
        length = len(encoded.tokens.ids)
        is_truncated = length > max_length and on_overlong == "truncate"
        if is_truncated:
            shortened = encoded.shorten(max_length)
            if shortened is None:
                problems.append(
                    f"{name} has {length} tokens, and its prompt template leaves no room for text"
                )
                continue
            encoded = shortened
            num_truncated += 1
        elif length > max_length:
            overlong.append(f"{name} has {length} tokens")
            continue
        if task == "generate" and not any(encoded.supervised):
            problems.append(
                f"{name} has no supervised token"
                + (" left after truncation" if is_truncated else ": there is no assistant message to learn")
            )
            continue
        examples.append(
            Example(
                unit_id=record.unit_id,
                input_ids=tuple(encoded.tokens.ids),
                attack_mask=encoded.attack_mask,
                label=record.label,
                supervised=encoded.supervised,
                is_truncated=is_truncated,
                user_id=record.user_id,
            )
        )
    if problems:
        raise DataError(f"{len(problems)} records cannot be used: {_some(problems)}. Correct or remove them.")
    if overlong and on_overlong == "error":
        raise DataError(
            f"{len(overlong)} of {len(records)} records are over data.max_length = {max_length} tokens:"
            f" {_some(overlong)}. Raise data.max_length, or set data.on_overlong to 'truncate' or 'drop'."
        )
    if overlong:
        _logger.warning("Dropped %d of %d records over %d tokens.", len(overlong), len(records), max_length)
    if num_truncated:
        _logger.warning("Truncated %d of %d records to %d tokens.", num_truncated, len(records), max_length)
    return examples


def _some(items: Sequence[str]) -> str:
    more = len(items) - _LISTED_RECORDS
    return "; ".join(items[:_LISTED_RECORDS]) + (f"; and {more} more" if more > 0 else "")
