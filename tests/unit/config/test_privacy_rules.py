"""Rules about the options of ``privacy``, each with its message."""

import pytest

from securetune.errors import ConfigError
from tests.sample_recipe import sample_recipe

GROUPS = {"mode": "groups", "groups": {"*.q_proj.*": 2.0, "*.v_proj.*": 1.0}}


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        (
            {"privacy.clipping": {"mode": "groups"}},
            "privacy.clipping.groups",
            "required for mode = 'groups': a weight for each pattern of parameter names",
        ),
        (
            {"privacy.clipping": {"groups": {"*": 1.0}}},
            "privacy.clipping.groups",
            "has no effect with mode = 'flat'. Remove it, or set mode to 'groups'.",
        ),
        (
            {"privacy.clipping": {"mode": "normalized", "stability": 0.1}},
            "privacy.clipping.stability",
            "has no effect with mode = 'normalized'. Remove it, or set mode to 'automatic'.",
        ),
        (
            {"privacy.clipping": {"target_quantile": 0.9}},
            "privacy.clipping.target_quantile",
            "has no effect with mode = 'flat'. Remove it, or set mode to 'adaptive'.",
        ),
        (
            {"privacy.clipping": {"mode": "per_layer", "threshold_learning_rate": 0.1}},
            "privacy.clipping.threshold_learning_rate",
            "has no effect with mode = 'per_layer'",
        ),
        (
            {"privacy.clipping": {"count_noise_multiplier": 10.0}},
            "privacy.clipping.count_noise_multiplier",
            "has no effect with mode = 'flat'",
        ),
        (
            {"privacy.clipping": {"per_layer": True}},
            "privacy.clipping.per_layer",
            "For adaptive thresholds set mode to 'adaptive' too; for fixed ones set mode to 'per_layer'",
        ),
        (
            {"privacy.clipping": {"mode": "per_layer"}, "privacy.enabled": False},
            "privacy.clipping",
            "has no effect with privacy.enabled = false: nothing is clipped. Remove it.",
        ),
        (
            {"privacy.clipping": {**GROUPS, "groups": {"*": 0.0}}},
            "privacy.clipping.groups",
            "must be > 0, got 0.0",
        ),
        (
            {"privacy.clipping": {"mode": "layerwise"}},
            "privacy.clipping.mode",
            "must be 'flat', 'per_layer', 'groups', 'automatic', 'normalized' or 'adaptive', got 'layerwise'",
        ),
    ],
)
def test_rule(changes, path, message):
    with pytest.raises(ConfigError) as caught:
        sample_recipe(changes)
    heading, line = str(caught.value).splitlines()
    assert heading == "1 problem in run.yaml"
    assert line.startswith(f"  {path}")
    assert message in line


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.clipping": GROUPS},
        {"privacy.clipping": {"mode": "automatic", "stability": 0.1}},
        {"privacy.clipping": {"mode": "adaptive", "per_layer": True, "count_noise_multiplier": 30.0}},
    ],
)
def test_allowed(changes):
    sample_recipe(changes)
