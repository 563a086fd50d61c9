"""The plan: what it promises is what the accountant says, and it is readable."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from securetune.config import parse_recipe
from securetune.errors import ConfigError
from securetune.models.base import BaseModel
from securetune.privacy.accounting import epsilon_spent
from securetune.training.memory import count_adapters
from securetune.training.plan import make_plan
from tests.sample_recipe import recipe_text
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def base():
    model = tiny_llama()
    return BaseModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        name="tiny",
        digest="0" * 64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        folder=None,
        description="tiny",
    )


def plan_of(base, **changes):
    recipe = parse_recipe(
        recipe_text({key.replace("__", "."): value for key, value in changes.items()}), "r.yaml"
    )
    return make_plan(recipe, base=base, tokens_per_record=20)


def printed(plan) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(plan.render())
    return console.file.getvalue()


def test_noise_meets_the_target_and_never_passes_it(base):
    plan = plan_of(base)
    assert plan.privacy is not None
    epsilon = epsilon_spent(plan.privacy.noise_multiplier, 0.032, 10, 1e-5)
    assert epsilon <= 8.0
    assert epsilon == pytest.approx(8.0, rel=1e-3)
    assert epsilon_spent(0.99 * plan.privacy.noise_multiplier, 0.032, 10, 1e-5) > 8.0


def test_printed_plan_names_unit_delta_and_bound(base):
    text = printed(plan_of(base))
    assert "one record; a person with several records is not covered" in text
    assert "delta = 1e-05" in text
    assert "at 1 % false alarms" in text
    assert "settings tuned on the private data" in text


def test_plan_tells_the_clipping_and_what_adaptive_thresholds_cost(base):
    plan = plan_of(base)
    text = printed(plan)
    assert "flat: each record's gradient is scaled to L2 norm at most 1; sensitivity 1" in text
    assert plan.to_dict()["privacy"]["clipping"] == {"mode": "flat"}
    adaptive = plan_of(base, privacy__clipping={"mode": "adaptive"})
    text = printed(adaptive)
    assert "the threshold follows the 0.5 quantile of the records' gradient norms" in text
    values = adaptive.to_dict()["privacy"]
    assert values["noise_multiplier"] == plan.privacy.noise_multiplier  # what a step costs is what is charged
    assert values["gradient_noise_multiplier"] > values["noise_multiplier"]
    assert f"so the gradient's sigma is {values['gradient_noise_multiplier']:.4f}" in text


def test_plan_tells_sampler_accountant_relation_and_what_is_public(base):
    text = printed(plan_of(base))
    assert (
        "Poisson sampling at rate 0.032; add or remove one record; the number of records is private" in text
    )
    assert "dp-accounting" in text
    fixed = plan_of(base, privacy__sampling="fixed_size", privacy__num_units=1000)
    text = printed(fixed)
    assert "fixed size sampling at rate 0.032, at most 32 records a step; replace one record;" in text
    assert "N = 1,000 is public" in text
    assert fixed.to_dict()["privacy"]["neighbouring_relation"] == "replace one record"
    assert fixed.privacy.noise_multiplier > 1.5 * plan_of(base).privacy.noise_multiplier


def test_plan_without_privacy_says_so(base):
    plan = plan_of(base, privacy__enabled=False)
    assert plan.privacy is None
    assert "OFF: nothing is promised about any record" in printed(plan)


def test_plan_names_what_early_stopping_costs(base):
    assert "early stopping" not in printed(plan_of(base))
    noisy = {"method": "noisy_test", "epsilon": 1.5, "every": 4}
    plan = plan_of(base, training__early_stopping=noisy, data__min_held_out=1200)
    expected = (
        "noisy_test, up to 3 checks, which cost held-out records epsilon 1.5 together; a run that stops"
    )
    assert expected in printed(plan)
    assert plan.to_dict()["early_stopping"].startswith(expected)


def test_json_form_round_trips(base):
    values = json.loads(json.dumps(plan_of(base).to_dict()))
    assert values["privacy"]["steps"] == 10
    assert values["privacy"]["curve"]["steps"][-1] == 10
    assert values["estimate"]["memory_bytes"] > 0


def test_adversarial_steps_cost_time(base):
    clean, attacked = plan_of(base, adversarial__method="none"), plan_of(base, adversarial__method="fgsm")
    for plan, factor in ((clean, 1), (attacked, 2)):
        seconds = plan.estimate.seconds
        assert seconds["hardened training"] == pytest.approx(factor * seconds["plain fine-tune"])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapter_size_is_what_peft_makes(base, targets):
    from securetune.models.adapters import adapt

    plan = plan_of(base, training__lora__target_modules=targets, training__lora__rank=3)
    model = adapt(tiny_llama(), plan.recipe.training.lora)
    actual = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fresh = dataclasses.replace(base, model=tiny_llama())
    assert count_adapters(plan.recipe.training.lora, fresh) == actual


def test_modules_that_cannot_be_adapted_are_refused_before_a_run(base):
    with pytest.raises(ConfigError, match=r"target_modules: 'query' cannot be adapted .* up_proj, v_proj"):
        plan_of(base, training__lora__target_modules=["q_proj", "query"])
