"""Tables that are looked up once for all samples, against ordinary autograd on one sample at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import assert_exact, randn, random_parameters, square_losses


def add_in_place(x: Tensor, p: Tensor) -> Tensor:
    x = 1 * x
    x += p
    return x


USES = {
    "added": lambda x, p: x + p,
    "added to": lambda x, p: p + x,
    "in place": add_in_place,
    "multiplied": lambda x, p: x * p,
    "twice": lambda x, p: x * p + p,
    "unsqueezed": lambda x, p: x + p.unsqueeze(0),
    "indexed": lambda x, p: x + p[None],
    "cast": lambda x, p: x + p.to(x.dtype)[None].contiguous(),
}
REPEATED = {
    "expanded": lambda x, p: x + p.unsqueeze(0).expand(len(x), -1, -1).sin(),
    "expanded to a shape": lambda x, p: x + p.expand(len(x), *p.shape).sin(),
    "repeated": lambda x, p: x + p.repeat(len(x), 1, 1).sin(),
}


class Placed(nn.Module):
    """Looks positions up once for all samples, as small GPTs do."""

    def __init__(self, use) -> None:
        super().__init__()
        self.positions, self.layer, self.use = nn.Embedding(9, 6), nn.Linear(6, 6), use

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.use(x, self.positions(torch.arange(x.shape[1])))))


@pytest.mark.parametrize("tokens", [1, 3, 5, 6])
@pytest.mark.parametrize("use", USES)
def test_positions_for_all_samples(use, tokens):
    assert_exact(random_parameters(Placed(USES[use]).double()), randn(3, tokens, 6))


@pytest.mark.parametrize("tokens", [5, 6])
@pytest.mark.parametrize("use", REPEATED)
def test_positions_repeated_for_each_sample(use, tokens):
    assert_exact(random_parameters(Placed(REPEATED[use]).double()), randn(3, tokens, 6))


@pytest.mark.parametrize("use", REPEATED)
def test_positions_repeated_as_often_as_there_are_of_them(use):
    model = random_parameters(Placed(REPEATED[use]).double())
    engine = PerSampleGradients(model)
    with pytest.raises(PrivacyError, match="coupled"):
        engine.backward(square_losses(model, randn(3, 3, 6)))
    engine.detach()
    # an earlier batch has told
    engine = PerSampleGradients(model)
    engine.backward(square_losses(model, randn(3, 5, 6)))
    found = engine.backward(square_losses(model, randn(3, 3, 6))).materialize()
    engine.detach()
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
        )
        for loss in square_losses(model, randn(3, 3, 6))
    ]
    torch.testing.assert_close(found, torch.stack(rows))


def scale_in_place(x: Tensor, p: Tensor) -> Tensor:
    p.mul_(2.0)
    return x + p


@pytest.mark.parametrize("use", [scale_in_place, lambda x, p: x + torch.sin(p)], ids=["in place", "sine"])
def test_positions_that_changed_first_are_refused(use):
    model = random_parameters(Placed(use).double())
    with torch.no_grad():
        expected = model(randn(3, 6, 6))
    engine = PerSampleGradients(model)
    torch.testing.assert_close(model(randn(3, 6, 6)), expected)
    with pytest.raises(PrivacyError, match="coupled"):
        engine.backward(square_losses(model, randn(3, 6, 6)))


class Of(nn.Module):
    """Looks up one id for each sample, read from the sample."""

    def __init__(self, use, **layers) -> None:
        super().__init__()
        self.table, self.layers, self.use = nn.Embedding(9, 6), nn.ModuleDict(layers), use

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0, 0].abs() * 10).long() % 9
        return self.use(self.layers, x, self.table(ids))


@pytest.mark.parametrize("tokens", [3, 5])
@pytest.mark.parametrize(
    "use",
    [
        lambda layers, _, row: layers["linear"](row),
        lambda layers, x, row: layers["linear"](torch.tanh(x.sum(dim=1) + row)),
        lambda layers, x, row: layers["linear"](torch.tanh(x + row[:, None])),
        lambda layers, x, row: layers["recurrent"](x, row.unsqueeze(0))[0],
        lambda layers, x, row: layers["deep"](x, row.unsqueeze(0).expand(3, -1, -1).contiguous())[0],
        lambda layers, x, row: torch.cat([x, row.unsqueeze(1)], dim=1) @ layers["linear"](row)[:, :, None],
    ],
    ids=["projected", "added", "added to all positions", "state", "state of each layer", "joined"],
)
def test_one_id_for_each_sample(use, tokens):
    layers = {
        "linear": nn.Linear(6, 6),
        "recurrent": nn.GRU(6, 6, batch_first=True),
        "deep": nn.GRU(6, 6, 3, batch_first=True),
    }
    assert_exact(random_parameters(Of(use, **layers).double()), randn(3, tokens, 6))


@pytest.mark.parametrize("has_positions", [True, False])
def test_compiled(has_positions):
    torch._dynamo.reset()
    use = lambda layers, x, row: layers["linear"](torch.tanh(x.sum(dim=1) + row))  # noqa: E731
    model = Placed(USES["added"]) if has_positions else Of(use, linear=nn.Linear(6, 6))
    assert_exact(
        random_parameters(model.double()),
        randn(3, 5, 6),
        wrap=lambda model: torch.compile(model, backend="aot_eager"),
    )
    torch._dynamo.reset()


@dataclass
class Batch:
    x: Tensor
    scale: Tensor


BATCHES = {
    "dictionary": lambda x, scale: {"x": x, "scale": scale},
    "tuple in a dictionary": lambda x, scale: {"pair": (x, scale)},
    "tokenizer's": lambda x, scale: transformers.BatchEncoding({"x": x, "scale": scale}),
    "dataclass": Batch,
    "namespace": lambda x, scale: SimpleNamespace(x=x, scale=scale),
}


class TakesBatch(nn.Module):
    """Takes all arguments as one object."""

    def __init__(self, make, has_rows: bool) -> None:
        super().__init__()
        self.positions, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.make, self.has_rows = make, has_rows

    def forward(self, batch):
        if isinstance(batch, Mapping):
            x, scale = batch["pair"] if "pair" in batch else (batch["x"], batch["scale"])
        else:
            x, scale = batch.x, batch.scale
        ids = torch.arange(x.shape[1])
        return (
            self.layer(torch.tanh(x + self.positions(ids[None] if self.has_rows else ids))) * scale[:, None]
        )


@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_positions_of_a_model_that_takes_one_object(make, has_rows):
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(model.make(x, x[:, 0])).square().flatten(1).sum(dim=1)

    assert_exact(random_parameters(TakesBatch(make, has_rows).double()), randn(3, 5, 6), losses)
