"""Noise against target and length: each point is a calibration of its own."""

from dataclasses import replace

import pytest

from securetune.privacy.accounting import PrivacySpec, calibrate_noise_multiplier, plan_privacy
from securetune.privacy.noise_curves import noise_over_epsilon, noise_over_steps

SPEC = PrivacySpec(
    target_epsilon=2.0, delta=1e-5, sample_rate=0.05, steps=8, max_grad_norm=1.0, expected_batch_size=64
)


def test_noise_falls_as_the_target_rises():
    curve = noise_over_epsilon(SPEC, [4.0, 2.0])
    assert curve.values == (2.0, 4.0)
    assert curve.noise_multipliers[0] > curve.noise_multipliers[1]
    assert curve.noise_multipliers[0] == plan_privacy(SPEC).noise_multiplier


def test_default_values_surround_the_plan():
    assert noise_over_steps(replace(SPEC, steps=1)).values == (1, 2, 4)


def test_noise_rises_with_the_steps():
    curve = noise_over_steps(SPEC, [16, 4])
    assert curve.values == (4, 16)
    assert curve.noise_multipliers[0] < curve.noise_multipliers[1]


def test_the_sampler_of_the_plan_is_that_of_the_curve():
    spec = replace(SPEC, sampler="fixed size", num_records=1000, max_batch_size=50)
    (noise_multiplier,) = noise_over_epsilon(spec, [2.0]).noise_multipliers
    poisson = calibrate_noise_multiplier(target_epsilon=2.0, delta=1e-5, sample_rate=0.05, steps=8)
    assert noise_multiplier > 2 * poisson


def test_values_that_no_noise_reaches_are_left_out():
    assert noise_over_epsilon(SPEC, [2.0, 5000.0]).values == (2.0,)


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="steps must be a whole number from 1"):
        noise_over_steps(SPEC, [0])
