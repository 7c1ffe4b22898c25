"""Label propagation against golden values and a readable form of the original; its window, memory and speed."""

import pytest
import torch
from support import video_reference as reference

from clever.evaluation.video.propagation import Propagation, make_tiles

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "radius, topk, expected",
    [
        (0, 1, [0, 0, 1, 1]),
        (1, 1, [0.5, 0, 1, 1]),  # patch 0's match is outside the window, and the two sources in it are equally unlike it
        (0, 2, [9.07875e-05, 9.07875e-05, 0.99990922, 0.99990922]),  # three sources share the second place: all vote
    ],
)
@pytest.mark.parametrize("memory_mb", [256, 0.001])
def test_golden_values_of_a_row_of_patches(radius, topk, expected, memory_mb):
    foreground = torch.tensor([0.0, 1, 1, 0])
    labels = torch.stack([1 - foreground, foreground], -1)[None]  # 1, 4, 2
    propagation = Propagation(torch.eye(4)[None], labels, 7, radius, topk, memory_mb)
    soft = propagation.step(torch.eye(4).roll(1, 0)[None])
    assert soft[0, :, 1].tolist() == pytest.approx(expected, abs=1e-8, rel=1e-6)
    assert soft.sum(-1).tolist() == [pytest.approx([1] * 4)]


def moving_features(frames, rows=9, columns=13, width=16, seed=0):
    """Features that move by one patch per frame, with noise; random soft labels of three channels."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, width, generator=generator)
    noise = torch.randn(frames, rows, columns, width, generator=generator)
    labels = torch.rand(rows, columns, 3, generator=generator).softmax(-1)
    return [base.roll(t, 1) + noise[t] for t in range(frames)], labels


@pytest.mark.parametrize(
    "n_last_frames, radius, topk, memory_mb",
    [
        (7, 12, 5, 256), (3, 2, 5, 256), (3, 2, 5, 0.05), (2, 0, 5, 256), (2, 0, 3, 0.1), (1, 1, 20, 256), (0, 4, 1, 256),
        (4, 3, 1, 256),
    ],
)  # fmt: skip
def test_propagation_is_that_of_the_original_step_by_step(n_last_frames, radius, topk, memory_mb):
    features, labels = moving_features(7)
    ours = Propagation(features[0], labels, n_last_frames, radius, topk, memory_mb)
    plain = reference.Propagation(features[0], labels, n_last_frames, radius, topk)
    for feature in features[1:]:
        found, expected = ours.step(feature), plain.step(feature)
        assert (found - expected).abs().max() < 1e-6
        assert (reference.mask_of(found, 4, (36, 52)) == reference.mask_of(expected, 4, (36, 52))).all()
    assert (expected - labels).abs().max() > 0.1


def test_tiles_cover_each_query_once_and_keep_within_the_memory():
    for memory_mb in (256, 1, 0.2):
        covered = torch.zeros(17, 23, dtype=torch.long)
        for tile in make_tiles(17, 23, 5, 8, memory_mb, CPU):
            covered[tile.queries] += 1
            pairs = covered[tile.queries].numel() * 8 * covered[tile.sources].numel()
            assert pairs * 4 <= memory_mb * 2**20
        assert (covered == 1).all()


def assembled_mask(rows, columns, radius):
    """[N, N] of all tiles."""
    mask = torch.zeros(rows, columns, rows, columns)
    for queries, sources, attention_mask in make_tiles(rows, columns, radius, 8, 256, CPU):
        part = mask[(*queries, *sources)]
        mask[(*queries, *sources)] = (attention_mask == 0).float().view(part.shape)
    return mask.flatten(2).flatten(0, 1)


def test_window_is_that_of_the_loop():
    for rows, columns, radius in ((6, 9, 2), (5, 4, 12), (12, 25, 4), (1, 7, 1)):
        assert torch.equal(assembled_mask(rows, columns, radius), reference.window_mask(rows, columns, radius))
