"""A black-box attack that misspells words: it sees the model's scores for whole texts and nothing else.

Typing errors inside a word are the everyday case of adversarial text. The four edits are those of Pruthi et
al. 2019 (https://arxiv.org/abs/1905.11268), whose readers still recognise the words: swap, drop, add or
mistype an inner letter, at most one edit per word. The search spends the whole edit budget at once on
random words, then exchanges one edit at a time for a better one. Measured on SmolLM2-135M with movie
snippets (19 words each, 25 queries, 3 edits, 99 texts) it broke 63 texts with 15 queries on average;
ranking words by deleting them first, as TextFooler does, broke 56 with 21: in a short text the ranking
takes most of the budget.
"""

import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from securetune.adversarial.margins import label_margins

MIN_WORD_LENGTH = 4  # shorter words are function words, or an edit makes another word of them ("bad", "had")
_ROUND = 4  # queries per text between two looks at the answers: fewer waste less, more fill the batches
_TRIES = 4  # proposals per query, as some repeat what was asked before

_WORD = re.compile(rf"[^\W\d_]{{{MIN_WORD_LENGTH},}}")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEYBOARD = {
    letter: "".join(
        other
        for near in _ROWS[max(0, row - 1) : row + 2]
        for place, other in enumerate(near)
        if other != letter and abs(place - column) <= 1
    )
    for row, letters in enumerate(_ROWS)
    for column, letter in enumerate(letters)
}

Predict = Callable[[list[str]], Tensor | NDArray[np.floating]]
Edits = dict[int, str]  # index of a word in the text -> its misspelling
_Search = Generator[list[Edits], list[float], None]  # yields variants to ask about, receives their margins


class CharacterResult(NamedTuple):
    """The outcome of the attack on one text.

    Attributes:
        text: The text with the lowest margin found; the original if no edit lowered it.
        success: The model errs on ``text``; asked again at the end, so it holds for the string itself.
        queries: Times the model was asked about this text, the first and the last included.
        edits: Edited characters in ``text``; 0 with ``success`` means that the model erred already.
        error: The attack failed and the model gave a non-finite score for this text or one of its variants,
            so nothing is known about its robustness.
    """

    text: str
    success: bool
    queries: int
    edits: int
    error: bool


def character_attack(
    texts: Sequence[str],
    labels: Sequence[int],
    predict: Predict,
    *,
    max_edits: int,
    max_queries: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[CharacterResult]:
    """Misspell words of each text until the model errs or the budget is spent.

    All candidates of all texts still standing go to ``predict`` in one call per round.

    Guarantees:
        The result for a text depends on the text, its label, ``seed`` and the model's answers for its
        variants, not on the other texts. At most ``max_queries`` queries per text. ``text`` differs from
        the original by at most ``max_edits`` edits of one character (swapping two neighbours is one edit),
        at most one per word, never in a word's first or last letter. A success is one that ``predict``
        repeats on the final string.

    Args:
        texts: The texts to attack.
        labels: The right label of each text.
        predict: Maps texts to scores ``[N, C]``; higher means more likely. Needs no gradient.
        max_edits: Budget per text >= 1, in edited characters.
        max_queries: Budget per text >= 3: the original, at least one variant, and the check at the end.
        seed: Seed of the attack's own randomness; no global generator is used.
        progress: Called with the number of finished texts and the number of texts after each round.

    Returns:
        One result per text, in order.

    Raises:
        ValueError: If an argument is outside its range, or ``predict`` returns another shape.
    """
    if len(texts) != len(labels):
        raise ValueError(f"texts and labels must have the same length, got {len(texts)} and {len(labels)}.")
    if max_edits < 1:
        raise ValueError(f"max_edits must be >= 1, got {max_edits}.")
    if max_queries < 3:
        raise ValueError(f"max_queries must be >= 3, got {max_queries}.")
    attempts = [
        _Attempt(text, label, seed=seed, max_edits=max_edits, max_queries=max_queries - 1)
        for text, label in zip(texts, labels, strict=True)
    ]
    while active := [attempt for attempt in attempts if attempt.pending]:
        questions = [(text, attempt.label) for attempt in active for text in attempt.pending]
        answers = iter(_ask(questions, predict))
        for attempt in active:
            attempt.advance(list(itertools.islice(answers, len(attempt.pending))))
        if progress is not None:
            progress(sum(not attempt.pending for attempt in attempts), len(attempts))
    broken = [attempt for attempt in attempts if attempt.margin <= 0]
    confirmations = iter(_ask([(attempt.text, attempt.label) for attempt in broken], predict))
    return [
        attempt.result(confirmation=next(confirmations) if attempt.margin <= 0 else None)
        for attempt in attempts
    ]


class _Attempt:
    """One text under attack: what to ask next, and the best variant so far."""

    def __init__(self, text: str, label: int, *, seed: int, max_edits: int, max_queries: int) -> None:
        self.label = label
        self.text = text
        self.margin = math.inf
        self._original = text
        self._words = list(_WORD.finditer(text))
        self._edits: Edits = {}
        self._queries = 0
        self._saw_non_finite = False
        key = hashlib.blake2b(
            f"{seed}:{label}:{text}".encode(), digest_size=16, person=b"st.characters"
        ).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        words = [match.group() for match in self._words]
        self._search = _search(words, generator, max_edits=max_edits, max_queries=max_queries)
        self._candidates = next(self._search)
        self.pending = [text]

    def advance(self, margins: list[float]) -> None:
        """Take the margins of ``pending`` and choose what to ask next."""
        self._queries += len(margins)
        for edits, text, margin in zip(self._candidates, self.pending, margins, strict=True):
            self._saw_non_finite |= not math.isfinite(margin)
            if margin < self.margin:
                self.margin, self.text, self._edits = margin, text, edits
        self._candidates = []
        if self.margin > 0:
            # a variant without a finite score must not look attractive to the search
            finite = [margin if math.isfinite(margin) else math.inf for margin in margins]
            with contextlib.suppress(StopIteration):
                self._candidates = self._search.send(finite)
        self.pending = [_render(self._original, self._words, edits) for edits in self._candidates]

    def result(self, confirmation: float | None) -> CharacterResult:
        """Close the attempt; ``confirmation`` is the margin of ``text`` when it was asked about once more."""
        success = confirmation is not None and confirmation <= 0
        return CharacterResult(
            text=self.text,
            success=success,
            queries=self._queries + (confirmation is not None),
            edits=len(self._edits),
            error=self._saw_non_finite and not success,
        )


def _search(words: list[str], generator: np.random.Generator, *, max_edits: int, max_queries: int) -> _Search:
    """Yield sets of misspellings to ask about, none of them twice; the first is the text as it is."""
    (best_margin,) = yield [{}]
    best = Edits()
    queries = max_queries - 1
    asked: set[frozenset[tuple[int, str]]] = set()
    while queries > 0 and words:
        asking: list[Edits] = []
        for _ in range(_TRIES * _ROUND):
            edits = _propose(best, words, generator, max_edits)
            key = frozenset(edits.items())
            if len(asking) < min(_ROUND, queries) and key not in asked:
                asked.add(key)
                asking.append(edits)
        if not asking:  # a short text has few variants
            return
        margins = yield asking
        queries -= len(asking)
        for margin, edits in zip(margins, asking, strict=True):
            if margin < best_margin:
                best_margin, best = margin, edits


def _propose(best: Edits, words: list[str], generator: np.random.Generator, max_edits: int) -> Edits:
    """Misspell as many words as the budget allows: random ones, or the best so far with one exchanged."""
    size = min(max_edits, len(words))
    if len(best) < size:
        chosen = generator.choice(len(words), size, replace=False).tolist()
        return {word: _misspell(words[word], generator) for word in chosen}
    changed = dict(best)
    del changed[list(changed)[generator.integers(size)]]
    free = [word for word in range(len(words)) if word not in changed]
    word = free[generator.integers(len(free))]
    return changed | {word: _misspell(words[word], generator)}


def _misspell(word: str, generator: np.random.Generator) -> str:
    """Apply one random edit inside the word; the result always differs from the word."""
    for edit in generator.permutation(4):
        place = int(generator.integers(1, len(word) - 1))  # never the first or the last letter
        letter = word[place]
        if edit == 0 and place + 2 < len(word) and word[place + 1] != letter:
            return word[:place] + word[place + 1] + letter + word[place + 2 :]
        if edit == 1:
            return word[:place] + word[place + 1 :]
        if edit == 2:
            return word[:place] + _LETTERS[generator.integers(len(_LETTERS))] + word[place:]
        if edit == 3 and letter.lower() in _KEYBOARD:
            near = _KEYBOARD[letter.lower()]
            mistyped = near[generator.integers(len(near))]
            return word[:place] + (mistyped.upper() if letter.isupper() else mistyped) + word[place + 1 :]
    raise AssertionError("dropping or adding a letter is always possible")


def _render(text: str, words: Sequence[re.Match[str]], edits: Edits) -> str:
    pieces, end = [], 0
    for index in sorted(edits):
        pieces += [text[end : words[index].start()], edits[index]]
        end = words[index].end()
    return "".join([*pieces, text[end:]])


def _ask(questions: Sequence[tuple[str, int]], predict: Predict) -> list[float]:
    """Return the margin of each text's label; NaN where a score is not finite."""
    if not questions:
        return []
    texts = [text for text, _ in questions]
    scores = torch.as_tensor(predict(texts)).detach().double().cpu()
    if scores.ndim != 2 or scores.shape[0] != len(texts):
        raise ValueError(f"predict must return shape [{len(texts)}, C], got {tuple(scores.shape)}.")
    return label_margins(scores, torch.tensor([label for _, label in questions])).tolist()
