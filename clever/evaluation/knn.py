"""The weighted k-NN classifier on frozen features (Wu et al., arXiv 1805.01978).

Shapes: D width of the features, M training images, N test images, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from clever.data.datasets import ImageDataset, make_loader, shard
from clever.distributed import (
    all_gather_rows,
    all_reduce_sum,
    get_rank,
    get_world_size,
)
from clever.evaluation.features import (
    FeatureExtractor,
    extract_features,
    gather_in_order,
    in_eval_mode,
    select_part,
)
from clever.evaluation.hits import pack_hits
from clever.progress import with_progress

MIN_TEMPERATURE = 0.002  # exp(1 / 0.002) is 1e217
MAX_QUERIES, MAX_SIMILARITIES = 1024, 2**28  # of a chunk: at most 1 GiB of similarities


def nearest_neighbors(train_features: torch.Tensor, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities and indices [B, k] of each feature's k nearest training features, nearest first.

    Both arguments are L2-normalised, [M, D] and [B, D]. With k > M there are M neighbours.
    """
    return (features @ train_features.T).topk(min(k, len(train_features)), dim=-1)


def search_neighbors(
    train_features: torch.Tensor, train_labels: torch.Tensor, features: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """For each chunk of B features: similarities and classes [B, k] of their neighbours, and the chunk's place in `features`.

    Features are L2-normalised, as for nearest_neighbors. MAX_QUERIES and MAX_SIMILARITIES limit a chunk, and so the memory.
    """
    chunk = max(1, min(MAX_QUERIES, MAX_SIMILARITIES // len(train_features)))
    for start in range(0, max(1, len(features)), chunk):  # without features: one empty chunk
        rows = slice(start, start + chunk)
        similarity, nearest = nearest_neighbors(train_features, features[rows], k)  # B, k
        yield similarity, train_labels[nearest], rows


def knn_scores(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float = 0.07) -> torch.Tensor:
    """Class scores [B, C]: a neighbour with cosine similarity s votes exp(s / temperature) for its class.

    `similarity` and `labels` are those of the neighbours, [B, k]. The votes are float64, which suffices for temperatures of
    at least MIN_TEMPERATURE.
    """
    votes = (similarity.double() / temperature).exp()  # B, k
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)  # B, C


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Class scores [B, C] of features [B, D] by weighted votes of their k nearest training features [M, D].

    Features are L2-normalised here. With k > M, all M features vote.
    """
    train, queries = F.normalize(train_features, dim=-1), F.normalize(features, dim=-1)  # M, D and B, D
    found = search_neighbors(train, train_labels, queries, k)
    scores = [knn_scores(similarity, classes, num_classes, temperature) for similarity, classes, _ in found]
    return torch.cat(scores)  # B, C


def knn_accuracies(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    neighbors: list[int],
    temperatures: list[float],
    device: torch.device,
    search_device: torch.device,
    per_image: bool = False,
) -> list[dict[str, Any]]:
    """Top-1 and top-5 accuracies, in percent, for each k and temperature.

    Every process has all features, [M, D] and [N, D], and classifies its share of the N test images. A class without votes is
    never a hit: with k = 3 neighbours, top-5 is the share of images whose class is that of one of the three.

    Args:
        device: where the counts are summed over processes.
        search_device: where features are compared.
        per_image: also return `correct`, the images whose class was found, as text (evaluation/hits.py).
    """
    rank, world, total = get_rank(), get_world_size(), len(features)
    train = F.normalize(train_features, dim=-1).to(search_device)  # M, D
    test = F.normalize(features, dim=-1)[rank::world].to(search_device)  # N / world, D
    train_labels, labels = train_labels.to(search_device), labels[rank::world].to(search_device)

    settings = [(k, temperature) for k in neighbors for temperature in temperatures]
    hits = [torch.empty(len(settings), 2, 0, dtype=torch.uint8, device=device)]
    batches = search_neighbors(train, train_labels, test, max(neighbors))
    for similarity, classes, rows in with_progress(batches, "nearest neighbours", len(test)):  # B, k
        found = [knn_hits(similarity[:, :k], classes[:, :k], labels[rows], num_classes, t) for k, t in settings]
        hits.append(torch.stack(found).to(device))  # settings, 2, B
    own = torch.cat(hits, dim=-1)  # settings, 2, N / world
    percent = (100 * all_reduce_sum(own.sum(-1).double()) / total).tolist()
    results = [
        {"k": k, "temperature": temperature, "top1": top1, "top5": top5}
        for (k, temperature), (top1, top5) in zip(settings, percent, strict=True)
    ]
    if per_image:
        correct = gather_in_order(own[:, 0].T.contiguous(), total).cpu().numpy()  # N, settings
        for result, column in zip(results, correct.T, strict=True):
            result["correct"] = pack_hits(column)
    return results


def knn_hits(
    similarity: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float
) -> torch.Tensor:
    """1 where the label [B] is the class with the most votes, or among the first five: uint8 [2, B].

    `similarity` and `classes` are those of the neighbours, [B, k].
    """
    best = knn_scores(similarity, classes, num_classes, temperature).topk(min(5, num_classes), dim=-1)  # B, 5
    right = (best.indices == labels[:, None]) & (best.values > 0)
    return torch.stack([right[:, 0], right.any(1)]).to(torch.uint8)


def knn_accuracy(
    backbone: nn.Module,
    train: ImageDataset,
    val: ImageDataset,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stats: tuple[Sequence[float], Sequence[float]],
    parts: Sequence[str] = ("ALL",),
    hp1: float = 1.0,
    k: int = 20,
) -> dict[str, float]:
    """Top-1 accuracy, in percent, of a k-NN classifier on each of `parts`: ALL, IR or EF. The processes share the images.

    The backbone may be in training; it is left in the mode in which it was.
    """
    extractor = FeatureExtractor(backbone, stats=stats)

    def extract(dataset):
        own = shard(dataset, get_rank(), get_world_size())
        return extract_features(extractor, make_loader(own, batch_size, num_workers=num_workers), device)

    with in_eval_mode(backbone):
        train_features, train_labels = map(all_gather_rows, extract(train))
        features, labels = extract(val)
    result = {}
    for part in parts:
        memory, queries = (select_part(x, extractor.dim, part, hp1) for x in (train_features, features))
        scores = knn_predict(memory, train_labels, queries, min(k, len(memory)), len(train.classes))
        result[part] = 100 * all_reduce_sum((scores.argmax(-1) == labels).sum().float()).item() / len(val)
    return result
