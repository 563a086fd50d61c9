"""How the clipped sums of several processes become one, and which part each process noises and updates.

The private step knows one interface. A distributed strategy says which ranges of the canonical flat vector
are reduced on their own (layers), adds them up over the processes into the float32 shard that it owns, and
tells the canonical address of every entry of that shard. Noise is drawn by address, so it is the same
whatever the sharding, and never exists for more than one shard at a time.

Dimensions: ``P`` trainable parameters.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from securetune.privacy.noise import Noise
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import TrainableParameter

_NOISE_CHUNK = 1 << 24  # 64 MiB of noise at a time


class Address(NamedTuple):
    """Where the entries of a shard lie in the canonical flat vector: ``base + sum_k i_k * strides[k]``.

    The canonical vector holds the trainable parameters in the order of ``model.named_parameters()``, each in
    row-major order, without regard to wrappers. So the rows ``[lo, hi)`` of a ``[p, d]`` matrix that starts
    at ``s`` have the address ``(s + lo * d, (hi - lo, d), (d, 1))``, and its columns ``[lo, hi)`` have ``(s +
    lo, (p, hi - lo), (d, 1))``.

    Attributes:
        base: Canonical flat index of the first entry.
        shape: The shard's shape.
        strides: Distance in the flat vector between neighbours, by dimension.
    """

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield first index and length of each contiguous run, in the shard's row-major order."""
        length, inner = 1, len(self.shape)
        while inner and (self.strides[inner - 1] == length or self.shape[inner - 1] == 1):
            inner -= 1
            length *= self.shape[inner]
        if not math.prod(self.shape):
            return
        for place in product(*map(range, self.shape[:inner])):
            yield self.base + sum(i * stride for i, stride in zip(place, self.strides, strict=False)), length


class Reduction(Protocol):
    """What a distributed strategy does for the private step."""

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Say which ranges of the flat vector are reduced on their own.

        Args:
            parameters: The trainable parameters in canonical order.

        Returns:
            Ranges that cover the flat vector, each entry once; the same on every process.
        """
        ...

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Add the sums of all processes: the sum, never the mean.

        Args:
            layer: One of :meth:`layers`.
            summed: 1-D, float32: this process' part; may be overwritten.

        Returns:
            The shard that this process owns, float32, of any shape. The shards of all processes together hold
            every entry; replicas hold the same one.
        """
        ...

    def address(self, layer: slice, shard: Tensor) -> Address:
        """Say where the entries of a shard lie in the canonical flat vector."""
        ...

    def assign(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        layer: slice,
        shard: Tensor,
    ) -> None:
        """Make a shard the ``.grad`` of what the optimizer updates; it may be released already.

        Args:
            grads: Owner of the parameters.
            optimizer: Who updates next.
            layer: One of :meth:`layers`.
            shard: The released gradient of the shard, as :meth:`reduce_sum` shaped it.
        """
        ...


class SingleProcess:
    """One process owns everything, as one layer."""

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Return the whole vector as one range."""
        return [slice(0, parameters[-1].stop)]

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Return the sum as it is."""
        return summed

    def address(self, layer: slice, shard: Tensor) -> Address:
        """Return the range's own place."""
        return Address(layer.start, (len(shard),), (1,))

    def assign(
        self,
        grads: PerSampleGradients,
        optimizer: torch.optim.Optimizer,
        layer: slice,
        shard: Tensor,
    ) -> None:
        """Give the gradient to the flat parameter, or to each parameter, whichever the optimizer owns."""
        _, flat = grads.owned_by_optimizer
        if flat is not None and optimizer.param_groups[0]["params"][0] is flat:
            flat.grad = shard.to(flat.dtype)
            return
        for place in grads.parameters:
            part = shard[place.start : place.stop].view_as(place.parameter)
            place.parameter.grad = part.to(place.parameter.dtype)


def add_noise(
    shard: Tensor, address: Address, noise: Noise, *, step: int, stream: int, stddev: float
) -> None:
    """Add the noise of a shard's addresses, in place.

    Guarantees:
        Each entry gets the noise of its canonical index, whatever the shard's shape: shards of one step put
        together hold exactly the noise of the whole vector.

    Args:
        shard: Float32, of ``address.shape``, contiguous.
        address: Where its entries lie.
        noise: The run's noise.
        step: Logical step.
        stream: Stream of the noise.
        stddev: Standard deviation, in gradient units.

    Raises:
        ValueError: If the shard's shape is not the address'.
    """
    if tuple(shard.shape) != tuple(address.shape) or not shard.is_contiguous():
        raise ValueError(
            f"the shard must be contiguous and have its address' shape {tuple(address.shape)}, got shape "
            f"{tuple(shard.shape)} with strides {shard.stride()}."
        )
    flat, done = shard.view(-1), 0
    for first, length in address.runs():
        for start in range(0, length, _NOISE_CHUNK):
            values = flat[done + start : done + min(start + _NOISE_CHUNK, length)]
            values += noise.normal(
                step=step,
                stream=stream,
                start=first + start,
                count=len(values),
                stddev=stddev,
                device=values.device,
            )
        done += length
