"""Ways to sample, written down from their definitions: the exact probability of every possible batch."""

from itertools import combinations

import numpy as np
from scipy.stats import norm


def batch_probabilities(
    num_records: int, sample_rate: float, max_batch_size: int
) -> dict[tuple[int, ...], float]:
    """Each batch of Poisson sampling truncated to ``max_batch_size``; rate 1 gives fixed-size sampling."""
    found: dict[tuple[int, ...], float] = {}
    for size in range(num_records + 1):
        for taken in combinations(range(num_records), size):
            probability = sample_rate**size * (1 - sample_rate) ** (num_records - size)
            if probability == 0:
                continue
            kept = list(combinations(taken, min(size, max_batch_size)))
            for batch in kept:
                found[batch] = found.get(batch, 0.0) + probability / len(kept)
    return found


def exact_delta(
    batches: dict[tuple[int, ...], float],
    records: tuple[float, ...],
    neighbour: tuple[float, ...],
    noise_multiplier: float,
    epsilon: float,
) -> float:
    """Hockey-stick divergence of one noised sum of scalar records, in the worse of the two directions."""
    reach = 9 * noise_multiplier + len(records)
    grid = np.linspace(-reach, reach, 8001)

    def density(values: tuple[float, ...]) -> np.ndarray:
        sums: dict[float, float] = {}
        for batch, probability in batches.items():
            total = sum(values[i] for i in batch)
            sums[total] = sums.get(total, 0.0) + probability
        return np.sum(
            [weight * norm.pdf(grid, mean, noise_multiplier) for mean, weight in sums.items()], axis=0
        )

    here, there = density(records), density(neighbour)
    width = grid[1] - grid[0]
    return max(
        float(np.maximum(here - np.exp(epsilon) * there, 0).sum() * width),
        float(np.maximum(there - np.exp(epsilon) * here, 0).sum() * width),
    )
