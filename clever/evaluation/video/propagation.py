"""Label propagation through a video by nearest neighbours among patch features (Jabri et al., arXiv 2006.14613).

Shapes: C channels of the labels, K context frames, Q queries of a tile, S sources in each context frame, k neighbours.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1
# Side of a tile in patches. Small tiles compute fewer pairs outside the window; large ones need fewer calls.
TILE = {"cpu": 15, "cuda": 32}


def window_mask(queries: tuple[range, range], sources: tuple[range, range], radius: int) -> Tensor:
    """Allowed pairs, bool [Q, S]: a query attends to the sources at most `radius` rows and `radius` columns away.

    Queries and sources are rectangles of the grid, given as (rows, columns).
    """
    rows, columns = (abs(np.subtract.outer(q, s)) <= radius for q, s in zip(queries, sources, strict=True))
    return torch.from_numpy(np.kron(rows, columns))  # Q, S


class Tile(NamedTuple):
    """A rectangle of queries, and the rectangle of sources that contains their windows."""

    queries: tuple[slice, slice]  # rows, columns
    sources: tuple[slice, slice]
    attention_mask: Tensor | None  # Q, S: 0 for allowed pairs, -inf for all others; None: all pairs are allowed


class Propagation:
    """Propagates soft labels from the first frame of a video to the next ones, frame by frame.

    The context of a frame is the first frame and the `n_last_frames` frames before it. Each patch takes the mean label of its
    `topk` most similar context patches inside the window, weighted by exp(cosine / 0.1); patches that are exactly as similar
    as the last of them also count. The window extends `radius` patches in each direction (0: the whole frame). Later frames
    read the soft labels, not their maxima.

    Similarities are computed tile by tile, at most `memory_mb` MiB at a time. Most pairs outside the window are never
    computed, and the matrix of all pairs is never built.

    Args:
        features: of the first frame, [rows, columns, D].
        labels: of the patches of the first frame, [rows, columns, C].
    """

    def __init__(
        self, features: Tensor, labels: Tensor, n_last_frames: int = 7, radius: int = 12, topk: int = 5, memory_mb: float = 256
    ):
        rows, columns, width = features.shape
        self.topk, self.steps = topk, 0
        # Slot 0 holds the first frame; the others form a ring buffer. The order of context frames has no influence.
        self.features = features.new_empty(1 + n_last_frames, rows, columns, width)
        self.labels = labels.new_empty(1 + n_last_frames, rows, columns, labels.shape[-1])
        self.features[0], self.labels[0] = F.normalize(features, dim=-1), labels
        self.tiles = list(make_tiles(rows, columns, radius, len(self.features), memory_mb, features.device))

    def step(self, features: Tensor) -> Tensor:
        """Soft labels [rows, columns, C] of the next frame, from its features [rows, columns, D]."""
        features = F.normalize(features, dim=-1)
        contexts = min(self.steps, len(self.features) - 1) + 1
        labels = torch.empty_like(self.labels[0])
        for queries, sources, attention_mask in self.tiles:
            context = (slice(contexts), *sources)
            tile_labels = vote(
                features[queries].flatten(0, 1),  # Q, D
                self.features[context].flatten(1, 2),  # K, S, D
                self.labels[context].flatten(0, 2),  # K*S, C
                attention_mask,
                self.topk,
            )  # Q, C
            labels[queries] = tile_labels.view(labels[queries].shape)
        if len(self.features) > 1:
            slot = 1 + self.steps % (len(self.features) - 1)
            self.features[slot], self.labels[slot] = features, labels
        self.steps += 1
        return labels


def make_tiles(rows: int, columns: int, radius: int, contexts: int, memory_mb: float, device: torch.device) -> Iterator[Tile]:
    """Tiles that cover the grid, as large as TILE and `memory_mb` allow, but at least one patch."""
    reach = radius or max(rows, columns)
    side = min(TILE[device.type], max(rows, columns))
    while side > 1 and _megabytes(side, rows, columns, reach, contexts) > memory_mb:
        side -= 1
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            queries = _span(top, side, 0, rows), _span(left, side, 0, columns)
            sources = _span(top, side, reach, rows), _span(left, side, reach, columns)
            attention_mask = None
            if radius:
                allowed = window_mask(queries, sources, radius)
                attention_mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf).to(device)
            yield Tile(_slices(queries), _slices(sources), attention_mask)


def _span(start: int, side: int, reach: int, end: int) -> range:
    return range(max(start - reach, 0), min(start + side + reach, end))


def _slices(spans: tuple[range, range]) -> tuple[slice, slice]:
    return slice(spans[0].start, spans[0].stop), slice(spans[1].start, spans[1].stop)


def _megabytes(side: int, rows: int, columns: int, reach: int, contexts: int) -> float:
    """MiB of the similarities of a tile, with the two copies and the mask that exact ties need."""
    queries = min(side, rows) * min(side, columns)
    sources = min(side + 2 * reach, rows) * min(side + 2 * reach, columns)
    return 13 * queries * contexts * sources / 2**20


def vote(queries: Tensor, sources: Tensor, labels: Tensor, attention_mask: Tensor | None, topk: int) -> Tensor:
    """Labels of the queries [Q, C]: means over their `topk` most similar sources, weighted by exp(cosine / TEMPERATURE).

    Args:
        queries, sources: of unit length, [Q, D] and [K, S, D].
        labels: of the sources, [K*S, C].
        attention_mask: added to the similarities, [Q, S]: 0 for allowed pairs, -inf for all others.
    """
    K, S, _ = sources.shape
    similarity = (queries @ sources.flatten(0, 1).T).view(-1, K, S)
    if attention_mask is not None:
        similarity += attention_mask[:, None]
    k = min(topk, K * S)
    count = min(k + 1, K * S)  # one more than k: to detect a tie at the last place
    # A quick topk over K*S sources: the best of all frames lie at the positions whose maximum over frames is among the best.
    positions = similarity.amax(1).topk(min(count, S)).indices  # Q, <= k+1
    candidates = similarity.gather(2, positions[:, None].expand(-1, K, -1)).flatten(1)  # Q, K * (<= k+1)
    best, picked = candidates.topk(count)  # Q, k+1
    frame, position = picked // positions.shape[1], positions.gather(1, picked % positions.shape[1])
    source = (frame * S + position)[:, :k]  # Q, k
    weights = (best[:, :k] / TEMPERATURE).softmax(-1)
    result = (weights[..., None] * labels[source]).sum(1)  # Q, C
    if count > k:
        tied = (best[:, k] == best[:, k - 1]) & best[:, k].isfinite()
        if tied.any():
            result[tied] = _vote_with_ties(similarity.flatten(1)[tied], best[tied, k], labels)
    return result


def _vote_with_ties(similarity: Tensor, threshold: Tensor, labels: Tensor) -> Tensor:
    """The same over all sources whose similarity [Q, K*S] is at least `threshold` [Q], however many they are."""
    similarity = similarity.masked_fill_(similarity < threshold[:, None], -math.inf)
    return similarity.div_(TEMPERATURE).softmax(-1) @ labels  # Q, C
