"""A small model of every kind of layer, and a private step that charges no file."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from securetune.privacy.clipping import Clipping, FlatClipping
from securetune.privacy.noise import NoiseSource
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import PrivateStep
from tests.per_sample_oracle import random_parameters

KEY = bytes(range(32))
CLIP = 0.8
DIVISOR = 10
VOCAB = 23


class Ledger:
    """Counts charges; stands in for the file where nothing is released for good."""

    def __init__(self, noise_multiplier: float) -> None:
        self.state = SimpleNamespace(
            header=SimpleNamespace(noise_multiplier=noise_multiplier, reportable_epsilon=False)
        )
        self.charged = 0

    def charge(self) -> None:
        self.charged += 1


def private(
    engine: PerSampleGradients,
    *,
    clipping: Clipping | None = None,
    sigma: float = 0.0,
    optimizer=None,
) -> PrivateStep:
    parameters = [place.parameter for place in engine.parameters]
    return PrivateStep(
        engine,
        optimizer or torch.optim.SGD(parameters, lr=1.0),
        clipping=clipping or FlatClipping(CLIP),
        noise_multiplier=sigma,
        expected_batch_size=DIVISOR,
        noise=NoiseSource(KEY),
        ledger=Ledger(sigma),  # pyright: ignore[reportArgumentType]
    )


class SmallModel(nn.Module):
    """Tied or untied language model with every kind of layer: tables, norms, linear layers, a bare scale."""

    def __init__(self, *, tied: bool, width: int = 6, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
        self.hidden, self.norm = nn.Linear(width, width), norm(width)
        self.scale = Scale(width)
        self.head = nn.Linear(width, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.places(torch.arange(ids.shape[1])[None])
        return self.head(self.norm(x + self.scale(torch.tanh(self.hidden(self.hidden(x))))))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


def small_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids)[:, :-1].float() if model.head.weight.dtype != torch.float64 else model(ids)[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def small_model(*, seed: int = 0, dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(seed)
    return random_parameters(SmallModel(**options), seed=seed).to(dtype)


def some_ids(batch: int = 4, tokens: int = 6, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def clipped_sum(engine: PerSampleGradients, losses: torch.Tensor, clipping: Clipping) -> torch.Tensor:
    step = private(engine, clipping=clipping)
    step.accumulate(losses)
    return step.summed.double()
