"""What a distributed step computes, moves and waits for, and from that a prediction of its time.

The number of collectives and their bytes are exact for steps without an attack: a test counts them in real
runs. Except how many calls ZeRO-3 gathers weights with: DeepSpeed fetches ahead in buckets of its own, and
here each unit counts as one. What it frees of a model of more than 1e9 weights follows from its settings,
without a count. Times are predictions: every operation and byte at the rate of a data sheet, corrected by
published measurements where the text says so.

``given`` is what one process hands to a collective, padding included; a ring then sends ``ring_share`` of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Literal, NamedTuple

from securetune.privacy.distributed.collectives import sums_part_by_part

from ._shapes import Parameter, Shape
from ._workers import ring_share

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_SUM_BYTES = 4  # clipped sums are float32
_RANGE = 1 << 26  # entries that DataParallel and ZeRO-1 reduce at a time
_BUCKET_BYTES = 25 << 20  # of DistributedDataParallel
_FLAT_ALIGNMENT = 2  # entries of a process that DeepSpeed's flat vectors are padded to
_PERSISTENT = (
    100_000  # entries up to which ZeRO-3 keeps a parameter gathered (stage3_param_persistence_threshold)
)
_REUSED = 10**9  # entries within which it keeps what is used again (stage3_max_reuse_distance)
_UPDATE_BYTES = 28  # AdamW for each entry: gradient, parameter and two moments read, the last three written
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


class Call(NamedTuple):
    """Equal collectives of one step.

    Attributes:
        kind: As torch calls it.
        given: Bytes that a process hands over in each, padding included.
        times: How many; an expectation where the number of micro-batches is one.
        is_side: Whether it runs over gloo between CPUs, for counts and agreement.
        hides: Whether it can run beside the computation.
        in_buckets: Whether it may really be several, or one with others, of as many bytes in all.
        copied: Bytes that are copied besides in each: into what is sent, and out of what arrives.
    """

    kind: str
    given: float
    times: float
    is_side: bool = False
    hides: bool = False
    in_buckets: bool = False
    copied: float = 0.0

    def sent(self, size: int) -> float:
        """Bytes that a process sends on a ring, for all of them."""
        return self.times * self.given * ring_share(self.kind, size)


def calls_of(
    strategy: Strategy,
    shape: Shape,
    size: int,
    micro_batches: float,
    *,
    private: bool = True,
    in_recipe: bool = True,
) -> list[Call]:
    """List the collectives of one step.

    Args:
        strategy: How the processes share the model.
        shape: The model.
        size: How many processes.
        micro_batches: Of the process that has most of them; all keep pace with it.
        private: securetune's step, or the ordinary one of torch and DeepSpeed.
        in_recipe: Whether a recipe's training loop runs the step: it agrees on the number of micro-batches.

    Returns:
        The collectives; one process meets nobody in those that it has.
    """
    calls = [Call("barrier", 0, 1, is_side=True)] if private else []  # before the ledger is charged
    if size == 1:
        return calls
    calls += _parameter_calls(strategy, shape, size, micro_batches)
    sums = _private_sums if private else _ordinary_sums
    calls += sums(strategy, shape, size, micro_batches)
    if private:
        agreements = micro_batches if strategy in ("fsdp2", "zero3") else 0
        calls += [
            Call("broadcast", 1024, 1, is_side=True),  # what the ledger then holds
            Call("all_reduce", 16, 1 + agreements + (1 if in_recipe else 0), is_side=True),
        ]
    return calls


def _private_sums(strategy: Strategy, shape: Shape, size: int, micro_batches: float) -> Iterator[Call]:
    """Float32 sums: once for each step over whole vectors, or for each micro-batch and block into shards."""
    total = sum(parameter.entries for parameter in shape.trainable)
    if strategy == "ddp":
        for start in range(0, total, _RANGE):
            share = -(-min(_RANGE, total - start) // size)
            yield Call("reduce_scatter", _SUM_BYTES * size * share, 1)
            yield Call("all_gather", _SUM_BYTES * share, 1)  # the released gradient
    elif strategy == "zero1":
        for start in range(0, total, _RANGE):
            yield from _sum_of(_owned(start, min(start + _RANGE, total), total, size), 1)
    else:
        start = 0
        for _, members in groupby(shape.trainable, key=lambda parameter: _block_of(parameter.name)):
            block = list(members)
            stop = start + sum(parameter.entries for parameter in block)
            if strategy == "zero2":
                sizes = _owned(start, stop, total, size)
            else:
                is_flat = strategy == "zero3"
                sizes = _cut(tuple((p.entries, 1) if is_flat else (p.rows, p.width) for p in block), size)
            yield from _sum_of(sizes, micro_batches)
            start = stop


def _flat_share(total: int, size: int) -> int:
    """Entries of a process in DeepSpeed's flat vector."""
    return -(-total // (_FLAT_ALIGNMENT * size)) * _FLAT_ALIGNMENT


def _owned(start: int, stop: int, total: int, size: int) -> list[int]:
    """Count the entries of a range of the flat vector that each process owns."""
    share = _flat_share(total, size)
    return [max(0, min(stop, (rank + 1) * share) - max(start, rank * share)) for rank in range(size)]


@cache
def _cut(parameters: tuple[tuple[int, int], ...], size: int) -> list[int]:
    """Count the entries that each process gets of parameters of so many rows, of so many entries each."""
    shares = [(-(-rows // size), rows, width) for rows, width in parameters]
    return [
        sum(
            (min((rank + 1) * share, rows) - min(rank * share, rows)) * width for share, rows, width in shares
        )
        for rank in range(size)
    ]


def _sum_of(sizes: Sequence[int], times: float) -> Iterator[Call]:
    """Add up what processes own in parts of these lengths."""
    if sums_part_by_part(sizes):
        for length, parts in groupby(sorted(filter(None, sizes))):
            yield Call("reduce", _SUM_BYTES * length, times * len(list(parts)))
    else:
        yield Call("reduce_scatter", _SUM_BYTES * len(sizes) * max(sizes), times)


def _ordinary_sums(strategy: Strategy, shape: Shape, size: int, micro_batches: float) -> Iterator[Call]:
    """Sums in the parameters' own dtype, which run beside the backward pass."""
    total = sum(parameter.entries * parameter.item_bytes for parameter in shape.trainable)
    if strategy == "ddp":
        buckets = max(1, math.ceil(total / _BUCKET_BYTES))
        yield Call("all_reduce", total / buckets, buckets, hides=True)
    elif strategy == "zero1":
        yield Call("reduce_scatter", total, 1, hides=True)
    else:
        for unit in shape.units:
            given = size * sum(p.shard(size) * p.item_bytes for p in unit if p.trainable)
            if given:
                yield Call("reduce_scatter", given, micro_batches, hides=True)


def _parameter_calls(strategy: Strategy, shape: Shape, size: int, micro_batches: float) -> Iterator[Call]:
    """Gathers of parameters: for each pass where they are sharded, or once after a sharded update."""
    if strategy == "fsdp2":
        for unit in shape.units:
            # what is outside of the blocks is kept from the forward to the backward pass
            passes = 1 if unit is shape.units[-1] else 2
            given = _gathered(unit, size)
            if given:
                copied = given * (1 + size)
                yield Call("all_gather", given, passes * micro_batches, hides=True, copied=copied)
    elif strategy == "zero3":
        yield from _zero3_gathers(shape, size, micro_batches)
    elif strategy in ("zero1", "zero2"):
        item_bytes = shape.trainable[0].item_bytes
        share = _flat_share(sum(parameter.entries for parameter in shape.trainable), size)
        yield Call("all_reduce", _SUM_BYTES, 1)  # DeepSpeed's norm of the gradient
        yield Call("all_gather", item_bytes * share, 1)


def _zero3_gathers(shape: Shape, size: int, micro_batches: float) -> Iterator[Call]:
    """Small parameters once a step, after the update; large ones wherever DeepSpeed finds them freed.

    It frees what is not used again within so many entries. A model that is smaller stays gathered until the
    update; of a larger one, what is last in the forward pass stays until the backward pass.
    """
    yield Call("all_reduce", 2 * _SUM_BYTES, 1)  # the norm, in float64
    for parameter in shape.parameters:
        if parameter.entries <= _PERSISTENT:
            yield Call("all_gather", _flat_shard_bytes(parameter, size), 1, in_buckets=True)
    *blocks, others = shape.units
    left = total = sum(parameter.entries for parameter in shape.parameters)
    for unit in [others, *blocks]:
        given = sum(_flat_shard_bytes(p, size) for p in unit if p.entries > _PERSISTENT)
        is_freed = 2 * left >= _REUSED
        if unit is others and not any(parameter.trainable for parameter in others):
            is_freed = False  # no gradient reaches the embedding
        times = 1 if total < _REUSED else (2 if is_freed else 1) * micro_batches
        if given:
            yield Call("all_gather", given, times, hides=True, in_buckets=True, copied=given)
        left -= sum(parameter.entries for parameter in unit)


def _flat_shard_bytes(parameter: Parameter, size: int) -> float:
    return -(-parameter.entries // size) * parameter.item_bytes


def _gathered(unit: Sequence[Parameter], size: int) -> float:
    """Bytes of the largest shard, by rows."""
    return float(sum(parameter.shard(size) * parameter.item_bytes for parameter in unit))


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else name.rpartition(".")[0]


class Padding(NamedTuple):
    """What a Poisson draw costs processes that wait for each other.

    Attributes:
        share: Expected samples of the process that has most.
        micro_batches: Expected micro-batches of that process.
    """

    share: float
    micro_batches: float


def expected_padding(expected_batch: float, size: int, micro_batch: int) -> Padding:
    """Average over the Poisson draw of a step, whose samples are dealt out to processes one by one.

    The size of a Poisson sample is binomial; this takes its limit for a small sample rate, which varies most.

    Args:
        expected_batch: Expected samples of a step.
        size: How many processes.
        micro_batch: Samples of a full micro-batch.

    Returns:
        The expected largest share, and its micro-batches.
    """
    spread = 12 * math.sqrt(expected_batch) + 12
    share = micro_batches = 0.0
    for count in range(max(0, math.floor(expected_batch - spread)), math.ceil(expected_batch + spread)):
        log = count * math.log(expected_batch) - expected_batch - math.lgamma(count + 1)
        most = -(-count // size)
        share += math.exp(log) * most
        micro_batches += math.exp(log) * -(-most // micro_batch)
    return Padding(share, micro_batches)


class Cluster(NamedTuple):
    """Rates of the machines, per second and process, and latencies in seconds.

    Attributes:
        name: For tables.
        per_node: Processes of a machine.
        compute: FLOPs.
        memory: Bytes read or written.
        node_link: Bytes sent to another process of the machine.
        network: Bytes that a machine sends to another.
        start: A collective.
        node_hop: A step of a ring inside of a machine.
        network_hop: A step of a ring between machines.
        tree_node_hop: A step of a tree inside of a machine, for all-reduces where that is faster.
        tree_network_hop: A step of a tree between machines.
        side_hop: A message of gloo between two CPUs.
        side_barrier: What each further process adds to the barrier, which one process keeps.
        memory_bytes: Of a device.
        copies: Bytes copied from one place of the memory to another, new one.
        gather_link: As ``node_link``, for all-gathers, where they run at another rate.
        hides: Whether collectives run beside the computation; not where both need the same cores.
        fixed: Seconds of a step with nothing to compute or to move, where that was measured; it holds all
            latencies.
    """

    name: str
    per_node: int
    compute: float
    memory: float
    node_link: float
    network: float
    start: float
    node_hop: float
    network_hop: float
    tree_node_hop: float
    tree_network_hop: float
    side_hop: float
    side_barrier: float
    memory_bytes: float = math.inf
    copies: float = math.inf
    gather_link: float | None = None
    hides: bool = True
    fixed: float = 0.0


def seconds_of(call: Call, size: int, cluster: Cluster) -> float:
    """Return the time of the collectives, one after another."""
    rounds = 2 if call.kind == "all_reduce" else 1
    if call.is_side:
        hops = math.ceil(math.log2(size)) if call.kind == "broadcast" else rounds * (size - 1)
        each = cluster.side_barrier if call.kind == "barrier" else cluster.side_hop
        return call.times * hops * each
    nodes = math.ceil(size / cluster.per_node)
    between = rounds * (nodes - 1)
    hops = rounds * (size - 1) - between
    latency = hops * cluster.node_hop + between * cluster.network_hop
    if call.kind == "all_reduce":
        inside = min(size, cluster.per_node) - 1
        depth = math.log2(nodes)
        latency = min(latency, 2 * (inside * cluster.tree_node_hop + depth * cluster.tree_network_hop))
    link = cluster.node_link
    if call.kind == "all_gather" and cluster.gather_link is not None:
        link = cluster.gather_link
    rate = link if nodes == 1 else min(link, cluster.network)
    return call.times * (cluster.start + latency) + call.sent(size) / rate


class Prediction(NamedTuple):
    """Seconds of a step, by what they are spent on.

    Attributes:
        compute: Passes over the largest share of the sample.
        update: Memory sweep of the optimizer.
        exposed: Collectives that no computation hides.
        side: Agreement between CPUs.
        copies: Of gathered weights, between what is sent and what is used.
        fixed: What was measured of a step that does nothing.
    """

    compute: float
    update: float
    exposed: float
    side: float
    copies: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self)


def predict(
    strategy: Strategy,
    shape: Shape,
    size: int,
    cluster: Cluster,
    *,
    expected_batch: float,
    micro_batch: int,
    private: bool = True,
    padding: Padding | None = None,
    in_recipe: bool = True,
) -> Prediction:
    """Predict the time of a step.

    The ordinary step takes a batch of exactly ``expected_batch``; the private one a Poisson sample, and waits
    for the process with most of it. Collectives that can hide do so up to the whole time of the passes that
    they belong to.

    Args:
        strategy: How the processes share the model.
        shape: The model.
        size: How many processes.
        cluster: The machines.
        expected_batch: Samples of a step, over all processes.
        micro_batch: Samples of a process in one pass.
        private: securetune's step, or the ordinary one.
        padding: The largest share, where it is not that of a Poisson sample.
        in_recipe: As in :func:`calls_of`.

    Returns:
        The seconds.
    """
    if padding is None:
        share = math.ceil(expected_batch / size)
        exact = Padding(share, math.ceil(share / micro_batch))
        padding = expected_padding(expected_batch, size, micro_batch) if private else exact
    compute = padding.share * shape.flops(private=private) / cluster.compute
    entries = sum(parameter.entries for parameter in shape.trainable)
    update = _UPDATE_BYTES * entries / (1 if strategy == "ddp" else size) / cluster.memory
    micro_batches = max(1.0, padding.micro_batches)
    exposed = side = copies = hidden = hidden_once = 0.0
    for call in calls_of(strategy, shape, size, micro_batches, private=private, in_recipe=in_recipe):
        seconds = seconds_of(call, size, cluster)
        copies += call.times * call.copied / cluster.copies
        if call.is_side:
            side += seconds
        elif not (call.hides and cluster.hides):
            exposed += seconds
        elif call.times >= micro_batches:
            hidden += seconds
        else:
            hidden_once += seconds
    exposed += max(0.0, hidden - compute) + max(0.0, hidden_once - compute / micro_batches)
    return Prediction(compute, update, exposed, side, copies, cluster.fixed)


def state_bytes(strategy: Strategy, shape: Shape, size: int) -> float:
    """Return the bytes of parameters, float32 sums and optimizer state on a process, without activations."""
    weights = float(sum(parameter.entries * parameter.item_bytes for parameter in shape.parameters))
    entries = sum(parameter.entries for parameter in shape.trainable)
    moments = 2.0 * sum(parameter.entries * parameter.item_bytes for parameter in shape.trainable)
    sums = float(_SUM_BYTES * entries)
    if strategy == "ddp":
        return weights + moments + sums
    if strategy == "fsdp2":
        largest = max(sum(p.entries * p.item_bytes for p in unit) for unit in shape.units)
        return (weights + moments + sums) / size + largest
    moments = 12.0 * entries  # DeepSpeed keeps a float32 copy and two float32 moments
    held = weights if strategy != "zero3" else weights / size
    return held + moments / size + (sums if strategy == "zero1" else sums / size)
