import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from securetune.errors import CheckpointError, ConfigError, PrivacyError
from securetune.privacy.ledger import read_ledger
from securetune.privacy.sampling import PoissonSampler
from securetune.training.trainer import per_sequence_losses
from tests.private_trainer import (
    KEY,
    ROWS,
    NoNoise,
    arguments,
    clipped_sum,
    flat,
    lora,
    loss_alone,
    trainable,
    trainer_for,
)
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("calibrated_once")


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_step_is_the_clipped_sum_for_any_micro_batch_and_accumulation(
    tmp_path, micro, accumulation, smoothing
):
    model = lora(tiny_llama(dtype=torch.float64)).double()
    sampler = PoissonSampler(len(ROWS), 0.5, KEY)
    drawn = sampler.draw(0)
    clip = 0.5 * float(
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss_alone(model, ROWS[2]), trainable(model))]
        ).norm()
    )
    expected, before = clipped_sum(model, [ROWS[i] for i in drawn], clip, smoothing), flat(model)
    args = arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=clip,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer = trainer_for(tmp_path, model, args, sampler=sampler, noise=NoNoise())
    trainer.train()
    assert 1 < len(drawn) < len(ROWS)
    torch.testing.assert_close(before - flat(model), expected / 4, rtol=1e-5, atol=5e-8)  # float32 factors


def test_without_clipping_and_noise_it_is_the_plain_trainer_on_the_mean_of_sequences(tmp_path):
    model = lora(tiny_llama())
    plain = copy.deepcopy(model)

    class SequenceMean(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return per_sequence_losses(model(**inputs).logits, labels, is_shifted=True).mean()

    options = {"warmup_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "max_steps": 4}
    SequenceMean(
        plain, arguments(tmp_path / "plain", per_device_train_batch_size=8, gradient_accumulation_steps=1,
                         max_grad_norm=0.0, **options),
        train_dataset=ROWS, data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    ).train()  # fmt: skip
    args = arguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=1e6, **options
    )
    trainer_for(tmp_path, model, args, sample_rate=1.0, target_epsilon=50.0, noise=NoNoise()).train()
    start = flat(lora(tiny_llama()))
    assert float((flat(model) - start).abs().max()) > 1e-3
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-4, atol=1e-4)


def test_batch_mate_changes_the_sum_by_no_more_than_the_clipping_norm(tmp_path):
    # with the plain Trainer's division by the batch's tokens a long batch-mate moves everything
    rows = [*ROWS[:3], {"input_ids": [5] * 60, "attention_mask": [1] * 60, "labels": [5] * 60}]
    sums = []
    for part in (rows, rows[:3]):
        model = lora(tiny_llama())
        before = flat(model)
        args = arguments(
            tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            per_device_train_batch_size=4, gradient_accumulation_steps=1, max_grad_norm=0.1,
        )  # fmt: skip
        trainer_for(
            tmp_path, model, args, train_dataset=part, sample_rate=1.0, target_epsilon=50.0, noise=NoNoise(),
            ledger=tmp_path / f"{len(part)}.jsonl",
        ).train()  # fmt: skip
        sums.append((before - flat(model)) * 4)
    assert 0.099 < float((sums[0] - sums[1]).norm()) <= 0.1 * 1.0001


def test_nothing_unnoised_is_logged_saved_or_returned(tmp_path):
    trainer = trainer_for(tmp_path, args=arguments(tmp_path, save_strategy="steps", save_steps=1))
    output = trainer.train()
    assert math.isnan(output.training_loss)
    assert "train_loss" not in output.metrics
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 2
    allowed = {
        "grad_norm", "learning_rate", "epoch", "step", "epsilon", "train_runtime", "train_samples_per_second",
        "train_steps_per_second", "total_flos",
    }  # fmt: skip
    for entry in trainer.state.log_history:
        assert set(entry) <= allowed
        assert entry.get("total_flos", 0) == 0
    assert logs[-1]["epsilon"] == pytest.approx(trainer.epsilon)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all("loss" not in entry for entry in state["log_history"])
    assert not list((tmp_path / "out").rglob("rng_state*"))
    assert trainer.private_loss is None or trainer.private_loss > 0


def test_gradient_that_callbacks_see_is_the_noised_one(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            steps = read_ledger(tmp_path / "out" / "ledger.jsonl").steps_charged
            seen.append((steps, torch.cat([p.grad.flatten() for p in trainable(model)])))

    trainer = trainer_for(tmp_path, callbacks=[Look()])
    trainer.train()
    assert [steps for steps, _ in seen] == [1, 2]
    stddev = trainer.private.plan.noise_multiplier * 1.0 / 4
    assert float(seen[0][1].std()) == pytest.approx(stddev, rel=0.1)


def test_epochs_are_expected_passes(tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1.5)
    trainer = trainer_for(tmp_path, args=args)
    output = trainer.train()
    assert output.global_step == 3  # an epoch is 2 steps at a rate of 1/2
    assert trainer.private.ledger.steps_charged == 3
    assert trainer.private.plan.spec.expected_batch_size == 4
    assert trainer.epsilon <= 8.0


def test_empty_samples_still_step(tmp_path):
    model = lora(tiny_llama())
    before = flat(model)
    trainer = trainer_for(tmp_path, model, train_dataset=ROWS[:1], sample_rate=1e-9, delta=1e-12)
    assert trainer.train().global_step == 2
    assert trainer.private_loss is None
    assert not torch.equal(before, flat(model))


def test_resumed_run_counts_every_step_and_draws_new_keys(tmp_path):
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=2)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 3:
                raise KeyboardInterrupt

    first = trainer_for(tmp_path, args=args, callbacks=[Kill()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    ledger = tmp_path / "out" / "ledger.jsonl"
    assert read_ledger(ledger).steps_charged == 3
    second = trainer_for(tmp_path, args=args)
    output = second.train(resume_from_checkpoint=True)
    # from the checkpoint of step 2; the third step was lost but stays paid for
    assert output.global_step == 4
    assert read_ledger(ledger).steps_charged == 5
    keys = [trainer.private._step._noise._key for trainer in (first, second)]
    assert keys[0] != keys[1]
    with pytest.raises(PrivacyError, match="all 5 planned steps are charged"):
        trainer_for(tmp_path, args=args).train()


def test_resuming_restores_the_optimizer(tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **rest):
            if state.global_step == 2:
                raise KeyboardInterrupt

        def on_train_begin(self, args, state, control, optimizer=None, **rest):
            seen[state.global_step] = len(optimizer.state_dict()["state"])

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, args=args, callbacks=[Save()]).train()
    trainer_for(tmp_path, args=args, callbacks=[Look()]).train(resume_from_checkpoint=True)
    assert seen == {2: len(trainable(lora(tiny_llama())))}


def test_checkpoint_with_a_lost_ledger_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer_for(tmp_path, args=args).train()
    (tmp_path / "out" / "ledger.jsonl").unlink()
    with pytest.raises(PrivacyError, match="lost or shortened"):
        trainer_for(tmp_path, args=args).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-2" / "privacy.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        trainer_for(tmp_path, args=args).train(resume_from_checkpoint=True)


def test_public_evaluation_may_stop_early_and_choose_but_all_is_paid(tmp_path):
    args = arguments(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.0,
    )  # fmt: skip
    trainer = trainer_for(
        tmp_path, args=args, public_eval_dataset=ROWS[:3], callbacks=[EarlyStoppingCallback(1)]
    )
    output = trainer.train()
    assert output.global_step < 6
    assert trainer.epsilon == pytest.approx(trainer.private.plan.epsilon)
    assert trainer.state.log_history[-1]["epsilon"] == trainer.epsilon  # also what trackers keep
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        float(torch.stack([loss_alone(trainer.model, row) for row in ROWS[:3]]).mean()), rel=1e-4
    )


@pytest.mark.parametrize(
    "option",
    [
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 2},
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "all"},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": None},
        {"optim": "adalomo"},
        {"enable_jit_checkpoint": True},
        {"skip_memory_metrics": False},
        {
            "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
            "gradient_accumulation_steps": 1,
        },
    ],
    ids=lambda option: next(iter(option)),
)
def test_option_that_breaks_the_guarantee_is_refused_by_name(tmp_path, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        trainer_for(tmp_path, args=arguments(tmp_path, **option))


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": []}])
def test_rows_that_are_still_text_are_refused_with_the_remedy(tmp_path, row):
    with pytest.raises(ConfigError, match=r"columns \w+.*the model takes tokens. Give encode_sft\(rows"):
        trainer_for(tmp_path, train_dataset=[row] * 9)
    trainer_for(tmp_path, train_dataset=[row | ROWS[0]] * 9)


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_that_would_be_dropped_are_refused(tmp_path, mask):
    row = ROWS[0] | {mask: [0] * len(ROWS[0]["input_ids"])}
    trainer_for(tmp_path, train_dataset=[row] * 9)
    del row["labels"]
    with pytest.raises(ConfigError, match=rf"columns {mask} and no labels.*all tokens trained on"):
        trainer_for(tmp_path, train_dataset=[row] * 9)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": Stream()}, r"train_dataset must have a length and rows by number.*got Stream"),
        ({"train_dataset": None}, r"train_dataset must have a length.*got NoneType"),
        ({"train_dataset": []}, r"train_dataset must have a length.*got an empty list"),
        ({"sample_rate": 0.0}, r"sample_rate must be in \(0, 1\], got 0.0"),
        ({"sample_rate": -0.5}, r"sample_rate must be in \(0, 1\], got -0.5"),
    ],
    ids=["stream", "none", "empty", "zero", "negative"],
)
def test_arguments_that_allow_no_training_are_refused_by_name(tmp_path, options, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        trainer_for(tmp_path, **options)


def test_optimizer_whose_step_would_fail_after_it_was_paid_is_refused_before(tmp_path):
    model = lora(tiny_llama())
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    trainer = trainer_for(tmp_path, model, optimizers=(optimizer, None))
    with pytest.raises(PrivacyError, match="LBFGS computes the loss several times"):
        trainer.train()
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


class Untold(nn.Module):
    """A model whose outputs do not say which of them are the logits."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = nn.Linear(2, 3), outputs

    def forward(self, x, labels=None):
        return self.outputs(self.layer(x))


@pytest.mark.parametrize("outputs", [lambda y: (y,), lambda y: {"scores": y}], ids=["tuple", "dictionary"])
def test_outputs_without_logits_are_refused_with_the_remedy(tmp_path, outputs):
    rows = [{"x": [1.0, float(n)], "labels": n % 3} for n in range(6)]
    trainer = trainer_for(tmp_path, Untold(outputs), train_dataset=rows, data_collator=default_data_collator)
    with pytest.raises(PrivacyError, match=r"no 'logits'.*compute_loss_func"):
        trainer.train()


@pytest.mark.parametrize("is_frozen_before", [True, False])
def test_parameters_that_join_the_optimizer_later_are_refused(tmp_path, is_frozen_before):
    model = lora(tiny_llama())
    late = model.get_base_model().lm_head.weight if is_frozen_before else nn.Parameter(torch.zeros(3))
    before = late.detach().clone()

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **rest):
            late.requires_grad_(True)
            optimizer.add_param_group({"params": [late], "lr": 0.1, "weight_decay": 0.0})

    with pytest.raises(PrivacyError, match="without noise"):
        trainer_for(tmp_path, model, sample_rate=1.0, target_epsilon=50.0, callbacks=[Unfreeze()]).train()
    assert torch.equal(late, before)
    assert late.grad is None


def test_run_goes_on_in_one_process_with_samples_of_its_own(tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    drawn = []

    class Recording(PoissonSampler):
        def draw(self, step):
            drawn.append(step)
            return super().draw(step)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 2 and len(drawn) == 2:
                raise KeyboardInterrupt

    trainer = trainer_for(tmp_path, args=args, sampler=Recording(len(ROWS), 0.5), callbacks=[Kill()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert len(drawn) == len(set(drawn)) == 4


def test_loss_scaling_of_fp16_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.fp16 = True  # transformers itself wants a GPU for it
    with pytest.raises(ConfigError, match="fp16"):
        trainer_for(tmp_path, args=args)


def test_private_evaluation_and_search_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="public_eval_dataset"):
        trainer_for(tmp_path, eval_dataset=ROWS)
    with pytest.raises(ConfigError, match="public_eval_dataset"):
        trainer_for(tmp_path, public_eval_dataset={"a": ROWS[:3], "b": ROWS})
    with pytest.raises(PrivacyError, match="private records"):
        trainer_for(tmp_path).evaluate(ROWS)
    with pytest.raises(PrivacyError, match="private records"):
        trainer_for(tmp_path).predict(ROWS)
    with pytest.raises(PrivacyError, match="many times"):
        trainer_for(tmp_path).hyperparameter_search()


def test_own_loss_function_for_each_record_is_used(tmp_path):
    calls = []

    def own(outputs, labels, num_items_in_batch=None):
        calls.append(num_items_in_batch)
        return per_sequence_losses(outputs.logits, labels, is_shifted=True)

    trainer_for(tmp_path, compute_loss_func=own, sample_rate=1.0, target_epsilon=50.0).train()
    assert set(calls) == {None}


def test_collator_for_language_modelling_trains_on_all_tokens(tmp_path):
    model = lora(tiny_llama(dtype=torch.float64)).double()
    rows = [
        {"input_ids": row["input_ids"][:-1]} for row in ROWS[:3]
    ]  # without the end, which is padding here
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    expected, before = clipped_sum(model, labelled, 0.1), flat(model)
    args = arguments(
        tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.1
    )
    trainer_for(
        tmp_path, model, args, train_dataset=rows, sample_rate=1.0, target_epsilon=50.0, noise=NoNoise(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    ).train()  # fmt: skip
    torch.testing.assert_close(before - flat(model), expected / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("passes", "checkpointing"), [(1, False), (2, False), (2, True)])
def test_classifier_in_full_with_padding_collator(tmp_path, passes, checkpointing):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(ROWS)]
    args = arguments(
        tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.1, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    expected, before = torch.zeros_like(flat(model)), flat(model)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        loss = functional.cross_entropy(logits, torch.tensor([row["labels"]]))
        grads = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        pairs = zip(grads, trainable(model), strict=True)
        grad = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        expected += grad * min(1.0, 0.1 / float(grad.norm()))
    trainer_for(
        tmp_path, model, args, train_dataset=rows, sample_rate=1.0, target_epsilon=50.0, noise=NoNoise(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()), passes=passes,
    ).train()  # fmt: skip
    torch.testing.assert_close(before - flat(model), expected / 4, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_precision_checkpointing_and_compilation_change_rounding_only(tmp_path, option):
    moved = []
    for options in ({}, option):
        torch._dynamo.reset()
        model = lora(tiny_llama(num_hidden_layers=1))
        before = flat(model)
        args = arguments(
            tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", **options
        )
        trainer_for(
            tmp_path, model, args, sample_rate=1.0, target_epsilon=50.0, noise=NoNoise(),
            ledger=tmp_path / f"{len(options)}.jsonl",
        ).train()  # fmt: skip
        moved.append(before - flat(model))
    error = float((moved[0] - moved[1]).norm() / moved[0].norm())
    assert error < (0.1 if "bf16" in option else 1e-4)
    assert float(moved[0].norm()) > 0.1


def test_dataset_and_users_arguments_are_left_alone(tmp_path):
    args = arguments(tmp_path)
    trainer_for(tmp_path, args=args)
    assert args.gradient_accumulation_steps == 2
    assert args.ignore_data_skip is False


def test_number_of_records_is_not_told(tmp_path):
    trainer = trainer_for(tmp_path, train_dataset=ROWS[:5])
    assert trainer.num_examples(trainer.get_train_dataloader()) == 8  # 4 a step at a rate of 1/2


def test_dropout_masks_do_not_follow_from_the_seed_of_the_arguments(tmp_path):
    trainer_for(tmp_path, args=arguments(tmp_path, seed=7, max_steps=1)).train()
    assert torch.initial_seed() != 7


def test_row_without_labels_has_loss_zero():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, -100], [1, 2, 3]])
    losses = per_sequence_losses(logits, labels, is_shifted=True)
    assert float(losses[0]) == 0.0
    expected = functional.cross_entropy(logits[1, :-1], labels[1, 1:])
    torch.testing.assert_close(losses[1], expected)
