"""Models that take several rows of one sample, ``[B, C, T]``, against autograd on one sample at a time."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, one_by_one, random_parameters

_GPT = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "gpt": (transformers.OpenAIGPTDoubleHeadsModel, transformers.OpenAIGPTConfig, _GPT),
    "gpt2": (transformers.GPT2DoubleHeadsModel, transformers.GPT2Config, _GPT),
    "bert": (transformers.BertForMultipleChoice, transformers.BertConfig, {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }),
}  # fmt: skip
SHAPES = [(3, 2, 7), (2, 4, 5), (2, 2, 2), (1, 3, 6), (4, 1, 5), (4, 2, 4)]


def make(name: str) -> nn.Module:
    kind, config, changes = MODELS[name]
    config = config(**changes, num_labels=1)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in key or "pdrop" in key):
            setattr(config, key, 0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return random_parameters(kind(config).double().train(), std=0.05)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the choice, and a sum of all scores: those of the choices, or those of the words."""
    choice = ids[:, 0, 0] % ids.shape[1]
    if "DoubleHeads" not in type(model).__name__:
        scores = model(input_ids=ids).logits
        return functional.cross_entropy(scores, choice, reduction="none") + 0.1 * scores.sum(dim=1)
    last = torch.full(ids.shape[:2], ids.shape[2] - 1)
    y = model(input_ids=ids, mc_token_ids=last)
    scores = torch.log_softmax(y.logits, dim=-1)
    weights = torch.randn(scores.shape[1:], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    of_words = (scores * weights).flatten(1).sum(dim=1)
    return functional.cross_entropy(y.mc_logits, choice, reduction="none") + of_words


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_in_full(name, shape):
    assert_exact(make(name), some_ids(*shape), losses)


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_other_shapes_through_one_engine(name):
    model = make(name)
    engine = PerSampleGradients(model)
    found = [engine.backward(losses(model, some_ids(*shape))).materialize() for shape in SHAPES]
    engine.detach()
    for shape, rows in zip(SHAPES, found, strict=True):
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = [
            torch.cat([g.flatten() for g in torch.autograd.grad(losses(model, sample), parameters)])
            for sample in some_ids(*shape).split(1)
        ]
        torch.testing.assert_close(rows, torch.stack(expected))


class Pairs(nn.Module):
    """Two texts of one record side by side, laid out by the model itself or by its caller."""

    def __init__(self, lays_out: bool) -> None:
        super().__init__()
        self.table, self.out, self.lays_out = nn.Embedding(60, 6), nn.Linear(6, 6), lays_out

    def forward(self, first, second=None):
        ids = torch.stack([first, second], dim=1).flatten(0, 1) if self.lays_out else first
        return self.out(self.table(ids).mean(dim=1)).unflatten(0, (-1, 2))


def pair_losses(model: nn.Module, ids: Tensor) -> Tensor:
    y = model(ids[:, 0], ids[:, 1]) if model.lays_out else model(ids.flatten(0, 1))
    return functional.softplus(y[:, 0].sum(dim=1) - y[:, 1].square().sum(dim=1))


class TestPairs:
    @staticmethod
    def pairs(lays_out: bool) -> nn.Module:
        return random_parameters(Pairs(lays_out).double())

    @pytest.mark.parametrize("batch", [3, 2, 1])
    def test_laid_out_by_the_model(self, batch):
        assert_exact(self.pairs(True), some_ids(batch, 2, 5), pair_losses)

    def test_laid_out_by_the_caller_and_one_record_after_others(self):
        model, ids = self.pairs(False), some_ids(3, 2, 5)
        expected = one_by_one(copy.deepcopy(model), ids, pair_losses)
        engine = assert_exact(model, ids, pair_losses, expected=expected)
        found = engine.backward(pair_losses(model, ids[:1])).materialize()
        torch.testing.assert_close(found, expected[:1])

    def test_one_record_at_first_needs_its_unit(self):
        model, ids = self.pairs(False), some_ids(1, 2, 5)
        engine = PerSampleGradients(model)
        with pytest.raises(PrivacyError, match=r"got 2 rows and there is one loss.*unit_ids"):
            engine.backward(pair_losses(model, ids))
        found = engine.backward(pair_losses(model, ids), [7]).materialize()
        engine.detach()
        torch.testing.assert_close(found, one_by_one(model, ids, pair_losses))
