"""The weighted k-NN classifier on frozen features (Wu et al., arXiv 1805.01978).

Letters: B batch, D width of the features, M training images, C classes.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datasets import ImageDataset, shard
from distributed import all_gather_rows, all_reduce_sum, broadcast_buffers, get_rank, get_world_size
from evaluation.features import FeatureExtractor, extract_features

MIN_TEMPERATURE = 0.002  # exp(1 / 0.002) is 1e217


def nearest_neighbors(train_features: torch.Tensor, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and indices [B, k] of the k training features most similar to each feature, most similar first.

    Both sets are L2-normalised, M and B rows of D. k is cut to the training set's size.
    """
    return (features @ train_features.T).topk(min(k, len(train_features)), dim=-1)


def knn_scores(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float = 0.07) -> torch.Tensor:
    """Class scores [B, C], in float64: each of k neighbours, of cosine s and a class, both [B, k], votes exp(s / temperature).

    float64 holds the votes of temperatures from MIN_TEMPERATURE on.
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
    chunk: int = 1024,
) -> torch.Tensor:
    """Class scores [B, C] by weighted votes of the k most similar training images (Wu et al., arXiv 1805.01978).

    Features are L2-normalised here; a neighbour of cosine s votes exp(s / temperature). k is cut to the training set's size.
    """
    train = F.normalize(train_features, dim=-1)  # M, D
    scores = []
    for queries in F.normalize(features, dim=-1).split(chunk):
        similarity, nearest = nearest_neighbors(train, queries, k)  # B, k
        scores.append(knn_scores(similarity, train_labels[nearest], num_classes, temperature))  # B, C
    return torch.cat(scores)


def knn_accuracy(
    backbone: nn.Module,
    train: ImageDataset,
    val: ImageDataset,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    k: int = 20,
) -> float:
    """Top-1 in percent of a k-NN classifier on a backbone's features; the processes share the images, each counts once."""
    was_training = backbone.training
    broadcast_buffers(backbone)
    extractor = FeatureExtractor(backbone.eval())

    def extract(dataset):
        own = shard(dataset, get_rank(), get_world_size())
        return extract_features(extractor, DataLoader(own, batch_size, num_workers=num_workers), device)

    train_features, train_labels = map(all_gather_rows, extract(train))
    features, labels = extract(val)
    scores = knn_predict(train_features, train_labels, features, k, len(train.classes))
    backbone.train(was_training)
    return 100 * all_reduce_sum((scores.argmax(-1) == labels).sum().float()).item() / len(val)
