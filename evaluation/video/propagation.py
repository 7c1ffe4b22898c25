"""The labels of a video's first frame, carried through it by nearest neighbours among patches (Jabri et al., arXiv 2006.14613).

Letters: N patches in a grid of rows by columns, D width of a feature, C channels of labels, K context frames,
Q queries of a tile, S sources in reach of any of them, k neighbours that vote.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import InputError

TEMPERATURE = 0.1
TILE = {"cpu": 15, "cuda": 32}  # side of a tile in patches: small ones compute less in vain, a GPU wants fewer calls


def window_mask(queries: tuple[range, range], sources: tuple[range, range], radius: int) -> Tensor:
    """Which sources each query may see, [Q, S]: those at most `radius` rows and `radius` columns away.

    Both are given as their rows and columns in the grid.
    """
    # Rows by rows, columns by columns.
    rows, columns = (abs(np.subtract.outer(q, s)) <= radius for q, s in zip(queries, sources, strict=True))
    return torch.from_numpy(np.kron(rows, columns))  # Q, S


class Tile(NamedTuple):
    """Some queries, the sources in their reach, and 0 or -inf for each pair [Q, S] (None: all see all)."""

    queries: tuple[slice, slice]
    sources: tuple[slice, slice]
    barrier: Tensor | None


class Propagation:
    """Soft labels of one frame after the other, from those of the first and of the `n_last_frames` before.

    Each patch takes the mean label of its `topk` most similar context patches inside the window, weighted by
    exp(cosine / 0.1); patches as similar as the last of them vote too. The window reaches `radius` patches in each direction
    (0: the whole frame). Soft labels, not their maxima, are what later frames read.

    Similarities are computed tile by tile, at most `memory_mb` MiB of them at a time: the window's outside is mostly never
    computed, and no matrix of all pairs exists.

    Args:
        features: of the first frame, [rows, columns, D].
        labels: of its patches, [rows, columns, C].

    Raises:
        InputError: one query against all that it sees takes more than `memory_mb`.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, n_last_frames: int = 7, radius: int = 12, topk: int = 5, memory_mb: float = 256
    ):
        rows, columns, width = features.shape
        self.topk, self.done = topk, 0
        # Slot 0 is the first frame's; the others are written in turn. The order of contexts means nothing.
        self.features = features.new_empty(1 + n_last_frames, rows, columns, width)
        self.labels = labels.new_empty(1 + n_last_frames, rows, columns, labels.shape[-1])
        self.features[0], self.labels[0] = F.normalize(features, dim=-1), labels
        self.tiles = list(make_tiles(rows, columns, radius, len(self.features), memory_mb, features.device))

    def step(self, features: Tensor) -> Tensor:
        """Soft labels [rows, columns, C] of the next frame, from its features [rows, columns, D]."""
        features = F.normalize(features, dim=-1)
        contexts = min(self.done, len(self.features) - 1) + 1
        labels = torch.empty_like(self.labels[0])
        for queries, sources, barrier in self.tiles:
            seen = (slice(contexts), *sources)
            tile = vote(
                features[queries].flatten(0, 1),
                self.features[seen].flatten(1, 2),
                self.labels[seen].flatten(0, 2),
                barrier,
                self.topk,
            )  # Q, C
            labels[queries] = tile.view(*labels[queries].shape)
        if len(self.features) > 1:
            slot = 1 + self.done % (len(self.features) - 1)
            self.features[slot], self.labels[slot] = features, labels
        self.done += 1
        return labels


def make_tiles(rows: int, columns: int, radius: int, contexts: int, memory_mb: float, device: torch.device) -> Iterator[Tile]:
    """Tiles that cover the grid, as large as TILE and `memory_mb` allow."""
    reach = radius or max(rows, columns)
    side = min(TILE[device.type], max(rows, columns))
    while side > 1 and _megabytes(side, rows, columns, reach, contexts) > memory_mb:
        side -= 1
    needed = _megabytes(side, rows, columns, reach, contexts)
    if needed > memory_mb:
        raise InputError(f"--similarity_mb {memory_mb:g}: one patch takes {needed:.1f} with {contexts} context frames")
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            queries = _span(top, side, 0, rows), _span(left, side, 0, columns)
            sources = _span(top, side, reach, rows), _span(left, side, reach, columns)
            barrier = None
            if radius:
                outside = ~window_mask(queries, sources, radius)
                barrier = torch.zeros(outside.shape).masked_fill(outside, -math.inf).to(device)
            yield Tile(_slices(queries), _slices(sources), barrier)


def _span(start: int, side: int, reach: int, end: int) -> range:
    return range(max(start - reach, 0), min(start + side + reach, end))


def _slices(spans: tuple[range, range]) -> tuple[slice, slice]:
    return slice(spans[0].start, spans[0].stop), slice(spans[1].start, spans[1].stop)


def _megabytes(side: int, rows: int, columns: int, reach: int, contexts: int) -> float:
    """MiB of a tile's similarities, with the two copies and the mask that exact ties need."""
    queries = min(side, rows) * min(side, columns)
    sources = min(side + 2 * reach, rows) * min(side + 2 * reach, columns)
    return 13 * queries * contexts * sources / 2**20


def vote(queries: Tensor, sources: Tensor, labels: Tensor, barrier: Tensor | None, topk: int) -> Tensor:
    """Labels of the queries, [Q, C]: means over their `topk` most similar sources, weighted by exp(cosine / TEMPERATURE).

    Args:
        queries, sources: of unit length, [Q, D] and [K, S, D].
        labels: of the sources, [K*S, C].
        barrier: added to the similarities, 0 or -inf, [Q, S].
    """
    K, S, _ = sources.shape
    similarity = (queries @ sources.flatten(0, 1).T).view(-1, K, S)
    if barrier is not None:
        similarity += barrier[:, None]
    k = min(topk, K * S)
    # One more than k shows a tie at the last place. All of them lie where a context is among the best: a short list.
    count = min(k + 1, K * S)
    places = similarity.amax(1).topk(min(count, S)).indices  # Q, <= k+1
    shortlist = similarity.gather(2, places[:, None].expand(-1, K, -1)).flatten(1)  # Q, K * (<= k+1)
    best, picked = shortlist.topk(count)  # Q, k+1
    context, place = picked // places.shape[1], places.gather(1, picked % places.shape[1])
    source = (context * S + place)[:, :k]  # Q, k
    weights = (best[:, :k] / TEMPERATURE).softmax(-1)
    result = (weights[..., None] * labels[source]).sum(1)  # Q, C
    if count > k:
        tied = (best[:, k] == best[:, k - 1]) & best[:, k].isfinite()
        if tied.any():
            result[tied] = _vote_of_all(similarity.flatten(1)[tied], best[tied, k], labels)
    return result


def _vote_of_all(similarity: Tensor, least: Tensor, labels: Tensor) -> Tensor:
    """The same among all sources of similarity [Q, K*S] not below `least` [Q], however many those are."""
    similarity = similarity.masked_fill_(similarity < least[:, None], -math.inf)
    return similarity.div_(TEMPERATURE).softmax(-1) @ labels  # Q, C
