"""Frozen features for every evaluation: which blocks, which part.

Letters: B batch, D width of the backbone, n number of last blocks, N patches, M training images.
"""

import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from distributed import all_gather_rows, get_world_size
from evaluation.names import PARTS
from heads import split_sizes
from telemetry import progress
from utils import InputError


def select_part(x: torch.Tensor, dim: int, part: str, hp1: float) -> torch.Tensor:
    """Columns of `part` in features x [B, n*D], whose last `dim` = D columns are the last block's.

    The cut is in the last block only: `main_part` keeps all columns of the earlier blocks (the original's protocol).
    """
    if part == "ALL":
        return x
    _, ef = split_sizes(dim, hp1)
    return x[:, :-ef] if part == "main_part" else x[:, -ef:]


class FeatureExtractor(nn.Module):
    """Images [B, 3, H, W] -> features [B, self.dim] of a frozen backbone.

    A ViT gives the [CLS] tokens of its last n blocks, each after the final norm, side by side; with `avgpool` the mean patch
    token of the last block stands behind them (interleaved for ALL with n = 1, as DINO's published linear weights expect).
    Other backbones give their pooled features. `part` cuts [CLS] (of the last block) and mean token alike.

    Raises InputError for an unknown part, an empty one, or blocks that the backbone does not have.
    """

    def __init__(self, backbone: nn.Module, part="ALL", hp1=1.0, n_last_blocks=1, avgpool=False):
        super().__init__()
        if part not in PARTS:
            raise InputError(f"part {part!r}: must be one of {', '.join(PARTS)}")
        self.is_vit = hasattr(backbone, "get_intermediate_layers") and hasattr(backbone, "get_last_selfattention")
        if avgpool and not self.is_vit:
            raise InputError("--avgpool_patchtokens true: only a ViT has patch tokens; this backbone's features are pooled")
        if self.is_vit and not 1 <= n_last_blocks <= len(backbone.blocks):
            raise InputError(f"--n_last_blocks {n_last_blocks}: must lie in 1..{len(backbone.blocks)}")
        self.backbone, self.part, self.hp1, self.avgpool = backbone, part, hp1, avgpool
        self.n_last_blocks = n_last_blocks if self.is_vit else 1
        width = backbone.embed_dim
        self.dim = self._select(torch.empty(1, self.n_last_blocks * width)).shape[1]
        if avgpool:
            self.dim += self._select(torch.empty(1, width)).shape[1]

    def _select(self, x: torch.Tensor) -> torch.Tensor:
        return select_part(x, self.backbone.embed_dim, self.part, self.hp1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.is_vit:
            return self._select(self.backbone(images))  # B, dim
        blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # n tensors B, 1+N, D
        cls = torch.cat([tokens[:, 0] for tokens in blocks], dim=-1)  # B, n*D
        if not self.avgpool:
            return self._select(cls)  # B, dim
        mean = blocks[-1][:, 1:].mean(1)  # B, D
        if self.part == "ALL" and self.n_last_blocks == 1:
            return torch.stack([cls, mean], dim=-1).flatten(1)  # B, 2*D: c0, m0, c1, m1, ...
        return torch.cat([self._select(cls), self._select(mean)], dim=-1)  # B, dim


@torch.no_grad()
def extract_features(
    model: FeatureExtractor, loader: DataLoader, device: torch.device, header: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, dim] and labels [M] of this process's share of the data, which may be empty, on `device`.

    With a `header` the progress is printed.
    """
    features, labels = [torch.empty(0, model.dim, device=device)], [torch.empty(0, dtype=torch.long)]
    for images, batch_labels in progress(loader, header, len(loader.dataset)) if header else loader:
        features.append(model(images.to(device, non_blocking=True)).float())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels).to(device)


def gather_in_order(rows: torch.Tensor, total: int) -> torch.Tensor:
    """The `total` rows of a dataset, in its order, from the rows of each process's `shard`; every process gets all."""
    world = get_world_size()
    order = torch.cat([torch.arange(rank, total, world) for rank in range(world)]).to(rows.device)
    gathered = all_gather_rows(rows)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)
