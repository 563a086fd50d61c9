"""Short runs of ``make_private`` on a tiny model, in float64."""

import torch
from torch import nn
from torch.nn import functional

from securetune.privacy.noise import NoiseSource
from securetune.privacy.private import make_private

N, D, K = 12, 5, 3
KEY = bytes(32)
NO_CLIP = 1e6


class NoNoise(NoiseSource):
    """A run without noise, to compare with truth; a fixed key, so no epsilon is reported."""

    def __init__(self):
        super().__init__(KEY)

    def normal(self, *, count, **address):
        return torch.zeros(count)


def records(count=N):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(D, generator=generator, dtype=torch.float64), i % K) for i in range(count)]


def tiny_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, K)).double()


def losses_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def private_run(tmp_path, model=None, optimizer=None, data=None, **options):
    model = model or tiny_net()
    settings = {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "expected_batch_size": 6,
        "max_grad_norm": 1.0,
        "steps": 3,
        "ledger": tmp_path / "ledger.jsonl",
    } | options
    if "sampler" not in settings:
        settings.setdefault("sample_rate", 0.5)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(model, optimizer, records() if data is None else data, **settings)


def train(private, model, *, micro_batch_size=4, scheduler=None):
    for batches in private.steps(micro_batch_size=micro_batch_size):
        for batch in batches:
            private.backward(losses_of(model, batch))
        private.step()
        if scheduler is not None:
            scheduler.step()
