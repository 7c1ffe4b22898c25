"""The salient object of an image: TokenCut on the patch features of a ViT, then the bilateral solver.

Shapes: h w rows and columns of patches, D width of a feature.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clever.evaluation.saliency.bilateral_solver import bilateral_solver
from clever.evaluation.saliency.data import Example
from clever.evaluation.saliency.tokencut import Cut, tokencut

FEATURES = ("k", "q", "v", "kqv")  # keys, queries, values of the last attention, or all three concatenated


@dataclass
class Detection:
    """What was found in an image of H x W pixels."""

    cut: Cut
    mask: np.ndarray  # H, W, 0 or 1: TokenCut
    refined: np.ndarray  # H, W, 0..1: after the bilateral solver


@dataclass
class Detector:
    """TokenCut and the bilateral solver with their settings: example -> Detection."""

    backbone: nn.Module
    device: torch.device
    features: str = "k"  # one of FEATURES
    tau: float = 0.2
    sigmas: tuple[float, float, float] = (16, 16, 8)  # of the bilateral solver: space, luma, chroma

    def __call__(self, example: Example) -> Detection:
        """Raises FloatingPointError if the features are not finite."""
        patch_size = self.backbone.patch_embed.patch_size
        grid = tuple(side // patch_size for side in example.network_input.shape[1:])
        features = patch_features(self.backbone, example.network_input.to(self.device), self.features)  # h*w, D
        if not np.isfinite(features).all():
            raise FloatingPointError(f"features of image {example.pair.image}")
        cut = tokencut(features, grid, self.tau)
        mask = upsample(cut.mask, example.pixels.shape[:2])
        return Detection(cut, mask, bilateral_solver(example.pixels, mask, *self.sigmas))


@torch.no_grad()
def patch_features(backbone: nn.Module, image: Tensor, kind: str) -> np.ndarray:
    """Patch features [h*w, D] of a normalised image [3, H, W] in the last block's attention; `kind` is one of FEATURES."""
    queries, keys, values = backbone.get_last_qkv(image[None])  # 1, h*w, D
    chosen = {"k": [keys], "q": [queries], "v": [values], "kqv": [keys, queries, values]}[kind]
    return torch.cat(chosen, dim=-1)[0].float().cpu().numpy()


def upsample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One value per patch [h, w] -> one per pixel [H, W], by the nearest patch."""
    return F.interpolate(torch.from_numpy(values)[None, None].double(), size=size, mode="nearest")[0, 0].numpy()
