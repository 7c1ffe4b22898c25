"""Reference for label propagation: a readable form of the original's steps.

Shapes: N patches, C channels of labels, K context frames.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def window_mask(rows: int, columns: int, radius: int) -> Tensor:
    """[N, N], 1 where both patches are at most `radius` rows and columns apart."""
    mask = torch.zeros(rows, columns, rows, columns)
    for i in range(rows):
        for j in range(columns):
            for p in range(2 * radius + 1):
                for q in range(2 * radius + 1):
                    y, x = i - radius + p, j - radius + q
                    if 0 <= y < rows and 0 <= x < columns:
                        mask[i, j, y, x] = 1
    return mask.reshape(rows * columns, rows * columns)


class Propagation:
    """All pairs of patches, exponentials of all similarities, zeros outside the window and below the k-th largest."""

    def __init__(self, features: Tensor, labels: Tensor, n_last_frames: int = 7, radius: int = 12, topk: int = 5):
        self.grid = features.shape[:2]
        self.first = (features.flatten(0, 1), labels.flatten(0, 1))  # N, D and N, C
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.n_last_frames, self.topk = n_last_frames, topk
        self.mask = window_mask(*self.grid, radius) if radius else None

    def step(self, features: Tensor) -> Tensor:
        target = features.flatten(0, 1)  # N, D
        contexts = [self.first, *self.queue]
        query = F.normalize(target, dim=1, p=2)
        sources = F.normalize(torch.stack([feature.clone() for feature, _ in contexts]), dim=2, p=2)  # K, N, D
        affinity = torch.exp(torch.bmm(query.expand(len(contexts), -1, -1), sources.transpose(1, 2)) / 0.1)  # K, N, N
        if self.mask is not None:
            affinity *= self.mask
        affinity = affinity.transpose(2, 1).reshape(-1, len(query))  # K*N, N: a column per query
        values, _ = torch.topk(affinity, dim=0, k=self.topk)
        affinity[affinity < values.min(dim=0).values] = 0
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        labels = torch.cat([label for _, label in contexts]).T @ affinity  # C, N
        labels = labels.T.contiguous()  # N, C
        self.queue.append((target, labels))
        self.queue = self.queue[max(len(self.queue) - self.n_last_frames, 0) :]
        return labels.view(*self.grid, -1)


def mask_of(soft: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Labels [H, W] of soft labels [rows, columns, C]."""
    maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    for channel in maps:
        if channel.max() > 0 and channel.max() > channel.min():
            channel -= channel.min().clone()
            channel /= channel.max().clone()
    labels = maps.argmax(0).numpy().astype(np.uint8)
    return np.array(Image.fromarray(labels).resize(size[::-1], 0))
