"""Poisson sampling: exact probabilities, independence, and the secrecy of its key."""

import copy
import math
import pickle

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from securetune.privacy.accounting import Phase
from securetune.privacy.noise import SAMPLING_STREAM, keystream_words
from securetune.privacy.sampling import PoissonSampler

KEY = bytes(range(32))


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


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_sampler_cannot_be_pickled_or_copied(copy_it):
    with pytest.raises(TypeError, match="PoissonSampler cannot be pickled or copied"):
        copy_it(PoissonSampler(10, 0.5))


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
