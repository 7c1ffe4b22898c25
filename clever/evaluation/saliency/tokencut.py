"""TokenCut: the salient object of an image by a normalised cut of the graph of its patches (Wang et al., arXiv 2202.11539).

The weight of an edge is 1 if the cosine similarity of the two patch features exceeds tau, else a small eps:
    W = (1 - eps) B + eps 1 1^T,   B binary,   d = W 1,   D = diag(d).
The cut is the second-smallest eigenvector y of (D - W) y = lambda D y. This is y = D^-1/2 z, where z is the second-largest
eigenvector of M = D^-1/2 W D^-1/2. The largest eigenvector of M is sqrt(d), with eigenvalue 1: it is known, and removed by
deflation. A product with M only needs B, which is sparse, and the Lanczos iteration needs a few dozen products.

Shapes: N = h*w patches in h rows and w columns.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

EPS = 1e-5  # weight of the edges between dissimilar patches
MIN_GAP = 1e-9  # smallest difference of two eigenvalues whose eigenvectors are well defined
DENSE = 256  # largest number of patches for the dense solver, which always detects equal eigenvalues
MAX_RESTARTS = 1000  # of the Lanczos iteration; photographs need fewer than ten


@dataclass
class Cut:
    """The patches of the salient object."""

    mask: np.ndarray  # h, w, bool
    eigenvector: np.ndarray  # h, w, positive at the seed
    seed: tuple[int, int] | None  # row and column of the largest |eigenvector|; None if the cut is undefined
    degenerate: str | None  # why the cut is undefined; then the mask is empty and the eigenvector 0


def connect(features: np.ndarray, tau: float = 0.2) -> sparse.csr_array:
    """B [N, N] of features [N, D]: 1 where the cosine similarity is greater than `tau`."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.maximum(lengths, 1e-12)
    similar = features @ features.T > tau  # N, N; exactly symmetric, because numpy computes one triangle and mirrors it
    N = len(similar)
    row_ends = np.concatenate([[0], similar.sum(1).cumsum()])
    index_type = np.int32 if row_ends[-1] < 2**31 else np.int64  # the same for both, or scipy copies one
    columns = np.broadcast_to(np.arange(N, dtype=index_type), (N, N))[similar]
    return sparse.csr_array((np.ones(len(columns)), columns, row_ends.astype(index_type)), shape=(N, N))


def second_eigenvector(B: sparse.csr_array, eps: float = EPS) -> tuple[np.ndarray, float]:
    """The eigenvector y [N] of a graph of at least three patches, and the gap between its eigenvalue and the next one.

    If the gap is 0, the eigenvector is not unique. Raises ArpackError if the iteration does not converge.
    """
    N = B.shape[0]
    degree = (1 - eps) * (B @ np.ones(N)) + eps * N
    scale, trivial = degree**-0.5, (degree / degree.sum()) ** 0.5

    def product(x: np.ndarray) -> np.ndarray:
        """(M - trivial trivial^T) x: M with its largest eigenvector removed."""
        x = x.ravel()
        y = scale * x
        return scale * ((1 - eps) * (B @ y) + eps * y.sum()) - trivial * (trivial @ x)

    if N <= DENSE:
        M = scale[:, None] * ((1 - eps) * B.toarray() + eps) * scale - np.outer(trivial, trivial)
        values, vectors = (result[..., -2:] for result in np.linalg.eigh(M))
    else:
        start = np.random.default_rng(0).standard_normal(N)  # fixed, so that results are reproducible
        operator = LinearOperator((N, N), product, dtype=np.float64)
        values, vectors = eigsh(operator, k=2, which="LA", v0=start, maxiter=MAX_RESTARTS)
    return scale * vectors[:, 1], float(values[1] - values[0])


def partition(y: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Mask [h, w] of the object in an eigenvector y [h, w] of either sign, and its seed.

    The seed is the patch with the largest |y|, the first one if several are equal. The object is the 4-connected component
    of the seed among the patches on the same side of the mean.
    """
    size = np.abs(y)
    seed = np.unravel_index(np.argmax(size >= size.max() * (1 - 1e-9)), y.shape)
    side = y > y.mean() if y[seed] > 0 else y < y.mean()
    components, _ = ndimage.label(side)
    return components == components[seed], (int(seed[0]), int(seed[1]))


def tokencut(features: np.ndarray, grid: tuple[int, int], tau: float = 0.2) -> Cut:
    """The salient object of an image with patch features [h*w, D], row by row, on a grid (h, w).

    If the cut is undefined, as for features that are all equal or all orthogonal, the mask is empty and `degenerate` says why.
    """
    B = connect(features, tau)
    N = B.shape[0]
    if N < 3:
        return _undefined(grid, "a cut needs three patches")
    try:
        y, gap = second_eigenvector(B)
    except ArpackError as error:
        return _undefined(grid, f"no convergence: {error}")
    if gap <= MIN_GAP:
        alike = "all patches are alike" if B.nnz == N * N else "two cuts are equally good"
        return _undefined(grid, alike if B.nnz > N else "no patch resembles another")
    y = y.reshape(grid)
    mask, seed = partition(y)
    return Cut(mask, y * np.sign(y[seed]), seed, None)


def _undefined(grid: tuple[int, int], reason: str) -> Cut:
    return Cut(np.zeros(grid, bool), np.zeros(grid), None, reason)
