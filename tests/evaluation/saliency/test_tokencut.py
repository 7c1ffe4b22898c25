"""TokenCut: planted objects, the dense generalised problem as oracle, and graphs without a defined cut."""

import numpy as np
import pytest
from support.saliency_reference import dense_cut, dense_graph, looped_mask

from clever.evaluation.saliency.tokencut import DENSE, connect, second_eigenvector, tokencut

BACKGROUND, OBJECT = (1.0, 0.0), (-0.5, 3.0)


def planted(mask: np.ndarray) -> np.ndarray:
    """Features [N, 2] of a grid whose patches are object where `mask` says so."""
    return np.where(mask.reshape(-1, 1), OBJECT, BACKGROUND)


def rectangle(rows=slice(2, 4), columns=slice(3, 6)) -> np.ndarray:
    mask = np.zeros((6, 8), bool)
    mask[rows, columns] = True
    return mask


def clusters(N: int, k: int, noise: float, D: int = 32, seed: int = 0) -> np.ndarray:
    """N noisy features around k directions."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((k, D))
    return centres[rng.integers(0, k, N)] + noise * rng.standard_normal((N, D))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_planted_object_is_found_and_holds_the_seed():
    mask = rectangle()
    assert (tokencut(planted(~mask), mask.shape).mask == mask).all()  # the object is always the smaller part
    cut = tokencut(planted(mask), mask.shape)
    assert (cut.mask == mask).all() and mask[cut.seed] and cut.degenerate is None
    assert (cut.eigenvector > 0)[mask].all() and (cut.eigenvector < 0)[~mask].all()


def test_patch_apart_from_the_object_is_dropped():
    mask = rectangle()
    more = mask.copy()
    more[5, 7] = more[4, 6] = True  # the second touches the object's corner only
    cut = tokencut(planted(more), mask.shape)
    assert (cut.mask == mask).all() and cut.seed == (2, 3)
    assert cut.eigenvector[5, 7] == pytest.approx(cut.eigenvector[2, 3])


def test_both_solvers_agree(monkeypatch):
    B = connect(clusters(DENSE, 5, 1.0))
    dense, dense_gap = second_eigenvector(B)
    monkeypatch.setattr("clever.evaluation.saliency.tokencut.DENSE", 0)
    sparse, sparse_gap = second_eigenvector(B)
    assert cosine(dense, sparse) > 1 - 1e-9 and dense_gap == pytest.approx(sparse_gap, rel=1e-6)
    assert (second_eigenvector(B)[0] == sparse).all()  # the same bits


@pytest.mark.parametrize("grid", [(3, 4), (9, 12), (20, 25)])
@pytest.mark.parametrize("k, noise", [(3, 1.5), (6, 1.2)])
def test_eigenvector_and_mask_are_those_of_the_dense_problem(grid, k, noise):
    features = clusters(grid[0] * grid[1], k, noise)
    cut, y = tokencut(features, grid), dense_cut(dense_graph(features))
    assert cosine(cut.eigenvector.ravel(), y) > 1 - 1e-9
    assert (cut.mask == looped_mask(y.reshape(grid))).all()


def test_patches_are_joined_above_tau_only():
    features = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])  # cosines .6, 0, -1; .8, -.6; 0
    assert (connect(features, 0.0).toarray() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).all()
    assert (connect(features, 0.7).toarray() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).all()


def ring(N: int) -> np.ndarray:
    """Features around a circle: every rotation of a cut is one as good."""
    angle = 2 * np.pi * np.arange(N) / N
    return np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.parametrize(
    "features, reason",
    [
        (np.ones((48, 7)), "all patches are alike"),
        (np.eye(300), "no patch resembles another"),
        (ring(300), "two cuts are equally good"),
        (np.eye(2), "a cut needs three patches"),
    ],
)
def test_undefined_cut_gives_an_empty_mask_and_a_reason(features, reason):
    cut = tokencut(features, (1, len(features)))
    assert cut.degenerate == reason and cut.seed is None
    assert not cut.mask.any() and not cut.eigenvector.any() and cut.mask.shape == (1, len(features))
