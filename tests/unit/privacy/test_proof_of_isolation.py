"""When it is proven again that a layer keeps samples apart: what the first batches hid is found."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import one_by_one, randn, random_parameters, relative_error, square_losses


class Chosen(nn.Module):
    """A layer that sees the rows of a mask only, one sample's after another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        y = x.new_zeros(*mask.shape, 3)
        y[mask] = self.layer(self.first(x)[mask])
        return y


@pytest.mark.parametrize("before", [[[5, 5]], [[4, 4], [5, 5], [3, 3]]])
def test_rows_that_the_data_choose_after_batches_that_had_as_many_of_each_sample(before):
    def losses(model, lengths):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        return (model(randn(2, 5, 6), mask) + 0.3).square().sum(dim=(1, 2))

    model = random_parameters(Chosen().double())
    engine = PerSampleGradients(model)
    for lengths in before:
        engine.backward(losses(model, lengths))
    with pytest.raises(PrivacyError, match=r"coupled.* layer layer"):
        engine.backward(losses(model, [5, 3]))


class Sorting(nn.Module):
    """A layer that sees the samples in the order of their first numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.layer(self.first(x)[order])[order.argsort()]


def test_samples_that_the_model_sorts_after_a_batch_that_came_sorted():
    model = random_parameters(Sorting().double())
    engine = PerSampleGradients(model)
    x = randn(4, 6)
    engine.backward(square_losses(model, x[x[:, 0].argsort()]))
    state = torch.get_rng_state()

    def go_on():
        for _ in range(64):
            engine.backward(square_losses(model, x))

    with pytest.raises(PrivacyError, match="coupled"):
        go_on()
    assert torch.equal(torch.get_rng_state(), state)


def test_flattened_positions_of_another_length_are_not_proven_again(monkeypatch):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    engine = PerSampleGradients(random_parameters(Flat().double()))
    passes = []
    differentiate = engine._differentiate
    monkeypatch.setattr(
        engine, "_differentiate", lambda *a, **options: (passes.append(1), differentiate(*a, **options))
    )
    for tokens in (5, 7, 4):
        engine.backward(square_losses(engine.model, randn(2, tokens, 6)))
    assert len(passes) == 2 + 3


class TestWeightsThatStartAtZero:
    """Below them all gradients are zero at first, so the first proof of isolation says nothing there."""

    class Branch(nn.Module):
        def __init__(self, mix) -> None:
            super().__init__()
            self.first, self.last, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.mix = mix

        def forward(self, x):
            return self.out(x + self.last(self.mix(self.first(x).tanh())))

    def branch(self, mix) -> nn.Module:
        model = random_parameters(self.Branch(mix).double())
        nn.init.zeros_(model.last.weight)
        return model

    @pytest.mark.parametrize("passes", [1, 2])
    @pytest.mark.parametrize("batch", [4, 3])
    def test_samples_coupled_below(self, passes, batch):
        model, x = self.branch(lambda h: h - h.mean(dim=0)), randn(4, 6)
        engine = PerSampleGradients(model, passes=passes)
        engine.backward(square_losses(model, x))
        nn.init.ones_(model.last.weight)
        engine.backward(square_losses(model, x[:1]))  # one sample alone proves nothing
        with pytest.raises(PrivacyError, match=r"coupled.* layer first"):
            engine.backward(square_losses(model, x[:batch]))

    @pytest.mark.parametrize("passes", [1, 2])
    def test_samples_apart_below(self, passes):
        model, x = self.branch(torch.sin), randn(4, 6)
        engine = PerSampleGradients(model, passes=passes)
        engine.backward(square_losses(model, x)).materialize()
        random_parameters(model, seed=1)
        for _ in range(2):
            found = engine.backward(square_losses(model, x)).materialize()
        engine.detach()
        assert relative_error(found, one_by_one(model, x)) < 1e-12

    def test_the_graph_is_kept_until_the_layer_had_a_gradient_only(self):
        model, x = self.branch(torch.sin), randn(4, 6)
        engine = PerSampleGradients(model)
        engine.backward(square_losses(model, x))
        random_parameters(model, seed=1)
        engine.backward(square_losses(model, x))
        losses = square_losses(model, x)
        engine.backward(losses)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            losses.sum().backward()


class TestLayersThatRunLater:
    class Branches(nn.Module):
        def __init__(self, mix) -> None:
            super().__init__()
            self.first, self.second, self.mix, self.runs = nn.Linear(6, 6), nn.Linear(6, 6), mix, False

        def forward(self, x):
            x = self.first(x)
            return self.mix(self.second(x)) if self.runs else x

    @pytest.mark.parametrize("passes", [1, 2])
    def test_samples_coupled_in_them(self, passes):
        model, x = random_parameters(self.Branches(lambda h: h - h.mean(dim=0)).double()), randn(4, 6)
        engine = PerSampleGradients(model, passes=passes)
        for model.runs in (False, False):
            engine.backward(square_losses(model, x))
        model.runs = True
        with pytest.raises(PrivacyError, match=r"coupled.* layer second"):
            engine.backward(square_losses(model, x))

    def test_proof_runs_once_for_each_that_is_new(self, monkeypatch):
        model, x = random_parameters(self.Branches(torch.sin).double()), randn(4, 6)
        engine, proofs = PerSampleGradients(model), []
        monkeypatch.setattr(engine, "_differentiate", functools.partial(self.count, engine, proofs))
        for model.runs in (False, True, False, True, True, False):
            engine.backward(square_losses(model, x))
        assert len(proofs) == 2 * 4  # two bits tell four samples apart

    @staticmethod
    def count(engine, proofs, losses, rows, **options):
        proofs += [rows] * (rows is not None)
        PerSampleGradients._differentiate(engine, losses, rows, **options)


class TestLossesThatUseMoreLater:
    """A head beside, that the first losses left out, is coupled once a later loss takes it in."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.beside = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 4)

        def forward(self, x):
            h = self.body(x).tanh()
            return self.head(h), self.beside(h)

    @staticmethod
    def contrastive(z: torch.Tensor) -> torch.Tensor:
        z = nn.functional.normalize(z, dim=1)
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    @pytest.mark.parametrize("before", ["run", "run without gradients", "checkpointed"])
    def test_samples_coupled_in_it(self, before):
        model, x = random_parameters(self.TwoHeads().double()), randn(4, 6)
        engine = PerSampleGradients(model)
        if before == "run without gradients":
            with torch.no_grad():
                model(x)
        for _ in range(3):
            h = model.body(x).tanh()
            if before == "run":
                model.beside(h)
            if before == "checkpointed":
                checkpoint(model.beside, h, use_reentrant=True)
            engine.backward(model.head(h).square().sum(dim=1))
        y, z = model(x)
        with pytest.raises(PrivacyError, match=r"coupled.* layer beside"):
            engine.backward(y.square().sum(dim=1) + self.contrastive(z))

    def test_samples_coupled_in_it_inside_of_reentrant_checkpointing(self):
        model, x = random_parameters(self.TwoHeads().double()), randn(4, 6)
        engine = PerSampleGradients(model)
        for _ in range(3):
            engine.backward(model(x)[0].square().sum(dim=1))
        coupled = checkpoint(
            lambda x: self.contrastive(model(x)[1]), x.requires_grad_(True), use_reentrant=True
        )
        with pytest.raises(PrivacyError, match=r"coupled.* layer beside"):
            engine.backward(coupled)


def test_rows_that_the_data_choose_where_another_backward_came_between():
    """The gradients of public records may be taken between forward and backward pass of private ones."""

    def losses(model, lengths):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        return model(randn(2, 5, 6), mask).square().flatten(1).sum(dim=1)

    model = random_parameters(Chosen().double())
    engine = PerSampleGradients(model)
    engine.backward(losses(model, [5, 5]))
    private = losses(model, [3, 5])
    engine.backward(losses(model, [5, 5]))
    with pytest.raises(PrivacyError, match="coupled"):
        engine.backward(private)


class TestLossesOfAnotherKindLater:
    """Each batch may have a loss of its own, of the same layers, and any of them may couple samples."""

    @staticmethod
    def losses(model, x, number):
        y = model(x)
        z = nn.functional.normalize(y, dim=1)
        contrast = nn.functional.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")
        return y.square().sum(dim=1) + (contrast if number % 2 else 0.0)

    def test_that_couple_samples(self):
        model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double(), randn(4, 6)
        engine = PerSampleGradients(model)
        engine.backward(self.losses(model, x, 0))
        with pytest.raises(PrivacyError, match="coupled"):
            engine.backward(self.losses(model, x, 1))

    def test_graphs_that_never_repeat_are_not_proven_without_end(self, monkeypatch):
        model, x = nn.Sequential(nn.Linear(6, 6)).double(), randn(4, 6)
        engine, proofs = PerSampleGradients(model), []
        count = functools.partial(TestLayersThatRunLater.count, engine, proofs)
        monkeypatch.setattr(engine, "_differentiate", count)
        for number in range(200):
            losses = square_losses(model, x)
            for _ in range(number):
                losses = losses.sin()
            engine.backward(losses)
        assert len(proofs) <= (16 + 4) * 4  # so many graphs, and half of the batches 16, 32, 64 and 128 too
