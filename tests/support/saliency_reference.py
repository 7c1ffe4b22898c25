"""Readable reference of the saliency evaluation, step by step as the original describes it.

Shapes: N patches, P pixels, V vertices.
"""

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy import ndimage


def dense_graph(features: np.ndarray, tau: float = 0.2, eps: float = 1e-5) -> np.ndarray:
    """W [N, N] of features [N, D]."""
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(features @ features.T > tau, 1.0, eps).astype(np.float64)


def dense_cut(W: np.ndarray) -> np.ndarray:
    """Second-smallest eigenvector [N] of (D - W) y = lambda D y, by the dense generalised problem."""
    D = np.diag(W.sum(1))
    _, vectors = scipy.linalg.eigh(D - W, D, subset_by_index=[1, 2])
    return vectors[:, 0]


def looped_mask(y: np.ndarray) -> np.ndarray:
    """Mask [h, w] of an eigenvector [h, w]: the seed's side of the mean, flood-filled from the seed."""
    h, w = y.shape
    side = y > y.mean()
    seed = np.unravel_index(np.argmax(np.abs(y)), y.shape)
    if not side[seed]:
        side = ~side
    start = np.zeros((h, w), bool)
    start[seed] = True
    return ndimage.binary_propagation(start, mask=side)


def looped_f_curve(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F measure at 255 thresholds, one after the other."""
    curve = []
    for threshold in np.arange(255) / 255:
        positive = prediction > threshold
        true_positives = (positive & truth).sum()
        precision = true_positives / positive.sum() if positive.sum() else 1.0
        recall = true_positives / truth.sum() if truth.sum() else 1.0
        denominator = 0.3 * precision + recall
        curve.append(1.3 * precision * recall / denominator if denominator else 0.0)
    return np.array(curve)


def grid_matrices(image: np.ndarray, sigmas: tuple[float, float, float]) -> tuple[np.ndarray, sp.csr_array, np.ndarray]:
    """Coordinates of the vertices [V, 5], splat matrix [V, P] and blur [V, V], by comparing all pairs of vertices."""
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    u = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    v = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    spatial, luminance, chroma = sigmas
    cells = np.stack([x / spatial, y / spatial, luma / luminance, u / chroma, v / chroma], -1).astype(int).reshape(-1, 5)
    vertices, vertex = np.unique(cells, axis=0, return_inverse=True)
    V, P = len(vertices), len(cells)
    splat = sp.csr_array((np.ones(P), (vertex.ravel(), np.arange(P))), shape=(V, P))
    steps = np.abs(vertices[:, None] - vertices[None]).sum(-1)  # V, V: 1 between neighbours in one dimension
    return vertices, splat, 10.0 * np.eye(V) + (steps == 1)


def solved(image: np.ndarray, target: np.ndarray, sigmas=(16, 16, 8), iterations: int = 25) -> np.ndarray:
    """The bilateral solver's values [H, W] with dense matrices and plain preconditioned conjugate gradients."""
    _, splat, B = grid_matrices(image, sigmas)
    m = splat.sum(1)
    n = np.ones(len(m))
    for _ in range(10):
        n = np.sqrt(n * m / (B @ n))
    m = n * (B @ n)
    confidence = np.full(target.size, 0.999)
    A = 256 * (np.diag(m) - n[:, None] * B * n) + np.diag(splat @ confidence)
    b = splat @ (confidence * target.ravel())
    y = b / (splat @ confidence)
    inverse = 1 / np.maximum(np.diag(A), 1e-5)
    r = b - A @ y
    z = inverse * r
    p = z
    for _ in range(iterations):
        if np.linalg.norm(r) <= 1e-5 * np.linalg.norm(b):
            break
        Ap = A @ p
        step = (r @ z) / (p @ Ap)
        y = y + step * p
        new_r = r - step * Ap
        new_z = inverse * new_r
        p = new_z + (new_r @ new_z) / (r @ z) * p
        r, z = new_r, new_z
    return (splat.T @ y).reshape(target.shape)
