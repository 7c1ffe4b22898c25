"""The bilateral solver against its plain reference, and what it does to a mask."""

import numpy as np
import pytest
from support.saliency_reference import solved

from clever.evaluation.saliency.bilateral_solver import bilateral_solver, build_grid, largest_object

SIGMAS = (16, 16, 8)


def texture(H: int = 45, W: int = 60, seed: int = 0) -> np.ndarray:
    """Slow waves of colour and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    waves = [128 + 100 * np.sin(x / (11 + c) + y / (17 - c) + c) for c in range(3)]
    return (np.stack(waves, -1) + rng.normal(0, 4, (H, W, 3))).clip(0, 255).astype(np.uint8)


def two_tone(H: int = 48, W: int = 64, edge: int = 29) -> np.ndarray:
    """Blue left of the column `edge`, yellow right of it."""
    image = np.empty((H, W, 3), np.uint8)
    image[:, :edge], image[:, edge:] = (30, 40, 200), (220, 210, 40)
    return image


@pytest.mark.parametrize("sigmas", [SIGMAS, (20, 24, 12)])
def test_soft_mask_is_that_of_the_reference_which_stops_after_25_steps(sigmas):
    image, target = texture(), np.zeros((45, 60))
    target[10:30, 15:40] = 1
    soft = bilateral_solver(image, target, *sigmas)
    np.testing.assert_allclose(soft, solved(image, target, sigmas, iterations=25), atol=1e-10)
    assert np.abs(soft - solved(image, target, sigmas, iterations=1000)).max() > 1e-3
    assert np.abs(soft - target).mean() > 0.02  # it did something


def test_grey_levels_on_the_border_of_two_cells_are_above_it():
    """Grey is 128 in U and V, and its own level in Y; rounding errors must not move it to the cell below."""
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)  # 1, 256, 3
    grid = build_grid(image, sigma_spatial=1000, sigma_luma=16, sigma_chroma=8)
    assert (np.bincount(grid.vertex) == 16).all() and grid.blur.shape == (16, 16)


def test_mask_moves_to_the_edge_of_the_image():
    image = two_tone(edge=29)
    mask = np.zeros((48, 64))
    mask[:, 24:] = 1  # five columns too wide
    soft = bilateral_solver(image, mask)
    assert (soft[:, :29] < 0.5).all() and (soft[:, 29:] > 0.5).all()


def test_largest_piece_is_kept_and_its_holes_filled():
    soft = np.zeros((20, 30))
    soft[2:12, 3:15] = 0.8
    soft[5:7, 6:9] = 0.2  # a hole
    soft[15:18, 20:25] = 0.9  # a smaller piece
    soft[12, 15] = 0.9  # at a corner of the larger one: not connected to it
    expected = np.zeros((20, 30), bool)
    expected[2:12, 3:15] = True
    assert (largest_object(soft) == expected).all()


def test_the_background_is_never_the_object():
    soft = np.ones((20, 30))
    soft[0, 0] = 0  # the original takes the background here
    assert largest_object(soft).sum() == 599
    assert not largest_object(np.full((20, 30), 0.5)).any()
