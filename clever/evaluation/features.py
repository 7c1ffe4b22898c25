"""Features of a frozen backbone, for every evaluation: which blocks, and which part of the representation.

Shapes: D width of the backbone, n number of last blocks, N patches, M images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, Subset

from clever.data.datasets import make_loader
from clever.distributed import all_gather_rows, broadcast_buffers, get_rank, get_world_size
from clever.models.heads import Split
from clever.models.layers import normalize
from clever.progress import with_progress
from clever.utils import IMAGENET_MEAN, IMAGENET_STD, InputError


def select_part(x: torch.Tensor, part: str, split: Split | None) -> torch.Tensor:
    """Columns of `part`, ALL, IR or EF, in features x [B, n*D], whose last D columns belong to the last block.

    Only the last block is split: IR keeps all columns of the earlier blocks (CLeVER's evaluation).
    """
    if part == "ALL":
        return x
    _, ef = split.widths
    return x[:, :-ef] if part == "IR" else x[:, -ef:]


class FeatureExtractor(nn.Module):
    """Images [B, 3, H, W] -> features [B, self.dim] of a frozen backbone.

    A ViT gives the concatenated [CLS] tokens of its last n blocks, each after the final norm; `avgpool` appends the mean patch
    token of the last block (for ALL and n = 1 interleaved, as DINO's published linear weights expect). Other backbones give
    their pooled features. The last block's [CLS] and the mean token are both split into IR and EF.

    Args:
        backbone: with `embed_dim`; frozen unless `train_backbone`.
        part: ALL, IR or EF.
        split: where the representation is cut; for ALL it does not matter.
        n_last_blocks: n, for a ViT.
        avgpool: for a ViT, append the mean patch token.
        train_backbone: compute gradients of the backbone.
        stats: mean and standard deviation of the channels, with which uint8 images are normalised.

    Raises:
        InputError: blocks or patch tokens that the backbone does not have.
    """

    def __init__(
        self, backbone: nn.Module, part: str = "ALL", split: Split | None = None, n_last_blocks: int = 1,
        avgpool: bool = False, train_backbone: bool = False,
        stats: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ):  # fmt: skip
        super().__init__()
        self.is_vit = hasattr(backbone, "get_intermediate_layers") and hasattr(backbone, "get_last_selfattention")
        if avgpool and not self.is_vit:
            raise InputError("--avgpool_patchtokens true: only a ViT has patch tokens; this backbone's features are pooled")
        if self.is_vit and not 1 <= n_last_blocks <= len(backbone.blocks):
            raise InputError(f"--n_last_blocks {n_last_blocks}: must lie in 1..{len(backbone.blocks)}")
        self.backbone, self.part, self.split, self.avgpool = backbone, part, split, avgpool
        self.train_backbone, self.stats = train_backbone, stats
        self.n_last_blocks = n_last_blocks if self.is_vit else 1
        widths = (self.n_last_blocks * backbone.embed_dim, *([backbone.embed_dim] if avgpool else []))
        self.dim = self.select(tuple(torch.empty(1, width) for width in widths)).shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.select(self.tokens(images))  # B, dim

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the features of all parts are selected from.

        Returns the [CLS] tokens of the last n blocks [B, n*D], or the pooled features [B, D]; with `avgpool` also the mean
        patch token [B, D].
        """
        if images.dtype == torch.uint8:
            images = normalize(images, *self.stats)
        with torch.set_grad_enabled(self.train_backbone and torch.is_grad_enabled()):
            if not self.is_vit:
                return (self.backbone(images),)  # B, D
            blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # n tensors B, 1+N, D
            cls = torch.cat([tokens[:, 0] for tokens in blocks], dim=-1)  # B, n*D
            return (cls, blocks[-1][:, 1:].mean(1)) if self.avgpool else (cls,)

    def select(self, tokens: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Features [B, dim] of this part. Extractors that differ only in the part have the same `tokens`."""
        if self.avgpool and self.part == "ALL" and self.n_last_blocks == 1:
            return torch.stack(tokens, dim=-1).flatten(1)  # B, 2*D: c0, m0, c1, m1, ...
        parts = [select_part(x, self.part, self.split) for x in tokens]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # B, dim


@torch.no_grad()
def extract_parts(
    extractors: Sequence[FeatureExtractor], loader: DataLoader, device: torch.device, header: str = ""
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features [M, dim] of extractors that differ only in the part, by one pass of the backbone, and labels [M], on `device`.

    They are those of this process's share of the data, which may be empty. With a `header`, progress is printed.
    """
    features = [[torch.empty(0, extractor.dim, device=device)] for extractor in extractors]
    labels = [torch.empty(0, dtype=torch.long)]
    for images, batch_labels in with_progress(loader, header, len(loader.dataset)) if header else loader:
        tokens = extractors[0].tokens(images.to(device, non_blocking=True))
        for rows, extractor in zip(features, extractors, strict=True):
            rows.append(extractor.select(tokens).float())  # B, dim
        labels.append(batch_labels.clone())  # a tensor of a worker lies in shared memory and keeps a file open
    return [torch.cat(rows) for rows in features], torch.cat(labels).to(device)


def shard(dataset: Dataset, rank: int, world_size: int) -> Subset:
    """Every `world_size`-th image, starting at `rank`: all ranks together have each image once, without padding."""
    return Subset(dataset, range(rank, len(dataset), world_size))


def extract_all(
    extractor: FeatureExtractor, dataset: Dataset, device: torch.device, batch_size: int, num_workers: int, header: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, dim] and labels [M] of all images of a dataset, in its order, on every process; they share the images.

    Raises FloatingPointError if features are not finite.
    """
    loader = make_loader(shard(dataset, get_rank(), get_world_size()), batch_size, num_workers=num_workers)
    (own,), own_labels = extract_parts([extractor], loader, device, header)
    features, labels = (gather_in_order(rows, len(dataset)) for rows in (own, own_labels))
    if not features.isfinite().all():
        raise FloatingPointError(f"{header or 'features'} of the network")
    return features, labels


@contextmanager
def in_eval_mode(backbone: nn.Module) -> Iterator[nn.Module]:
    """The backbone in eval mode, with the same buffers on every process; afterwards it is in the mode in which it was."""
    was_training = backbone.training
    broadcast_buffers(backbone)
    try:
        yield backbone.eval()
    finally:
        backbone.train(was_training)


def gather_in_order(rows: torch.Tensor, total: int) -> torch.Tensor:
    """All `total` rows of a dataset, in its order, on every process, from the rows of each process's `shard`."""
    world = get_world_size()
    order = torch.cat([torch.arange(rank, total, world) for rank in range(world)]).to(rows.device)
    gathered = all_gather_rows(rows)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)
