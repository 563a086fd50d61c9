"""The character attack: budgets, independence of texts, and successes that hold for the string."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.adversarial.characters import character_attack

GOOD = {"great", "moving", "clever", "honest", "wonderful"}
BAD = {"boring", "awful", "tedious", "pointless", "terrible"}
TEXTS = [
    "A great and moving film, honest about its people",
    "Boring, awful and pointless from the start",
    "It is what it is",
    "A clever story, a wonderful cast",
    "The most tedious evening of the year, terrible music",
]
LABELS = [1, 0, 0, 1, 0]


class BagOfWords:
    """Scores [negative, positive] by known words and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.calls = 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.calls += 1
        self.asked.update(texts)
        scores = torch.zeros(len(texts), 2)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            scores[row, 0] = sum(word in BAD for word in words) + 0.5
            scores[row, 1] = sum(word in GOOD for word in words)
        return scores


def distance(first: str, second: str) -> int:
    """Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    table[:, 0], table[0, :] = range(len(first) + 1), range(len(second) + 1)
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and b == first[i - 2]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return int(table[-1, -1])


def test_every_text_with_enough_budget_is_broken():
    results = character_attack(
        TEXTS[:2] + TEXTS[3:], LABELS[:2] + LABELS[3:], BagOfWords(), max_edits=4, max_queries=60
    )
    # negative texts keep a head start of 0.5, which no misspelling takes away
    assert [result.success for result in results] == [True, False, True, False]


def test_success_holds_for_the_returned_string():
    results = character_attack(TEXTS, LABELS, BagOfWords(), max_edits=4, max_queries=40)
    scores = BagOfWords()([result.text for result in results])
    wrong = scores.argmax(dim=1) != torch.tensor(LABELS)
    assert wrong.tolist() == [result.success for result in results]


@pytest.mark.parametrize(("max_edits", "max_queries"), [(1, 3), (2, 10), (3, 25), (10, 60)])
def test_budgets_are_kept_and_reported(max_edits, max_queries):
    model = BagOfWords()
    results = character_attack(TEXTS, LABELS, model, max_edits=max_edits, max_queries=max_queries)
    assert sum(result.queries for result in results) == model.asked.total()
    for text, result in zip(TEXTS, results, strict=True):
        assert result.queries <= max_queries
        assert distance(text, result.text) <= result.edits <= max_edits


def test_edits_stay_inside_words_of_four_letters_or_more():
    for seed in range(5):
        results = character_attack(TEXTS, LABELS, BagOfWords(), max_edits=9, max_queries=40, seed=seed)
        for text, result in zip(TEXTS, results, strict=True):
            for before, after in zip(text.split(" "), result.text.split(" "), strict=True):
                assert distance(before, after) <= 1
                if before != after:
                    assert sum(letter.isalpha() for letter in before) >= 4
                    assert (before[0], before[-1]) == (after[0], after[-1])


def test_result_of_a_text_does_not_depend_on_the_others():
    together = character_attack(TEXTS, LABELS, BagOfWords(), max_edits=3, max_queries=30, seed=3)
    alone = [
        character_attack([text], [label], BagOfWords(), max_edits=3, max_queries=30, seed=3)[0]
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    assert together == alone


def test_same_seed_repeats_and_another_seed_differs():
    first, again, other = (
        character_attack(TEXTS, LABELS, BagOfWords(), max_edits=3, max_queries=12, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_all_texts_are_asked_about_in_one_call_per_round():
    model = BagOfWords()
    character_attack(TEXTS * 10, LABELS * 10, model, max_edits=3, max_queries=30)
    assert model.calls <= 12


def test_no_variant_is_asked_about_twice_during_the_search():
    model = BagOfWords()
    (result,) = character_attack([TEXTS[1]], [0], model, max_edits=2, max_queries=40)
    assert not result.success
    assert set(model.asked.values()) == {1}


def test_text_that_is_wrong_already_costs_two_queries_and_no_edit():
    (result,) = character_attack([TEXTS[0]], [0], BagOfWords(), max_edits=3, max_queries=30)
    assert result == (TEXTS[0], True, 2, 0, False)


def test_text_without_long_words_stays_as_it_is():
    (result,) = character_attack(["It is so so"], [0], BagOfWords(), max_edits=3, max_queries=30)
    assert result == ("It is so so", False, 1, 0, False)


def test_answer_that_is_not_finite_is_an_error_and_never_robust():
    def predict(texts: list[str]) -> torch.Tensor:
        scores = BagOfWords()(texts)
        scores[[text != TEXTS[1] and "awful" not in text for text in texts]] = float("nan")
        return scores

    (result,) = character_attack([TEXTS[1]], [0], predict, max_edits=2, max_queries=30)
    assert (result.success, result.error) == (False, True)


def test_success_that_does_not_repeat_is_not_counted():
    seen: set[str] = set()

    def flickering(texts: list[str]) -> torch.Tensor:
        # wrong about every variant, but only the first time
        scores = torch.tensor(
            [[1.0, 0.0] if text in seen or text == TEXTS[1] else [0.0, 1.0] for text in texts]
        )
        seen.update(texts)
        return scores

    (result,) = character_attack([TEXTS[1]], [0], flickering, max_edits=2, max_queries=30)
    assert not result.success


@settings(max_examples=30)
@given(text=st.text(max_size=60), seed=st.integers(0, 2**16))
def test_any_text_stays_within_the_budget(text, seed):
    def length_matters(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.001 * len(candidate)] for candidate in texts])

    (result,) = character_attack([text], [0], length_matters, max_edits=2, max_queries=9, seed=seed)
    assert distance(text, result.text) <= result.edits <= 2


def test_numpy_scores_are_accepted():
    results = character_attack(
        TEXTS, LABELS, lambda texts: BagOfWords()(texts).numpy(), max_edits=3, max_queries=30
    )
    assert results == character_attack(TEXTS, LABELS, BagOfWords(), max_edits=3, max_queries=30)


def test_progress_ends_at_the_number_of_texts():
    seen: list[tuple[int, int]] = []
    character_attack(
        TEXTS,
        LABELS,
        BagOfWords(),
        max_edits=3,
        max_queries=30,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_no_text_gives_no_result():
    assert character_attack([], [], BagOfWords(), max_edits=1, max_queries=3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, "same length, got 5 and 1"),
        ({"max_edits": 0}, "max_edits must be >= 1, got 0"),
        ({"max_queries": 2}, "max_queries must be >= 3, got 2"),
        (
            {"predict": lambda texts: torch.zeros(len(texts))},
            r"predict must return shape \[5, C\], got \(5,\)",
        ),
    ],
)
def test_bad_argument_is_named_with_its_value(change, message):
    options = {
        "texts": TEXTS,
        "labels": LABELS,
        "predict": BagOfWords(),
        "max_edits": 1,
        "max_queries": 5,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        character_attack(**options)
