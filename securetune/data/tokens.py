"""Tokenisation in which private text can never turn into a special token."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from securetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Span(NamedTuple):
    """A half-open range of characters."""

    start: int
    end: int

    def overlaps(self, other: "Span") -> bool:
        """Tell whether the two ranges share a character."""
        return self.start < other.end and other.start < self.end


class Tokens(NamedTuple):
    """Token ids with the characters each one stands for."""

    ids: list[int]
    spans: list[Span]

    def touching(self, spans: Sequence[Span]) -> tuple[bool, ...]:
        """Mark the tokens that carry at least one character of any of ``spans``."""
        return tuple(any(token.overlaps(span) for span in spans) for token in self.spans)


@dataclass(frozen=True)
class SafeTokenizer:
    """A fast tokenizer that treats special-token strings inside private text as plain text.

    Guarantees:
        A string such as ``<|im_end|>`` inside an untrusted span is tokenised as ordinary characters, also
        when the match only begins or ends there. Where untrusted text holds no such string, the ids are those
        of the tokenizer's own call on the whole string, without what it appends at the end. Only tokens
        declared as special are meant: added tokens that are ordinary words to the tokenizer, such as
        ``<think>`` of some models, stay.

    Attributes:
        tokenizer: A fast (Rust) tokenizer: offsets are needed.
    """

    tokenizer: "PreTrainedTokenizerBase"

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer {type(self.tokenizer).__name__} reports no character offsets, which are"
                " needed to tell the private text from the prompt around it. Use a model that has a"
                " tokenizer.json."
            )

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches every string the tokenizer would turn into a special token, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        strings = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        ordered = sorted((string for string in strings if string), key=lambda string: (-len(string), string))
        return re.compile("|".join(re.escape(string) for string in ordered)) if ordered else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that private text must never become; a token that only stands for unknown words may appear."""
        tokenizer = self.tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if tokenizer.unk_token_id not in others:
            added = {number for number in added if number != tokenizer.unk_token_id}
        return frozenset(added)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer puts before every text, such as a beginning-of-sequence token."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return list(whole[:start])
        raise ConfigError(
            "The tokenizer changes a text when it adds its special tokens, so prompts cannot be built from"
            " it."
        )

    def encode(self, string: str, untrusted: Sequence[Span] = (), *, add_prefix: bool = True) -> Tokens:
        """Tokenise a string of which some parts are private text.

        Args:
            string: Template and private text together.
            untrusted: The characters that come from private text.
            add_prefix: Whether to begin with :attr:`prefix_ids`.

        Returns:
            Ids and the characters each stands for; prefix tokens stand for none.
        """
        prefix = self.prefix_ids if add_prefix else []
        found = self._find_special(string, 0, len(string)) if untrusted else []
        if not any(span.overlaps(private) for span in found for private in untrusted):
            body = self._encode_plain(string, split_special_tokens=False)
        else:
            body = self._encode_around(string, untrusted)
        for token, span in zip(body.ids, body.spans, strict=True):
            if token in self.special_ids and any(span.overlaps(private) for private in untrusted):
                raise DataError("holds text that the tokenizer turns into a special token")
        return Tokens(prefix + body.ids, [Span(0, 0)] * len(prefix) + body.spans)

    def _encode_around(self, string: str, untrusted: Sequence[Span]) -> Tokens:
        # A match that begins before private text can hide one of the template's own, so each stretch of
        # template is searched alone. Tokenizers split at special tokens first, so pieces between them are
        # tokenised as in the whole.
        edges = [0, *(edge for span in sorted(untrusted) for edge in span), len(string)]
        template = zip(edges[::2], edges[1::2], strict=True)
        cuts = [cut for start, end in template for cut in self._find_special(string, start, end)]
        tokens = Tokens([], [])
        position = 0
        for cut in [*cuts, Span(len(string), len(string))]:
            for piece, split in ((Span(position, cut.start), True), (cut, False)):
                if piece.start < piece.end:
                    part = self._encode_plain(string[piece.start : piece.end], split_special_tokens=split)
                    tokens.ids.extend(part.ids)
                    tokens.spans.extend(Span(a + piece.start, b + piece.start) for a, b in part.spans)
            position = cut.end
        return tokens

    def _find_special(self, string: str, start: int, end: int) -> list[Span]:
        if self.special_pattern is None:
            return []
        return [Span(*match.span()) for match in self.special_pattern.finditer(string, start, end)]

    def _encode_plain(self, string: str, *, split_special_tokens: bool) -> Tokens:
        encoded = self.tokenizer(
            string,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return Tokens(list(encoded["input_ids"]), [Span(*span) for span in encoded["offset_mapping"]])
