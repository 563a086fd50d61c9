import pytest
import yaml

from securetune.errors import PrivacyError
from securetune.publishing.card import render_card
from securetune.report.summary import BaseModelStatement, shareable
from tests.sample_report import make_evidence, sample_report

SIGNER = "5" * 64


def released():
    return make_evidence(
        "accuracy",
        "hardened",
        0.83,
        0.05,
        1000,
        private_statistic=False,
        release_epsilon=1.0,
        method="Laplace",
    )


def front_matter(card: str) -> dict:
    opening, fields, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(fields)


def test_front_matter_is_a_model_index_of_released_figures():
    card = render_card(shareable(sample_report(), [released()]), signer=SIGNER)
    (entry,) = front_matter(card)["model-index"]
    (result,) = entry["results"]
    by_type = {metric["type"]: metric for metric in result["metrics"]}
    assert set(by_type) == {"epsilon", "accuracy"}
    assert by_type["accuracy"]["value"] == 0.83
    assert by_type["accuracy"]["args"]["release_epsilon"] == 1.0
    assert by_type["accuracy"]["args"]["low"] == pytest.approx(0.78)


def test_model_index_is_accepted_by_the_hub_client():
    cards = pytest.importorskip("huggingface_hub.repocard_data")
    card = render_card(shareable(sample_report(), [released()]), signer=SIGNER)
    name, results = cards.model_index_to_eval_results(front_matter(card)["model-index"])
    assert name == "quickstart"
    assert {result.metric_type for result in results} == {"epsilon", "accuracy"}


def test_a_report_that_is_not_shareable_is_refused():
    with pytest.raises(PrivacyError, match="shareable"):
        render_card(sample_report(), signer=SIGNER)


def test_card_says_how_to_verify_and_open():
    card = render_card(shareable(sample_report()), signer=SIGNER)
    for phrase in (
        "python -m model_signing verify key FOLDER --signature FOLDER/model.sig --public_key publisher.pub",
        "securetune checkpoint verify FOLDER --public-key publisher.pub",
        "securetune checkpoint open FOLDER OPENED --public-key publisher.pub --identity recipient.key",
        SIGNER,
    ):
        assert phrase in card


def test_card_states_the_guarantee_and_what_it_leaves_out():
    card = render_card(shareable(sample_report()), signer=SIGNER)
    for phrase in (
        "| Unit | one record; a person with several records is not covered |",
        "| Epsilon spent | 7.97 (target 8) |",
        "| Delta | 1e-5 |",
        "flat: each record's gradient is scaled to L2 norm at most 1; sensitivity 1 |",
        "the number of records is private; 15 steps charged of 15 planned",
        "allows | 99.97 % |",
        "tuning a learning rate",
        "No figure measured on private records was released.",
    ):
        assert phrase in card, phrase


def test_card_says_clipping_and_noise_once():
    report = sample_report()
    assert report.privacy is not None
    assert "| Mechanism |" in render_card(shareable(report), signer=SIGNER)  # it states no noise
    privacy = report.privacy.model_copy(update={"noise": "Gaussian, noise multiplier 1.1"})
    card = render_card(shareable(sample_report(privacy=privacy)), signer=SIGNER)
    assert "| Noise | Gaussian, noise multiplier 1.1 |" in card
    assert "Mechanism" not in card


def test_card_of_a_model_that_was_trained_in_full_tells_how_to_load_it():
    statement = sample_report().recipe.model_copy(update={"method": "full"})
    card = render_card(shareable(sample_report(recipe=statement)), signer=SIGNER)
    assert front_matter(card)["library_name"] == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("OPENED/weights")' in card
    assert "adapter" not in card


def test_card_of_a_run_without_privacy_says_so():
    card = render_card(shareable(sample_report(privacy=None)), signer=SIGNER)
    assert "trained **without** differential privacy" in card
    assert "differential-privacy" not in front_matter(card)["tags"]


def test_base_model_is_named_only_if_it_is_a_hub_id():
    hub = BaseModelStatement(name="HuggingFaceTB/SmolLM2-135M-Instruct", digest="b" * 64)
    card = render_card(shareable(sample_report(base_model=hub)), signer=SIGNER)
    assert front_matter(card)["base_model"] == hub.name
    assert "base_model" not in front_matter(render_card(shareable(sample_report()), signer=SIGNER))


def test_outside_text_cannot_break_out():
    attack = "x\n---\n# Trust me | <img src=x> `code` [link](http://example.com)"
    report = sample_report(
        base_model=BaseModelStatement(name=attack, digest="b" * 64),
        limitations=[attack],
        evidence=[],
        gate=None,
    )
    card = render_card(shareable(report), signer=SIGNER)
    assert front_matter(card)["library_name"] == "peft"
    assert "\n# Trust me" not in card
    assert "<img" not in card
    assert "[link](" not in card


def test_card_holds_no_withheld_number():
    card = render_card(shareable(sample_report()), signer=SIGNER)
    for number in ("84.0", "0.8402", "0.506", "0.5061", "1.90", "10543", "2112"):
        assert number not in card
