"""The training loop on a tiny model: attacks keep samples independent, and epsilon is what was planned."""

import pytest
import torch

from securetune.adversarial.embedding import attack_mode, perturb, sample_seeds
from securetune.config.schema import AdversarialConfig
from securetune.data.collate import collate
from securetune.errors import PrivacyError
from securetune.models.task import GenerateHead
from securetune.privacy.clipping import FlatClipping
from securetune.privacy.ledger import Ledger, LedgerHeader
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import OrdinaryStep, PrivateStep
from securetune.training.loop import Adversary, Trainer, activate_dropout, check_gradients, make_optimizer
from tests.sample_recipe import sample_recipe
from tests.unit.training.tiny_head import make_examples, make_head


@pytest.mark.parametrize("config", [
    AdversarialConfig(method="fgsm", radius=0.1),
    AdversarialConfig(method="pgd", radius=0.1, steps=3),
    AdversarialConfig(method="pgd", radius=0.1, steps=2, norm="linf"),
    AdversarialConfig(method="pgd", radius=0.1, steps=2, norm="l2_sample"),
])  # fmt: skip
def test_removing_a_batch_mate_changes_no_bit_of_an_attack(config):
    head = make_head()
    examples = make_examples(4)
    adversary = Adversary(head, config, seed=1)

    def attacked(rows):
        batch = collate([examples[row] for row in rows])
        return adversary.perturb(head.embed(batch), batch, step=5)

    longest = max(range(4), key=lambda row: len(examples[row].input_ids))  # stays, so that padding does too
    keep = [row for row in range(4) if row == longest or row != (longest + 1) % 4]
    together, without = attacked(range(4)), attacked(keep)
    assert torch.equal(together[keep], without)


def test_perturbation_stays_in_its_ball_and_off_the_template():
    head = make_head()
    batch = collate(make_examples(3))
    config = AdversarialConfig(method="fgsm", radius=0.1)
    adversary = Adversary(head, config, seed=1)
    embeds = head.embed(batch)
    delta = adversary.perturb(embeds, batch, step=1) - embeds
    assert not delta[~batch.attack_mask].any()
    norms = delta.norm(dim=-1)[batch.attack_mask]
    radius = 0.1 * adversary._unit
    assert (norms <= radius * (1 + 1e-9)).all()
    assert (norms > 0.5 * radius).any()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_parts_attacked_at_once_are_perturbed_as_alone(rows):
    head = make_head()
    batch = collate(make_examples(rows))
    embeds = head.embed(batch)
    adversary = Adversary(head, AdversarialConfig(method="pgd", radius=0.1, steps=2), seed=1)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(adversary.perturb(embeds, batch, step=1))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(num_threads)
    torch.testing.assert_close(*results)
    assert all(p.requires_grad == ("lora_" in n) for n, p in head.model.named_parameters())


def test_attack_raises_the_loss_and_touches_no_gradient():
    head = make_head()
    batch = collate(make_examples(4))
    embeds = head.embed(batch)
    adversary = Adversary(head, AdversarialConfig(method="pgd", radius=0.3, steps=4), seed=1)
    with torch.no_grad():
        before = head.losses(embeds, batch)
        after = head.losses(adversary.perturb(embeds, batch, step=1), batch)
    assert (after > before).all()
    assert all(parameter.grad is None for parameter in head.model.parameters())
    assert all(p.requires_grad == ("lora_" in n) for n, p in head.model.named_parameters())


def trainer(head, examples, *, lr=0.05, adversary=None, micro=64) -> tuple[Trainer, PerSampleGradients]:
    grads = PerSampleGradients(head.model)
    step = OrdinaryStep(grads, torch.optim.Adam([grads.flat_params], lr=lr), expected_batch_size=8)
    sampler = PoissonSampler(len(examples), 0.5, key=bytes(32))
    return Trainer(head, step, sampler, examples, micro_batch_tokens=micro, adversary=adversary), grads


def test_training_lowers_the_loss():
    head = make_head(dtype=torch.float32)
    examples = make_examples(16)
    batch = collate(examples)
    training, _ = trainer(head, examples, lr=0.01)

    def mean_loss():
        with torch.no_grad():
            return float(head.losses(head.embed(batch), batch).mean())

    before = mean_loss()
    for number in range(1, 31):
        training.run_step(number)
    assert mean_loss() < 0.7 * before


def test_micro_batches_do_not_change_the_result():
    results = []
    for micro in (20, 1000):
        training, grads = trainer(make_head(), make_examples(12), micro=micro)
        training.run_step(1)
        results.append(grads.flat_params.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_empty_draw_is_a_step():
    head = make_head()
    examples = make_examples(2)
    training, _ = trainer(head, examples)
    training._sampler = PoissonSampler(2, 1e-12, key=bytes(32))
    result = training.run_step(1)
    assert result.num_samples == 0
    assert result.loss is None


def test_check_refuses_a_coupled_loss():
    head = make_head()
    grads = PerSampleGradients(head.model)
    original = head.losses

    def coupled(embeds, batch, **options):
        losses = original(embeds, batch, **options)
        return losses * losses.detach().mean()

    head.losses = coupled
    with pytest.raises(PrivacyError, match="couples samples"):
        check_gradients(head, grads, make_examples(2))


def test_only_the_adapters_dropout_is_switched_on():
    head = make_head(dropout=0.3)
    activate_dropout(head.model)
    training = {name for name, module in head.model.named_modules() if module.training}
    assert training
    assert all("lora_dropout" in name for name in training)


def private_update(folder, *, sample_rate: float, weight_decay: float):
    """Run one private step from a fixed noise key; return the adapters before and after."""
    head, examples = make_head(), make_examples(12)
    frozen = {n: p.clone() for n, p in head.model.named_parameters() if not p.requires_grad}
    grads = PerSampleGradients(head.model)
    recipe = sample_recipe({"training.learning_rate": 0.01, "training.weight_decay": weight_decay})
    header = LedgerHeader(
        noise_multiplier=1.0,
        sample_rate=0.5,
        max_grad_norm=1.0,
        delta=1e-3,
        expected_batch_size=8,
        planned_steps=3,
        reportable_epsilon=False,
    )
    with Ledger(folder / f"{sample_rate}-{weight_decay}.jsonl", header) as ledger:
        step = PrivateStep(
            grads,
            make_optimizer(recipe, [grads.flat_params]),
            clipping=FlatClipping(1.0),
            noise_multiplier=1.0,
            expected_batch_size=8,
            noise=NoiseSource(key=bytes(32)),
            ledger=ledger,
        )
        sampler = PoissonSampler(len(examples), sample_rate, key=bytes(32))
        before = grads.flat_params.detach().clone()
        result = Trainer(head, step, sampler, examples, micro_batch_tokens=64).run_step(1)
    assert all(torch.equal(frozen[n], p) for n, p in head.model.named_parameters() if n in frozen)
    return before, grads.flat_params.detach().clone(), result.num_samples


@pytest.mark.parametrize(("sample_rate", "drawn"), [(1.0, 12), (0.5, None), (1e-12, 0)])
def test_weight_decay_reads_the_released_adapters_alone(tmp_path, sample_rate, drawn):
    before, plain, count = private_update(tmp_path, sample_rate=sample_rate, weight_decay=0.0)
    _, decayed, _ = private_update(tmp_path, sample_rate=sample_rate, weight_decay=0.3)
    assert drawn is None or count == drawn
    torch.testing.assert_close(decayed - plain, -0.01 * 0.3 * before, rtol=0, atol=1e-12)
    assert (plain - before).abs().min() > 0  # noise moved every parameter, drawn samples or none


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_label_smoothing_is_trained_on_and_not_attacked(smoothing):
    head, examples = GenerateHead(make_head().model), make_examples(6)
    adversary = Adversary(head, AdversarialConfig(method="fgsm", radius=0.1), seed=1)
    grads = PerSampleGradients(head.model)
    batch = collate(examples)
    with attack_mode(head.model):  # one step up the plain loss
        attack = perturb(
            lambda embeds: head.losses(embeds, batch),
            head.embed(batch),
            batch.attack_mask,
            norm="l2_token",
            radius=0.1 * adversary._unit,
            steps=1,
            random_start=sample_seeds(batch.unit_ids, seed=1, step=1),
        )
    embeds = head.embed(batch) + attack.delta
    expected = float(head.losses(embeds, batch, label_smoothing=smoothing).detach().mean())
    step = OrdinaryStep(grads, torch.optim.SGD([grads.flat_params], lr=0.1), expected_batch_size=6)
    training = Trainer(
        head,
        step,
        PoissonSampler(6, 1.0, key=bytes(32)),
        examples,
        micro_batch_tokens=1000,
        adversary=adversary,
        label_smoothing=smoothing,
    )
    assert training.run_step(1).loss == pytest.approx(expected, rel=1e-12)
