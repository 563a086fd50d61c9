"""Samplers: exact probabilities, independence, what the accountant is told, the secrecy of their keys."""

import copy
import math
import pickle
import random

import dp_accounting
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from securetune.privacy.accounting import Phase, Sampling
from securetune.privacy.ledger import LedgerHeader
from securetune.privacy.noise import SAMPLING_STREAM, keystream_words
from securetune.privacy.sampling import (
    TRUNCATION_STREAM,
    FixedSizeSampler,
    PoissonSampler,
    TruncatedPoissonSampler,
    pad_batch,
)
from tests.sampling_truth import batch_probabilities

KEY = bytes(range(32))
EVERY_KIND = [
    lambda num_records, key: PoissonSampler(num_records, 0.3, key),
    lambda num_records, key: TruncatedPoissonSampler(num_records, 0.3, 2, key),
    lambda num_records, key: FixedSizeSampler(num_records, 2, key),
]


def inclusions(num_records, sample_rate, steps):
    """``[steps, num_records]``, bool: which record was taken when."""
    sampler = PoissonSampler(num_records, sample_rate, KEY)
    taken = np.zeros((steps, num_records), dtype=bool)
    for step in range(steps):
        taken[step, sampler.draw(step)] = True
    return taken


@pytest.mark.parametrize("sample_rate", [0.001, 0.03, 0.5, 0.97])
def test_inclusion_frequency_is_binomial(sample_rate):
    taken = inclusions(2000, sample_rate, 300)
    assert stats.binomtest(int(taken.sum()), taken.size, sample_rate).pvalue > 1e-3


def test_each_record_and_each_step_has_the_same_rate():
    taken = inclusions(500, 0.2, 500)
    for counts in (taken.sum(axis=0), taken.sum(axis=1)):  # per record, per step: Binomial(500, 0.2)
        chi_square = ((counts - 100) ** 2 / 80).sum()
        assert 1e-3 < stats.chi2.cdf(chi_square, 500) < 1 - 1e-3


def test_batch_sizes_vary_as_poisson_sampling_must():
    sizes = inclusions(1000, 0.1, 1000).sum(axis=1)
    assert sizes.var() == pytest.approx(1000 * 0.1 * 0.9, rel=0.2)


def test_records_and_steps_are_independent():
    taken = inclusions(300, 0.3, 2000).astype(float)
    between_records = np.corrcoef(taken.T) - np.eye(300)
    between_steps = np.corrcoef(taken[:300]) - np.eye(300)
    # the largest of 45,000 correlations: 6 standard errors are passed with probability 1e-4
    assert np.abs(between_records).max() < 6 / math.sqrt(2000)
    assert np.abs(between_steps).max() < 6 / math.sqrt(300)


def test_sample_is_the_words_below_the_exact_threshold():
    words = keystream_words(KEY, stream=SAMPLING_STREAM, step=5, start=0, count=1000)
    expected = [i for i, word in enumerate(words.tolist()) if word < math.floor(0.25 * 2**64)]
    assert PoissonSampler(1000, 0.25, KEY).draw(5) == expected


@pytest.mark.parametrize("sample_rate", [0.1, 1 / 3, 1e-9, 0.7, 2.0**-70])
def test_probability_is_never_above_the_rate(sample_rate):
    threshold = PoissonSampler(1, sample_rate, KEY)._threshold
    numerator, denominator = sample_rate.as_integer_ratio()
    assert threshold * denominator <= numerator * 2**64 < (threshold + 1) * denominator


def test_rate_of_one_takes_every_record():
    assert PoissonSampler(11, 1.0).draw(3) == list(range(11))


def test_empty_samples_happen():
    assert PoissonSampler(3, 1e-12).draw(0) == []


def test_another_record_does_not_change_the_samples_of_the_others():
    fewer, more = PoissonSampler(100, 0.3, KEY), PoissonSampler(101, 0.3, KEY)
    for step in range(20):
        assert [i for i in more.draw(step) if i != 100] == fewer.draw(step)


def test_samples_across_keystream_chunks():
    sampler = PoissonSampler((1 << 20) + 5000, 0.001, KEY)
    taken = sampler.draw(0)
    assert taken == sorted(set(taken))
    assert [i for i in taken if i < 5000] == PoissonSampler(5000, 0.001, KEY).draw(0)
    assert any(i >= 1 << 20 for i in taken)


def test_same_step_repeats_and_other_steps_and_samplers_differ():
    sampler = PoissonSampler(1000, 0.5)
    assert sampler.draw(1) == sampler.draw(1)
    assert sampler.draw(1) != sampler.draw(2)
    assert sampler.draw(1) != PoissonSampler(1000, 0.5).draw(1)


def test_accountant_gets_the_rate_that_is_sampled():
    sampler = PoissonSampler(1000, 0.03)
    assert sampler.event(0.7) == dp_accounting.PoissonSampledDpEvent(0.03, dp_accounting.GaussianDpEvent(0.7))
    assert sampler.phase(0.7, 15) == Phase(0.7, 0.03, 15)


def test_fixed_key_reports_no_epsilon():
    assert PoissonSampler(10, 0.5).reportable_epsilon
    assert not PoissonSampler(10, 0.5, KEY).reportable_epsilon


def test_repr_hides_the_key():
    assert repr(PoissonSampler(10, 0.5)) == "PoissonSampler(num_records=10, sample_rate=0.5, key=<secret>)"


@pytest.mark.parametrize("make", EVERY_KIND)
@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_sampler_cannot_be_pickled_or_copied(copy_it, make):
    with pytest.raises(TypeError, match="Sampler cannot be pickled or copied"):
        copy_it(make(10, None))


def test_repr_of_the_others_hides_the_key_too():
    assert repr(TruncatedPoissonSampler(10, 0.5, 3)) == (
        "TruncatedPoissonSampler(num_records=10, sample_rate=0.5, max_batch_size=3, key=<secret>)"
    )
    assert "key=<secret>" in repr(FixedSizeSampler(10, 3))


@pytest.mark.parametrize(
    ("num_records", "sample_rate", "message"),
    [
        (0, 0.5, "num_records must be >= 1, got 0"),
        (10, 0.0, r"sample_rate must be in \(0, 1\], got 0.0"),
        (10, 1.1, r"sample_rate must be in \(0, 1\], got 1.1"),
        (10, math.nan, r"sample_rate must be in \(0, 1\], got nan"),
    ],
)
def test_values_out_of_range_are_refused(num_records, sample_rate, message):
    with pytest.raises(ValueError, match=message):
        PoissonSampler(num_records, sample_rate)


def test_step_out_of_range_is_refused():
    with pytest.raises(ValueError, match="step must be from 0 to 4294967295, got -1"):
        PoissonSampler(10, 0.5).draw(-1)


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: TruncatedPoissonSampler(5, 0.4, 2, KEY), batch_probabilities(5, 0.4, 2)),
        (lambda: TruncatedPoissonSampler(4, 0.8, 3, KEY), batch_probabilities(4, 0.8, 3)),
        (lambda: FixedSizeSampler(6, 3, KEY), batch_probabilities(6, 1.0, 3)),
        (lambda: PoissonSampler(4, 0.3, KEY), batch_probabilities(4, 0.3, 4)),
    ],
)
def test_trap_24_every_possible_batch_has_its_exact_probability(make, exact):
    sampler, draws = make(), 4000
    counts = dict.fromkeys(exact, 0)
    for step in range(draws):
        counts[tuple(sampler.draw(step))] += 1  # a KeyError is a batch that must not exist
    expected = [draws * probability for probability in exact.values()]
    assert 1e-3 < stats.chisquare(list(counts.values()), expected).pvalue < 1 - 1e-4


def test_trap_24_truncated_marginal_and_pairs():
    num_records, rate, cap, steps = 60, 0.3, 17, 3000
    sampler = TruncatedPoissonSampler(num_records, rate, cap, KEY)
    taken = np.zeros((steps, num_records))
    for step in range(steps):
        taken[step, sampler.draw(step)] = 1
    kept = np.minimum(np.arange(num_records + 1), cap)
    weights = stats.binom.pmf(np.arange(num_records + 1), num_records, rate)
    marginal = float((weights * kept).sum()) / num_records  # below the rate: truncation takes some away
    pair = float((weights * kept * (kept - 1)).sum()) / (num_records * (num_records - 1))
    assert marginal < 0.28
    assert stats.binomtest(int(taken[:, 0].sum()), steps, marginal).pvalue > 1e-3
    error = np.abs(taken.mean(axis=0) - marginal).max()
    assert error < 4.5 * math.sqrt(marginal * (1 - marginal) / steps)
    together = (taken.T @ taken / steps)[np.triu_indices(num_records, k=1)]
    assert np.abs(together - pair).max() < 5 * math.sqrt(pair * (1 - pair) / steps)  # the largest of 1,770
    assert together.mean() == pytest.approx(pair, rel=0.01)


def test_trap_24_fixed_size_pairs():
    sampler, steps = FixedSizeSampler(40, 10, KEY), 3000
    taken = np.zeros((steps, 40))
    for step in range(steps):
        taken[step, sampler.draw(step)] = 1
    pair = 10 * 9 / (40 * 39)
    assert np.abs(taken.mean(axis=0) - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / steps)
    together = (taken.T @ taken / steps)[np.triu_indices(40, k=1)]
    assert np.abs(together - pair).max() < 5 * math.sqrt(pair * (1 - pair) / steps)


@given(
    num_records=st.integers(1, 80),
    rate=st.floats(0.01, 1.0),
    cap=st.integers(1, 80),
    step=st.integers(0, 2**32 - 1),
)
def test_truncated_sample_is_a_capped_part_of_the_poisson_sample(num_records, rate, cap, step):
    cap = min(cap, num_records)
    whole = PoissonSampler(num_records, rate, KEY).draw(step)
    part = TruncatedPoissonSampler(num_records, rate, cap, KEY).draw(step)
    assert len(part) == min(cap, len(whole))
    assert set(part) <= set(whole)
    assert part == sorted(part)


def test_truncation_keeps_the_smallest_words_of_its_own_stream():
    whole = PoissonSampler(200, 0.5, KEY).draw(3)
    words = keystream_words(KEY, stream=TRUNCATION_STREAM, step=3, start=0, count=len(whole)).tolist()
    smallest = sorted(zip(words, whole, strict=True))[:20]
    kept = TruncatedPoissonSampler(200, 0.5, 20, KEY).draw(3)
    assert kept == sorted(position for _, position in smallest)


def test_fixed_size_samples_across_keystream_chunks():
    num_records = (1 << 20) + 5000
    words = keystream_words(KEY, stream=SAMPLING_STREAM, step=2, start=0, count=num_records)
    assert FixedSizeSampler(num_records, 300, KEY).draw(2) == np.sort(np.argsort(words)[:300]).tolist()


def test_fixed_size_of_all_records_takes_all():
    assert FixedSizeSampler(7, 7).draw(0) == list(range(7))


@pytest.mark.parametrize("make", EVERY_KIND)
def test_trap_23_no_record_twice_and_none_dropped_at_the_end(make):
    sampler = make(11, KEY)
    seen = set()
    for step in range(300):  # no epochs, no last partial batch, no set_epoch to forget
        drawn = sampler.draw(step)
        assert drawn == sorted(set(drawn))
        seen.update(drawn)
    assert seen == set(range(11))


@pytest.mark.parametrize("make", EVERY_KIND)
def test_trap_16_equal_seeds_do_not_make_equal_samples(make):
    draws = []
    for _ in range(2):  # two ranks, or a run and its repetition
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        sampler = make(1000, None)
        draws.append([sampler.draw(step) for step in range(20)])
    assert draws[0] != draws[1]


@pytest.mark.parametrize("make", EVERY_KIND)
def test_trap_34_a_resumed_run_draws_anew_and_no_key_is_stored(make):
    first, resumed = make(500, None), make(500, None)
    assert [first.draw(step) for step in range(20)] != [resumed.draw(step) for step in range(20)]
    statement = f"{first.describe()!r} {first.describe()} {first.phase(1.0, 3)!r} {first!r}"
    assert first._key.hex() not in statement
    assert repr(first._key) not in statement
    assert not any("key" in field for field in LedgerHeader.model_fields)


def test_trap_22_nothing_public_depends_on_the_number_of_records_under_poisson():
    one, neighbour = PoissonSampler(1000, 0.03), PoissonSampler(1001, 0.03)
    assert one.describe() == neighbour.describe()
    assert one.phase(1.0, 9) == neighbour.phase(1.0, 9)
    assert "1000" not in str(one.describe())


def test_samplers_say_what_they_are_and_what_is_public():
    poisson = PoissonSampler(1000, 0.03).describe()
    assert (poisson.sampler, poisson.neighbouring_relation, poisson.num_units) == (
        "Poisson",
        "add or remove one",
        None,
    )
    assert str(poisson) == (
        "Poisson sampling at rate 0.03; add or remove one record; the number of records is private"
    )
    assert str(TruncatedPoissonSampler(1000, 0.03, 50).describe()) == (
        "truncated Poisson sampling at rate 0.03, at most 50 records a step; zero out one record; the number "
        "of records is public (1000)"
    )
    assert str(FixedSizeSampler(1000, 30).describe()) == (
        "fixed size sampling at rate 0.03, at most 30 records a step; replace one record; the number of "
        "records is public (1000)"
    )


def test_accountant_gets_the_public_constants_of_the_other_samplers():
    truncated, fixed = TruncatedPoissonSampler(1000, 0.03, 50), FixedSizeSampler(1000, 30)
    assert truncated.event(0.7) == dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.03, 50, 0.7)
    assert truncated.phase(0.7, 15) == Phase(0.7, 0.03, 15, Sampling("truncated Poisson", 1000, 50))
    assert fixed.event(0.7) == dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 1.0, 30, 0.7)
    assert fixed.phase(0.7, 15) == Phase(0.7, 0.03, 15, Sampling("fixed size", 1000, 30))
    assert truncated.max_batch_size == 50
    assert fixed.max_batch_size == 30
    assert PoissonSampler(1000, 0.03).max_batch_size is None


@pytest.mark.parametrize("make", EVERY_KIND)
def test_fixed_key_of_any_sampler_reports_no_epsilon(make):
    assert make(10, None).reportable_epsilon
    assert not make(10, KEY).reportable_epsilon


def test_padding_fills_up_with_rows_that_stand_for_no_record():
    assert pad_batch([3, 8], 4) == ([3, 8, -1, -1], [False, False, True, True])
    assert pad_batch([], 2) == ([-1, -1], [True, True])
    assert pad_batch([5], 1) == ([5], [False])


def test_padding_drops_no_record():
    with pytest.raises(ValueError, match=r"3 records does not fit into 2 rows.*TruncatedPoissonSampler"):
        pad_batch([1, 2, 3], 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedPoissonSampler(10, 0.5, 0), "1 <= max_batch_size <= num_records, got 0 and 10"),
        (lambda: TruncatedPoissonSampler(10, 0.5, 11), "1 <= max_batch_size <= num_records, got 11 and 10"),
        (lambda: TruncatedPoissonSampler(10, 0.0, 5), r"sample_rate must be in \(0, 1\], got 0.0"),
        (lambda: FixedSizeSampler(10, 0), r"batch_size must be from 1 to num_records \(10\), got 0"),
        (lambda: FixedSizeSampler(10, 11), r"batch_size must be from 1 to num_records \(10\), got 11"),
        (lambda: FixedSizeSampler(0, 1), "num_records"),
    ],
)
def test_values_out_of_range_of_the_other_samplers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
