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
    copies=H100.memory / 2,  # each byte is read and written
)
_PAYLOAD = 1 << 22  # float32 entries: 16 MiB
_REPEATS = 7
_MATRIX = 512  # rows and columns
_PRODUCTS = 8


def measure_rates(processes: Processes) -> dict[str, float]:
    """Time this machine's products, copies and collectives, with all processes at work; each calls it.

    Args:
        processes: Of the run.

    Returns:
        ``compute``, ``copies``, ``node_link`` and ``gather_link``, as ``Cluster`` has them; of one process no
        links.
    """
    size = processes.size
    matrix, large = torch.rand(_MATRIX, _MATRIX), torch.zeros(_PAYLOAD)
    products = _median_seconds(lambda: [matrix @ matrix for _ in range(_PRODUCTS)])
    rates = {
        "compute": _PRODUCTS * 2.0 * _MATRIX**3 / products,
        "copies": 4 * _PAYLOAD / _median_seconds(large.clone),
    }
    if size == 1:
        return rates
    sizes = [_PAYLOAD // size] * size
    empty, own = torch.zeros(size), large[: sizes[0]]
    summing = _median_seconds(lambda: processes.sum_shards(large, sizes))
    gathering = _median_seconds(lambda: processes.gather_shards(own, sizes))
    start = _median_seconds(lambda: processes.sum_shards(empty, [1] * size))
    sent = 4 * _PAYLOAD * (size - 1) / size
    return rates | {
        "node_link": sent / max(summing - start, 1e-9),
        "gather_link": sent / max(gathering - start, 1e-9),
    }


def _median_seconds(function: Callable[[], object]) -> float:
    """Return the median time of what all processes do together, that of the slowest on every process."""
    seconds: list[float] = []
    for _ in range(_REPEATS):
        dist.barrier()
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(seconds))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
