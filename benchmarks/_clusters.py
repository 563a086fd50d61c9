"""Rates of machines: of GPUs from data sheets, of this machine by measuring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from ._roofline import H100
from ._scale import Cluster

if TYPE_CHECKING:
    from securetune.privacy.distributed import Processes

# Compute: the share of the peak that Llama 3 405B reached on 8,192 H100, 43 %, communication included
# (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, table 4). NVLink: 900 GB/s in both directions
# together (NVIDIA H100 data sheet). Network: 8 ConnectX-7 of 400 Gb/s a machine (NVIDIA DGX H100 data sheet).
# Latencies of rings and trees in the Simple protocol: NCCL's own model, src/graph/tuning.cc at 01afd20a77b5.
MODEL_FLOPS_UTILIZATION = 0.43
DGX_H100 = Cluster(
    name="DGX H100",
    per_node=8,
    compute=MODEL_FLOPS_UTILIZATION * H100.tensor,
    memory=H100.memory,
    node_link=450e9,
    network=8 * 50e9,
    start=8.4e-6,
    node_hop=3.4e-6,
    network_hop=9.6e-6,
    tree_node_hop=28e-6,
    tree_network_hop=50e-6,
    # Assumed, of no data sheet: a message over TCP between the CPUs of two machines.
    side_hop=50e-6,
    side_barrier=50e-6,
    memory_bytes=80e9,
)
_PAYLOAD = 1 << 22  # float32 entries: 16 MiB
_REPEATS = 7


def measure_links(processes: Processes) -> dict[str, float]:
    """Time this machine's collectives; every process calls it.

    Args:
        processes: Of the run, two or more.

    Returns:
        Bytes per second of a ring (``node_link``), and seconds of ``node_hop``, ``side_hop`` and
        ``side_barrier``, as ``Cluster`` has them; ``node_hop`` holds the start of a collective too.
    """
    size = processes.size
    small, large = torch.zeros(size), torch.zeros(_PAYLOAD)
    sizes = [1] * size
    start = _median_seconds(lambda: processes.sum_shards(small, sizes))
    seconds = _median_seconds(lambda: processes.sum_shards(large, [_PAYLOAD // size] * size))
    sent = 4 * _PAYLOAD * (size - 1) / size
    return {
        "node_link": sent / max(seconds - start, 1e-9),
        "node_hop": start / (size - 1),
        "side_hop": _median_seconds(lambda: processes.most(1)) / (2 * (size - 1)),
        "side_barrier": _median_seconds(lambda: processes.keep_pace("a measurement")) / (size - 1),
    }


def _median_seconds(function: Callable[[], object]) -> float:
    """Return the median time of a collective, the same on every process."""
    seconds: list[float] = []
    for _ in range(_REPEATS):
        dist.barrier()
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(seconds))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
