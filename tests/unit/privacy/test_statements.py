"""What is said in words about clipping."""

import pytest

from securetune.privacy.statements import clipping_statement


def test_each_mode_names_the_sensitivity_and_the_unit():
    assert clipping_statement("flat", {}, sensitivity=0.5) == (
        "flat: each record's gradient is scaled to L2 norm at most 0.5; sensitivity 0.5"
    )
    said = clipping_statement("groups", {"groups": {"*a": 1.0, "*b": 2.0}}, unit="user", sensitivity=3.0)
    assert said == (
        "groups: each group of a user's gradient is scaled to a threshold of its own (*a 1, *b 2); "
        "sensitivity 3"
    )
    settings = {"target_quantile": 0.5, "count_noise_multiplier": 10.0, "per_layer": True}
    said = clipping_statement("adaptive", settings, sensitivity=1.0)
    assert "each layer's threshold follows the 0.5 quantile" in said
    assert "with count noise multiplier 10, is part of epsilon; sensitivity 1 at first" in said


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode must be one of flat, .* got 'soft'"):
        clipping_statement("soft", {}, sensitivity=1.0)
