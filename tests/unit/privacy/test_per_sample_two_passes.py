"""Two backward passes against one: the same norms and the same clipped sums, without the layers' factors."""

import gc

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.clipping import AutomaticClipping, FlatClipping, GroupClipping, PerLayerClipping
from securetune.privacy.per_sample import BatchGradients, PerSampleGradients
from tests.per_sample_oracle import next_token_losses, random_parameters, relative_error
from tests.small_private import private

VOCAB = 60
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def make(family: str, *, dropout: float = 0.0, **changes) -> nn.Module:
    causal, classes = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    kind, config = {
        "llama": lambda: (causal, transformers.LlamaConfig(**_LLAMA | changes, attention_bias=True)),
        "llama tied": lambda: (causal, transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
        "gpt2": lambda: (causal, transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1)),
        "mixtral": lambda: (causal, transformers.MixtralConfig(
            **_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
        # one layer, used three times
        "albert": lambda: (classes, transformers.AlbertConfig(
            **_BERT, embedding_size=8, classifier_dropout_prob=0.0, bos_token_id=2, eos_token_id=3)),
        "bert": lambda: (classes, transformers.BertConfig(**_BERT)),
    }[family]()  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    return random_parameters(kind.from_config(config).double().train(), std=0.05)


def some_ids(batch: int = 4, tokens: int = 9) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(3))


def losses_of(family: str):
    def class_losses(model, ids):
        return functional.cross_entropy(model(input_ids=ids).logits, ids[:, 0] % 2, reduction="none")

    return class_losses if family in ("albert", "bert") else next_token_losses


def checkpointed(model: nn.Module, *, use_reentrant: bool = False, **options) -> nn.Module:
    options["use_reentrant"] = use_reentrant
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def clipped_sum(engine, losses, clipping, unit_ids=None):
    """Norms and the clipped sum, as the private step makes them."""
    group_of = clipping.assign(engine.parameter_names())
    batch = engine.backward(losses, unit_ids)
    squared = batch.squared_norms(group_of, clipping.num_groups)
    out = torch.zeros(engine.num_params, dtype=engine.compute_dtype)
    batch.accumulate(clipping.factors(squared), out, group_of)
    return squared, out


def assert_same(family, clipping_of, *, wrap=lambda model: model, unit_ids=None, dropout=0.0, ids=None):
    ids, found = some_ids() if ids is None else ids, []
    for passes in (1, 2):
        model = make(family, dropout=dropout)
        engine = PerSampleGradients(model, passes=passes)
        for step in range(2):
            torch.manual_seed(step)  # dropout masks
            losses = losses_of(family)(wrap(model), ids)
            found.append(clipped_sum(engine, losses, clipping_of(), unit_ids))
    for (norms, summed), (other_norms, other) in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(other_norms, norms, rtol=1e-9, atol=1e-18)
        assert relative_error(other, summed) < 1e-9


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
class TestSameAsOnePass:
    @pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "mixtral", "albert", "bert"])
    def test_flat_clipping(self, family):
        assert_same(family, lambda: FlatClipping(0.05))

    # adapters and norm layers write their own rows, and must not add to them in the second pass
    @pytest.mark.parametrize("has_adapters", [False, True])
    def test_gradients_written_out(self, has_adapters):
        rows = []
        for passes in (1, 2):
            model = make("llama")
            if has_adapters:
                config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
                torch.manual_seed(0)
                model = random_parameters(get_peft_model(model, config).double(), std=0.05)
            batch = PerSampleGradients(model, passes=passes).backward(next_token_losses(model, some_ids()))
            rows.append(batch.materialize())
        torch.testing.assert_close(rows[1], rows[0], rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("family", ["llama tied", "gpt2", "mixtral"])
    def test_under_gradient_checkpointing(self, family, use_reentrant):
        def wrap(model):
            if use_reentrant:
                model.enable_input_require_grads()
            return checkpointed(model, use_reentrant=use_reentrant)

        assert_same(family, lambda: FlatClipping(0.05), wrap=wrap)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_dropout_masks_are_those_of_the_first_pass(self, use_reentrant):
        assert_same(
            "gpt2",
            lambda: FlatClipping(0.05),
            wrap=lambda model: checkpointed(model, use_reentrant=use_reentrant),
            dropout=0.3,
        )

    @pytest.mark.parametrize(
        "clipping",
        [
            lambda: AutomaticClipping(0.1),
            lambda: PerLayerClipping(0.1),
            lambda: GroupClipping({"model.embed*": 0.05, "model.[!e]*": 0.02, "lm_head*": 0.1}),
        ],
        ids=["automatic", "per layer", "groups"],
    )
    def test_factors_by_group(self, clipping):
        assert_same("llama", clipping)

    @pytest.mark.parametrize("family", ["llama tied", "albert", "mixtral"])
    def test_joint_units(self, family):
        assert_same(family, lambda: FlatClipping(0.05), unit_ids=["a", "b", "a", "c"])

    @pytest.mark.parametrize("batch", [0, 1])
    def test_few_samples(self, batch):
        assert_same("llama", lambda: FlatClipping(0.05), ids=some_ids(4)[:batch] if batch else some_ids(1))
        if not batch:
            engine = PerSampleGradients(model := make("llama"), passes=2)
            grads = engine.backward(next_token_losses(model, some_ids(1))[:0])
            assert grads.squared_norms().shape == (0, 1)

    def test_every_sample(self):
        model = make("llama tied")
        expected = PerSampleGradients(model).backward(next_token_losses(model, some_ids())).materialize()
        model = make("llama tied")
        engine = PerSampleGradients(model, passes=2)
        found = engine.backward(next_token_losses(model, some_ids())).materialize()
        assert relative_error(found, expected) < 1e-12
        assert engine.check(lambda rows: next_token_losses(model, some_ids()[rows]), 3) < 1e-9

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_sample_contributes_zero(self, value):
        sums = []
        for passes in (1, 2):
            model = make("llama")
            engine = PerSampleGradients(model, passes=passes)
            losses = next_token_losses(model, some_ids())
            engine.backward(losses).accumulate(torch.zeros(4, 1), torch.zeros(engine.num_params))
            losses = next_token_losses(model, some_ids()) * torch.tensor([1.0, value, 1.0, 1.0])
            sums.append(clipped_sum(engine, losses, FlatClipping(0.05))[1])
        assert sums[0].isfinite().all()
        assert sums[0].any()
        assert relative_error(sums[1], sums[0]) < 1e-9

    def test_private_step(self):
        sums = []
        for passes in (1, 2):
            model = make("llama tied")
            step = private(PerSampleGradients(model, passes=passes))
            for ids in some_ids(4).split(2):
                step.accumulate(next_token_losses(model, ids))
            step.accumulate_public(next_token_losses(model, some_ids(3)), weight=0.1)
            step.finish()
            sums.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-9, atol=1e-12)

    def test_adapters_need_one_pass(self):
        model = get_peft_model(make("llama"), LoraConfig(r=3), autocast_adapter_dtype=False).double()
        engine = PerSampleGradients(model, passes=2)
        assert type(engine.backward(next_token_losses(model, some_ids()))) is BatchGradients


def live_storages() -> dict[int, int]:
    """Address and bytes of all tensors that Python holds, so without what autograd saved for itself."""
    tensors = (x for x in gc.get_objects() if type(x) is torch.Tensor)
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-37])
def test_a_layer_used_several_times_on_a_sample_whose_squares_vanish(scale):
    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return sum(self.layer(part) for part in x.unbind(dim=1))

    model = random_parameters(Often())
    x = torch.randn(4, 7, 5, 6, generator=torch.Generator().manual_seed(1))
    x[1] *= scale
    expected = PerSampleGradients(model)
    whole = expected.backward((model(x) + 0.3).square().sum(dim=(1, 2))).materialize().sum(dim=0)
    expected.detach()
    engine = PerSampleGradients(model, passes=2)
    grads = engine.backward((model(x) + 0.3).square().sum(dim=(1, 2)))
    out = torch.zeros(engine.num_params)
    grads.accumulate(torch.ones(4, 1), out)
    assert relative_error(out, whole.double()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_factors_of_no_layer_outlive_it(monkeypatch):
    kept = {}
    for passes in (1, 2):
        # so wide that factors are smaller than the gradients, and so deep that one block is little of it
        model = make("llama", num_hidden_layers=8, hidden_size=64, intermediate_size=96)
        engine = PerSampleGradients(checkpointed(model), passes=passes)
        losses = next_token_losses(model, some_ids(4, 12))
        record, calls, most = engine.record_dense, [], [0]

        out = torch.zeros(engine.num_params, dtype=torch.float64)
        gc.collect()
        before = set(live_storages())

        def watched(*args, record=record, calls=calls, most=most, before=before):
            record(*args)
            calls.append(None)
            if len(calls) % 10 == 0:
                live = live_storages()
                most[0] = max(most[0], sum(live[address] for address in live.keys() - before))

        monkeypatch.setattr(engine, "record_dense", watched)
        grads = engine.backward(losses)
        grads.squared_norms()
        grads.accumulate(torch.ones(4, 1), out)
        kept[passes] = most[0]
        engine.detach()
        del losses, grads, engine, model, record, watched
    assert kept[2] < 0.4 * kept[1]


class TestRefusals:
    def test_other_numbers_of_passes(self):
        with pytest.raises(ValueError, match="passes must be 1 or 2, got 3"):
            PerSampleGradients(make("llama"), passes=3)

    def test_second_use_of_the_second_pass(self):
        model = make("llama")
        engine = PerSampleGradients(model, passes=2)
        grads = engine.backward(next_token_losses(model, some_ids()))
        out = torch.zeros(engine.num_params, dtype=torch.float64)
        grads.accumulate(torch.ones(4, 1), out)
        with pytest.raises(PrivacyError, match="once for each backward"):
            grads.accumulate(torch.ones(4, 1), out)

    def test_gradients_of_an_earlier_batch(self):
        model = make("llama")
        engine = PerSampleGradients(model, passes=2)
        grads = engine.backward(next_token_losses(model, some_ids()))
        engine.backward(next_token_losses(model, some_ids()))
        with pytest.raises(PrivacyError, match="earlier backward"):
            grads.accumulate(torch.ones(4, 1), torch.zeros(engine.num_params))

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
    def test_dropout_masks_that_checkpointing_draws_anew(self):
        model = checkpointed(make("gpt2", dropout=0.3), preserve_rng_state=False)
        engine = PerSampleGradients(model, passes=2)
        grads = engine.backward(next_token_losses(model, some_ids()))
        with pytest.raises(PrivacyError, match="second pass saw other values"):
            grads.accumulate(torch.ones(4, 1), torch.zeros(engine.num_params, dtype=torch.float64))
