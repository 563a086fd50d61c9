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
from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.noise import Noise
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import BatchGradients, TrainableParameter
from securetune.privacy.per_sample.layout import refuse_moved

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
    """What a distributed strategy does for a step. Each method is called on all processes, in one order."""

    @property
    def reduces_micro_batches(self) -> bool:
        """Whether each micro-batch is reduced into shards, so that no process holds the whole sum."""
        ...

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Say which ranges of the flat vector are reduced on their own.

        Args:
            parameters: The trainable parameters in canonical order.

        Returns:
            Ranges that cover the flat vector, each entry once; the same on every process. They cut no
                parameter where micro-batches are reduced.
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

    def places(self, layer: slice, shard: Tensor) -> Sequence[tuple[Tensor, Address]]:
        """Say where the entries of a shard lie in the canonical flat vector.

        Args:
            layer: One of :meth:`layers`.
            shard: As :meth:`reduce_sum` returned it.

        Returns:
            Contiguous views of the shard, each with its address; what is in none of them is padding.
        """
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

    def update(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer use the gradients that it was given, and forget them.

        Args:
            grads: Owner of the parameters.
            optimizer: Who updates.
        """
        ...

    def add_counts(self, *counts: Tensor) -> None:
        """Add up small tensors over all processes, in place and in one collective.

        Args:
            *counts: Any shape; integers stay below 2^53.
        """
        ...

    def refuse_other_parameters(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that owns other parameters than the trainable ones.

        Args:
            grads: Owner of the parameters.
            optimizer: Who updates.

        Raises:
            PrivacyError: If some are missing, or others would train without noise.
        """
        ...


class SingleProcess:
    """One process owns everything, as one layer."""

    reduces_micro_batches = False

    def layers(self, parameters: Sequence[TrainableParameter]) -> Sequence[slice]:
        """Return the whole vector as one range."""
        return [slice(0, parameters[-1].stop)]

    def reduce_sum(self, layer: slice, summed: Tensor) -> Tensor:
        """Return the sum as it is."""
        return summed

    def places(self, layer: slice, shard: Tensor) -> Sequence[tuple[Tensor, Address]]:
        """Return the range's own place."""
        return [(shard, Address(layer.start, (len(shard),), (1,)))]

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
            if flat.grad is None and len(shard) == len(flat):
                flat.grad = shard.to(flat.dtype)
                return
            flat.grad = torch.empty_like(flat) if flat.grad is None else flat.grad
            flat.grad[layer] = shard
            return
        for place in grads.parameters:
            start, stop = max(place.start, layer.start), min(place.stop, layer.stop)
            if start >= stop:
                continue
            if (start, stop) == (place.start, place.stop):
                part = shard[start - layer.start : stop - layer.start].view(place.shape)
                place.parameter.grad = part.to(place.parameter.dtype)
                continue
            if place.parameter.grad is None:
                place.parameter.grad = torch.empty_like(place.parameter)
            part = place.parameter.grad.view(-1)[start - place.start : stop - place.start]
            part.copy_(shard[start - layer.start : stop - layer.start])

    def update(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Step, and drop every ``.grad``."""
        parameters, flat = grads.owned_by_optimizer
        optimizer.step()
        for parameter in [*parameters, *([] if flat is None else [flat])]:
            parameter.grad = None

    def add_counts(self, *counts: Tensor) -> None:
        """Do nothing: they are all there are."""

    def refuse_other_parameters(self, grads: PerSampleGradients, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that owns other parameters than the trainable ones, or than the flat one."""
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        _, flat = grads.owned_by_optimizer
        if flat is not None and len(owned) == 1 and owned[0] is flat:
            refuse_moved(grads.parameters, flat)
            return
        require_exactly(grads.parameters, owned, over="[grads.flat_params]")


def require_exactly(
    parameters: Sequence[TrainableParameter], owned: Sequence[nn.Parameter], *, over: str | None = None
) -> None:
    """Refuse an optimizer that owns other parameters than the trainable ones.

    Args:
        parameters: The trainable ones.
        owned: What the optimizer owns; frozen ones do not count.
        over: What else it may be created over, for the message.

    Raises:
        PrivacyError: If some are missing, or others would train without noise.
    """
    expected = {id(place.parameter) for place in parameters}
    found = {id(parameter) for parameter in owned if parameter.requires_grad}
    missing = [place.name for place in parameters if id(place.parameter) not in found]
    unknown = len(found - expected)
    if missing or unknown:
        raise PrivacyError(
            f"the optimizer must own exactly the trainable parameters: {len(missing)} are missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {unknown} are unknown to the per-sample "
            "gradients and would train without noise. Create it over [p for p in model.parameters() if "
            f"p.requires_grad]{f', or over {over}' if over else ''}."
        )


class Accumulator:
    """The float32 sum of a step's clipped gradients, over micro-batches and processes.

    Args:
        grads: Per-sample gradients.
        reduction: How processes add up.

    Attributes:
        summed: ``[P]``: this process' sum; None where micro-batches are reduced into shards.
    """

    def __init__(self, grads: PerSampleGradients, reduction: Reduction) -> None:
        self._grads, self._reduction = grads, reduction
        self._layers = list(reduction.layers(grads.parameters))
        self._shards: list[Tensor] | None = None
        self.summed = None if reduction.reduces_micro_batches else self._zeros(grads.num_params)

    def add(self, batch: BatchGradients, factors: Tensor, group_of: Sequence[int] | None = None) -> None:
        """Add a micro-batch; see :meth:`BatchGradients.accumulate`."""
        if self.summed is not None:
            batch.accumulate(factors, self.summed, group_of)
            return
        parts = batch.accumulate_layers(factors, self._layers, group_of)
        reduced = (
            self._reduction.reduce_sum(layer, part) for layer, part in zip(self._layers, parts, strict=True)
        )
        if self._shards is None:
            self._shards = list(reduced)
        else:
            for shard, part in zip(self._shards, reduced, strict=True):
                shard += part

    def reduced(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each layer with the shard that this process owns, summed over processes."""
        if self._shards is not None:
            yield from zip(self._layers, self._shards, strict=True)
            return
        for layer in self._layers:
            part = self._zeros(layer.stop - layer.start) if self.summed is None else self.summed[layer]
            yield layer, self._reduction.reduce_sum(layer, part)

    def clear(self) -> None:
        """Start the next step."""
        self._shards = None
        if self.summed is not None:
            self.summed.zero_()

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=self._grads.compute_dtype, device=self._grads.device)


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
