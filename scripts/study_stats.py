"""Paired differences with bootstrap intervals."""

import functools

import numpy as np

DRAWS = 1000


@functools.lru_cache
def bootstrap_weights(count: int) -> np.ndarray:
    """How often each of `count` items is drawn in each bootstrap sample, divided by `count`: float32 [DRAWS, count]."""
    rng = np.random.default_rng(0)
    rows = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(DRAWS)]
    return np.stack(rows).astype(np.float32) / count


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of differences [S, N] between two networks, of S seeds on N test images.

    A percentile bootstrap that draws seeds and images with replacement, independently of each other; every seed gets the same
    images, since these are shared. The draws are always the same ones.
    """
    S, N = differences.shape
    means = differences.astype(np.float32) @ bootstrap_weights(N).T  # S, DRAWS
    chosen = np.random.default_rng(1).integers(S, size=(S, DRAWS))
    means = np.take_along_axis(means, chosen, axis=0).mean(0)  # DRAWS
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)
