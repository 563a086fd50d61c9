"""Clipping: groups, factors and sensitivity of every kind, against float64 loops over single units."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securetune.errors import CheckpointError, PrivacyError
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.clipping import (
    LARGEST_THRESHOLD,
    ROUNDING_EXCESS,
    SMALLEST_THRESHOLD,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    GroupClipping,
    NormalizedClipping,
    PerLayerClipping,
)
from securetune.privacy.noise import NoiseSource

NAMES = ("a.weight", "a.bias", "b.lora_A.default.weight", "b.lora_B.default.weight", "c.weight")
SIZES = (4, 2, 3, 5, 6)
KINDS = {
    "flat": lambda c: FlatClipping(c),
    "automatic": lambda c: AutomaticClipping(c),
    "normalized": lambda c: NormalizedClipping(c),
    "per_layer": lambda c: PerLayerClipping(c),
    "per_layer_list": lambda c: PerLayerClipping([c, c / 2, 3 * c]),
    "groups": lambda c: GroupClipping({"a.*": c, "[bc].*": 2 * c}),
    "adaptive": lambda c: AdaptiveClipping(c, count_noise_multiplier=5, expected_batch_size=4),
    "adaptive_per_layer": lambda c: AdaptiveClipping(
        c, count_noise_multiplier=5, expected_batch_size=4, per_layer=True
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def bound(kind: str, threshold: float = 1.0) -> tuple[Clipping, list[slice], tuple[int, ...]]:
    """A clipping object bound to NAMES, the place of each parameter in a row, and the parameters' groups."""
    clipping = KINDS[kind](threshold)
    groups = clipping.assign(NAMES)
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    return clipping, [slice(s, s + n) for s, n in zip(starts, SIZES, strict=True)], groups


def clipped_rows(kind: str, rows: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
    """Clip float64 rows with float32 squared norms, as an engine does."""
    clipping, places, groups = bound(kind, threshold)
    squares = torch.zeros(len(rows), clipping.num_groups, dtype=torch.float64)
    for place, group in zip(places, groups, strict=True):
        squares[:, group] += rows[:, place].square().sum(dim=1)
    factors = clipping.factors(squares.float())
    assert factors.dtype == torch.float32
    assert factors.shape == squares.shape
    out = torch.zeros_like(rows)
    for place, group in zip(places, groups, strict=True):
        factor = factors[:, group, None].double()
        out[:, place] = torch.where(factor > 0, factor * rows[:, place], 0.0)
    return out


def bind(clipping: Clipping, names=("w",)) -> Clipping:
    clipping.assign(names)
    return clipping


def factor(clipping: Clipping, norm: float) -> float:
    return float(bind(clipping).factors(torch.tensor([[norm]], dtype=torch.float64).square()))


# ---- groups


def test_flat_puts_everything_into_one_group():
    assert FlatClipping(1.0).assign(NAMES) == (0, 0, 0, 0, 0)


def test_a_layer_is_one_group_with_all_its_parts():
    names = (
        "model.0.base_layer.bias",
        "model.0.lora_A.default.weight",
        "model.0.lora_B.default.weight",
        "model.0.lora_magnitude_vector.default.weight",
        "model.1.lora_embedding_A.default",
        "model.1.lora_embedding_B.default",
        "model.2.ia3_l.default",
        "model.norm.weight",
        "model.norm.bias",
        "model.10.weight",
        "scale",
        "shift",
    )
    clipping = PerLayerClipping(1.0)
    assert clipping.assign(names) == (0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5)
    assert list(clipping.thresholds) == ["model.0", "model.1", "model.2", "model.norm", "model.10", "(root)"]


def test_named_groups_take_their_own_threshold_in_order_of_appearance():
    clipping = GroupClipping({"[bc].*": 2.0, "a.*": 0.5})
    assert clipping.assign(NAMES) == (0, 0, 1, 1, 1)
    assert clipping.thresholds == {"a.*": 0.5, "[bc].*": 2.0}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a.*": 1.0}, r"'b.lora_A.default.weight' must match exactly one pattern .* matches none"),
        ({"*": 1.0, "*.bias": 2.0}, r"'a.bias' must match .* matches '\*' and '\*.bias'"),
        ({"*": 1.0, "d.*": 2.0}, r"no trainable parameter matches 'd.\*'"),
        ({"A.*": 1.0, "[!A]*": 1.0}, r"no trainable parameter matches 'A.\*'"),
        ({}, "at least one pattern"),
    ],
)
def test_groups_that_do_not_divide_the_parameters_are_refused(groups, message):
    with pytest.raises(PrivacyError, match=message):
        GroupClipping(groups).assign(NAMES)


def test_thresholds_must_be_as_many_as_layers():
    with pytest.raises(PrivacyError, match=r"each of the 3 trainable layers, got 2. .* order: a, b, c"):
        PerLayerClipping([1.0, 2.0]).assign(NAMES)


def test_object_belongs_to_one_set_of_parameters():
    clipping = PerLayerClipping(1.0)
    assert clipping.assign(NAMES) == clipping.assign(list(NAMES))
    with pytest.raises(PrivacyError, match="Make a new one for each run"):
        clipping.assign(NAMES[:-1])


@pytest.mark.parametrize("names", [(), ("w", "w")])
def test_missing_or_repeated_parameters_are_refused(names):
    with pytest.raises(PrivacyError, match="trainable parameters with different names"):
        FlatClipping(1.0).assign(names)


def test_failed_assignment_does_not_bind():
    clipping = GroupClipping({"a.*": 1.0})
    with pytest.raises(PrivacyError):
        clipping.assign(NAMES)
    assert clipping.assign(NAMES[:2]) == (0, 0)


def test_nothing_works_before_assign():
    clipping = FlatClipping(1.0)
    for use in (lambda: clipping.sensitivity, lambda: clipping.num_groups, lambda: clipping.noise_stddev(1)):
        with pytest.raises(PrivacyError, match=r"call assign\(\) first"):
            use()
    with pytest.raises(PrivacyError, match=r"call assign\(\) first"):
        clipping.factors(torch.ones(1, 1))


# ---- sensitivity


@kinds
@settings(max_examples=60)
@given(
    scales=st.lists(st.floats(-12, 15), min_size=2, max_size=5),
    log_threshold=st.floats(-6, 6),
    removed=st.integers(0, 4),
    seed=st.integers(0, 2**16),
    hole=st.integers(0, 4),
)
def test_one_unit_moves_the_sum_by_at_most_the_sensitivity(kind, scales, log_threshold, removed, seed, hole):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(scales), sum(SIZES), generator=generator, dtype=torch.float64)
    rows *= 10.0 ** torch.tensor(scales, dtype=torch.float64)[:, None]
    rows[:, : hole * 4] *= 1e-7  # groups of very unequal length
    threshold = 10.0**log_threshold
    keep = [row for row in range(len(rows)) if row != removed % len(rows)]
    whole = clipped_rows(kind, rows, threshold)
    # a unit's part does not depend on the others
    torch.testing.assert_close(clipped_rows(kind, rows[keep], threshold), whole[keep], rtol=0, atol=0)
    clipping, _, _ = bound(kind, threshold)
    assert whole.norm(dim=1).max() <= clipping.sensitivity
    # parts keep their direction in each group: a sum of others cancels in the difference of neighbours
    assert (whole.sum(dim=0) - whole[keep].sum(dim=0)).norm() <= clipping.sensitivity * (1 + 1e-9)


@kinds
def test_sensitivity_is_reached(kind):
    # so that a smaller one (the largest C_k, say, instead of the root of all squares) would be wrong
    rows = 1e6 * torch.ones(1, sum(SIZES), dtype=torch.float64)
    clipping, _, _ = bound(kind, 0.7)
    reached = float(clipped_rows(kind, rows, 0.7).norm())
    assert reached == pytest.approx(clipping.sensitivity / (1 + ROUNDING_EXCESS), rel=3e-7)
    assert clipping.noise_stddev(0.0) == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flat", 0.7), ("automatic", 0.7), ("normalized", 0.7), ("per_layer", 0.7),
        ("adaptive", 0.7), ("adaptive_per_layer", 0.7),
        ("per_layer_list", 0.7 * math.sqrt(1 + 0.25 + 9)), ("groups", 0.7 * math.sqrt(1 + 4)),
    ],
)  # fmt: skip
def test_sensitivity_is_the_root_of_all_squared_thresholds(kind, expected):
    clipping, _, _ = bound(kind, 0.7)
    assert clipping.sensitivity == pytest.approx(expected * (1 + ROUNDING_EXCESS), rel=1e-12)


@pytest.mark.parametrize("kind", ["flat", "automatic", "normalized", "per_layer", "per_layer_list", "groups"])
def test_noise_of_fixed_thresholds_is_multiplier_times_sensitivity(kind):
    clipping, _, _ = bound(kind, 0.7)
    assert clipping.noise_stddev(1.5) == 1.5 * clipping.sensitivity


@pytest.mark.parametrize("kind", ["flat", "normalized", "per_layer"])
def test_float32_gradients_stay_within_the_rounding_excess(kind):
    # norms and products in float32 throughout, summed over neighbours, measured in float64
    generator = torch.Generator().manual_seed(0)
    places = bound(kind)[1]
    for _ in range(20):
        rows = 30 * torch.randn(8, sum(SIZES), generator=generator)
        clipping, _, groups = bound(kind)
        squares = torch.zeros(8, clipping.num_groups)
        for place, group in zip(places, groups, strict=True):
            squares[:, group] += rows[:, place].square().sum(dim=1)
        factors = clipping.factors(squares)
        for place, group in zip(places, groups, strict=True):
            rows[:, place] *= factors[:, group, None]
        difference = rows.sum(dim=0).double() - rows[1:].sum(dim=0).double()
        assert difference.norm() <= clipping.sensitivity


# ---- factors


@settings(max_examples=300)
@given(
    norm=st.floats(1e-19, 1e19, allow_subnormal=False),
    threshold=st.floats(SMALLEST_THRESHOLD, LARGEST_THRESHOLD),
    kind=st.sampled_from([FlatClipping, AutomaticClipping, NormalizedClipping]),
)
def test_factor_times_norm_never_exceeds_the_threshold(norm, threshold, kind):
    # two units in the last place of float64 for the square, its root and the product of this test
    assert factor(kind(threshold), norm) * norm <= threshold * (1 + 4 * 2.0**-52)


@settings(max_examples=100)
@given(norm=st.floats(0, 1e6), threshold=st.floats(1e-3, 1e3))
def test_factors_follow_their_formulas(norm, threshold):
    close = {"rel": 1.3e-7}  # one float32 unit in the last place
    assert factor(FlatClipping(threshold), norm) == pytest.approx(
        min(1.0, threshold / max(norm, 1e-300)), **close
    )
    assert factor(AutomaticClipping(threshold), norm) == pytest.approx(threshold / (norm + 0.01), **close)
    if norm >= SMALLEST_THRESHOLD:
        assert factor(NormalizedClipping(threshold), norm) == pytest.approx(threshold / norm, **close)


def test_a_unit_at_its_threshold_is_unchanged():
    for threshold in (0.1, 1.0, 3.0):
        assert factor(FlatClipping(threshold), threshold) == 1.0


def test_zero_gradient_is_left_alone():
    assert factor(FlatClipping(2.0), 0.0) == 1.0
    assert factor(AutomaticClipping(2.0), 0.0) == pytest.approx(200.0)
    assert factor(NormalizedClipping(2.0), 0.0) == 0.0


def test_normalizing_does_not_blow_up_a_length_that_float32_cannot_tell():
    # 10,000 entries of 1e-22: every square is lost in float32 except to subnormals, the true norm is 1e-20
    entries = torch.full((10_000,), 1e-22)
    factors = bind(NormalizedClipping(1.0)).factors(entries.square().sum().reshape(1, 1))
    assert float(factors) * float(entries.double().norm()) <= 1.0


def test_losing_squares_to_float32_does_not_break_the_smallest_threshold():
    # 1e12 entries just below where float32 squares vanish: the norm handed in is 0, the true one 1.1e-13
    hidden = math.sqrt(1e12 * torch.finfo(torch.float32).tiny)
    at_threshold = factor(FlatClipping(SMALLEST_THRESHOLD), SMALLEST_THRESHOLD)
    assert (
        at_threshold * math.hypot(SMALLEST_THRESHOLD, hidden)
        <= bind(FlatClipping(SMALLEST_THRESHOLD)).sensitivity
    )


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_unit_has_factors_zero_in_every_group(kind, bad):
    clipping, _, _ = bound(kind)
    squares = torch.full((3, clipping.num_groups), 4.0)
    squares[1, -1] = bad
    factors = clipping.factors(squares)
    assert torch.equal(factors[1], torch.zeros(clipping.num_groups))
    assert torch.equal(factors[[0, 2]], bound(kind)[0].factors(squares[[0, 2]]))
    assert clipping.counts.sum(dim=0).tolist() == [2] * clipping.num_groups


def test_square_that_overflows_float32_rejects_the_unit_and_float64_keeps_it():
    square = torch.tensor([[1e40]], dtype=torch.float64)  # a finite gradient of norm 1e20
    assert float(bind(FlatClipping(1.0)).factors(square.float())) == 0.0
    assert float(bind(FlatClipping(1.0)).factors(square)) == pytest.approx(1e-20)


def test_subnormal_factor_is_zero():
    assert factor(FlatClipping(1e-10), 1e30) == 0.0  # 1e-40


def test_negative_square_silences_its_group_only():
    factors = bind(PerLayerClipping([1.0, 1.0]), ("a.w", "b.w")).factors(torch.tensor([[-1e-9, 4.0]]))
    assert factors.tolist() == [[0.0, 0.5]]


def test_no_units_give_no_factors():
    clipping, _, _ = bound("per_layer")
    assert clipping.factors(torch.zeros(0, 3)).shape == (0, 3)


def test_factors_carry_no_graph():
    squares = torch.ones(2, 1, requires_grad=True)
    assert not bind(FlatClipping(1.0)).factors(squares).requires_grad


def test_wrong_squares_are_refused():
    clipping, _, _ = bound("per_layer")
    with pytest.raises(ValueError, match=r"must have shape \[U, 3\].*got \(2, 4\)"):
        clipping.factors(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        clipping.factors(torch.ones(3))
    with pytest.raises(TypeError, match=r"float32 or float64, got torch.bfloat16"):
        clipping.factors(torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-11, 1e19])
def test_threshold_out_of_range_is_named(value):
    for make in (
        FlatClipping,
        AutomaticClipping,
        NormalizedClipping,
        PerLayerClipping,
        lambda v: PerLayerClipping([1.0, v]),
        lambda v: AutomaticClipping(1.0, stability=v),
        lambda v: GroupClipping({"*": v}),
        lambda v: AdaptiveClipping(v, count_noise_multiplier=5, expected_batch_size=4),
    ):
        with pytest.raises(PrivacyError, match=re.escape(f"must be > 0, from 1e-10 to 1e+18, got {value}.")):
            make(value)


def test_even_split_below_the_smallest_threshold_is_refused():
    with pytest.raises(PrivacyError, match="threshold of group 'a' must be > 0"):
        PerLayerClipping(1.5e-10).assign(NAMES)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_noise_multiplier_is_refused(value):
    for kind in KINDS:
        with pytest.raises(PrivacyError, match=f"noise_multiplier must be a finite number >= 0, got {value}"):
            bound(kind)[0].noise_stddev(value)


# ---- steps, states, descriptions


@pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, 10.0])
def test_the_threshold_asked_for_is_the_one_used(max_grad_norm):
    # Opacus #664: ghost clipping ignored max_grad_norm
    clipping = bind(FlatClipping(max_grad_norm))
    assert factor(clipping, 100.0) == pytest.approx(max_grad_norm / 100)
    assert clipping.noise_stddev(1.0) == pytest.approx(max_grad_norm, rel=2 * ROUNDING_EXCESS)


def test_clipped_fraction_is_of_the_last_whole_step():
    clipping = bind(PerLayerClipping([1.0, 10.0]), ("a.w", "b.w"))
    assert clipping.clipped_fraction is None
    clipping.factors(torch.tensor([[4.0, 4.0], [0.25, 400.0]]))
    clipping.factors(
        torch.tensor([[4.0, 4.0], [4.0, 4.0], [math.nan, 4.0]])
    )  # the last one counts for nothing
    clipping.finish(NoiseSource(), step=0, noise_multiplier=1.0)
    assert clipping.clipped_fraction == (0.75, 0.25)
    clipping.factors(torch.tensor([[0.25, 400.0]]))
    clipping.finish(NoiseSource(), step=1, noise_multiplier=1.0)
    assert clipping.clipped_fraction == (0.0, 1.0)
    clipping.finish(NoiseSource(), step=2, noise_multiplier=1.0)
    assert all(math.isnan(fraction) for fraction in clipping.clipped_fraction)


def test_discarded_units_are_forgotten():
    clipping = bind(FlatClipping(1.0))
    clipping.factors(torch.tensor([[4.0]]))
    clipping.discard()
    clipping.factors(torch.tensor([[0.25]]))
    clipping.finish(NoiseSource(), step=0, noise_multiplier=1.0)
    assert clipping.clipped_fraction == (0.0,)


@pytest.mark.parametrize("kind", ["flat", "automatic", "normalized", "per_layer", "per_layer_list", "groups"])
def test_fixed_thresholds_draw_no_noise_and_keep_no_state(kind):
    class Silent(NoiseSource):
        def normal(self, **options):
            raise AssertionError("no noise is needed")

    clipping, _, _ = bound(kind)
    before = clipping.thresholds
    clipping.factors(torch.ones(2, clipping.num_groups))
    clipping.finish(Silent(), step=0, noise_multiplier=1.0)
    assert clipping.thresholds == before
    assert clipping.state_dict() == {}
    clipping.load_state_dict({})
    with pytest.raises(CheckpointError, match=r"holds \['thresholds'\]"):
        clipping.load_state_dict({"thresholds": {"all": 1.0}})


@kinds
def test_description_is_json_and_says_what_is_in_force(kind):
    unbound = KINDS[kind](0.7).describe()
    clipping, _, _ = bound(kind, 0.7)
    described = json.loads(json.dumps(clipping.describe(), allow_nan=False))
    assert unbound.items() <= described.items()
    assert described["mode"] == clipping.mode
    assert described["thresholds"] == clipping.thresholds
    assert described["sensitivity"] == clipping.sensitivity
