"""The weighted k-NN classifier on frozen features (Wu et al., arXiv 1805.01978).

Shapes: D width of the features, M training images, N test images, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from clever.data.datasets import ImageDataset
from clever.distributed import all_reduce_sum, get_rank, get_world_size
from clever.evaluation.features import FeatureExtractor, extract_all, in_eval_mode, select_part
from clever.models.heads import Split
from clever.progress import with_progress

MIN_TEMPERATURE = 0.002  # exp(1 / 0.002) is 1e217
MAX_QUERIES, MAX_SIMILARITIES = 1024, 2**28  # of a chunk: at most 1 GiB of similarities


def search_neighbors(
    train_features: torch.Tensor, train_labels: torch.Tensor, features: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """For each chunk of B features: cosine similarities and classes [B, k] of their k nearest training features, nearest first.

    Also the chunk's place in `features`. Both kinds of features are L2-normalised, [M, D] and [N, D]; with k > M there are M
    neighbours. MAX_QUERIES and MAX_SIMILARITIES limit a chunk, and so the memory.
    """
    chunk = max(1, min(MAX_QUERIES, MAX_SIMILARITIES // len(train_features)))
    for start in range(0, max(1, len(features)), chunk):  # without features: one empty chunk
        rows = slice(start, start + chunk)
        similarity, nearest = (features[rows] @ train_features.T).topk(min(k, len(train_features)), dim=-1)  # B, k
        yield similarity, train_labels[nearest], rows


def knn_scores(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float = 0.07) -> torch.Tensor:
    """Class scores [B, C]: a neighbour with cosine similarity s votes exp(s / temperature) for its class.

    `similarity` and `labels` are those of the neighbours, [B, k]. The votes are float64, which suffices for temperatures of
    at least MIN_TEMPERATURE.
    """
    votes = (similarity.double() / temperature).exp()  # B, k
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)  # B, C


def knn_hits(
    similarity: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float
) -> torch.Tensor:
    """1 where the label [B] is the class with the most votes, or among the first five: uint8 [2, B].

    `similarity` and `classes` are those of the neighbours, [B, k]. A class without votes is never a hit.
    """
    best = knn_scores(similarity, classes, num_classes, temperature).topk(min(5, num_classes), dim=-1)  # B, 5
    right = (best.indices == labels[:, None]) & (best.values > 0)
    return torch.stack([right[:, 0], right.any(1)]).to(torch.uint8)


def knn_accuracies(
    train_features: torch.Tensor, train_labels: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, num_classes: int,
    device: torch.device, neighbors: Sequence[int] = (20,), temperatures: Sequence[float] = (0.07,),
    search_device: torch.device | None = None, header: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    """Top-1 and top-5 accuracies, in percent, for each k and temperature.

    Every process has all features, [M, D] and [N, D], and classifies its share of the N test images. A class without votes is
    never a hit: with k = 3 neighbours, top-5 is the share of images whose class is that of one of the three.

    Args:
        device: where the counts are summed over processes.
        search_device: where features are compared; default: there.
        header: of printed progress, if any.
    """
    rank, world, total = get_rank(), get_world_size(), len(features)
    search_device = search_device or device
    train = F.normalize(train_features, dim=-1).to(search_device)  # M, D
    test = F.normalize(features, dim=-1)[rank::world].to(search_device)  # N / world, D
    train_labels, labels = train_labels.to(search_device), labels[rank::world].to(search_device)

    settings = [(k, temperature) for k in neighbors for temperature in temperatures]
    hits = [torch.empty(len(settings), 2, 0, dtype=torch.uint8, device=device)]
    batches = search_neighbors(train, train_labels, test, max(neighbors))
    for similarity, classes, rows in with_progress(batches, header, len(test)) if header else batches:  # B, k
        found = [knn_hits(similarity[:, :k], classes[:, :k], labels[rows], num_classes, t) for k, t in settings]
        hits.append(torch.stack(found).to(device))  # settings, 2, B
    own = torch.cat(hits, dim=-1)  # settings, 2, N / world
    percent = (100 * all_reduce_sum(own.sum(-1).double()) / total).tolist()
    return [
        {"k": k, "temperature": temperature, "top1": top1, "top5": top5}
        for (k, temperature), (top1, top5) in zip(settings, percent, strict=True)
    ]


def knn_accuracy(
    backbone: nn.Module, train: ImageDataset, val: ImageDataset, device: torch.device, batch_size: int, num_workers: int,
    stats: tuple[Sequence[float], Sequence[float]], parts: Sequence[str] = ("ALL",), split: Split | None = None,
) -> dict[str, float]:  # fmt: skip
    """Top-1 accuracy, in percent, of a 20-NN classifier on each of `parts`: ALL, IR or EF. The processes share the images.

    The backbone may be in training; it is left in the mode in which it was.
    """
    extractor = FeatureExtractor(backbone, stats=stats)
    with in_eval_mode(backbone):
        (memory, labels), (queries, truth) = (
            extract_all(extractor, images, device, batch_size, num_workers) for images in (train, val)
        )
    found = {
        part: knn_accuracies(
            select_part(memory, part, split), labels, select_part(queries, part, split), truth, len(train.classes), device
        )
        for part in parts
    }
    return {part: result["top1"] for part, (result,) in found.items()}
