"""The training loop on a tiny model: attacks keep samples independent, and epsilon is what was planned."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from securetune.config.schema import AdversarialConfig
from securetune.data.collate import collate
from securetune.data.encode import Example
from securetune.errors import PrivacyError
from securetune.models.task import ClassifyHead
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import OrdinaryStep
from securetune.training.loop import Adversary, Trainer, activate_dropout, check_gradients
from tests.tiny import LABEL_WORDS, tiny_llama, tiny_tokenizer

PROMPT = "{text}\nLabel:"


def make_head(*, dtype=torch.float64, dropout: float = 0.0) -> ClassifyHead:
    base = tiny_llama(dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return ClassifyHead(model.eval(), tiny_tokenizer(), LABEL_WORDS, prompt=PROMPT)


def make_examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        length = int(torch.randint(5, 12, (), generator=generator))
        ids = tuple(torch.randint(2, 250, (length,), generator=generator).tolist())
        mask = tuple(2 <= position < length - 1 for position in range(length))
        examples.append(Example(f"unit{index}", ids, mask, index % 2, (False,) * length))
    return examples


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
