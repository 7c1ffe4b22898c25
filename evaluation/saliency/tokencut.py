"""TokenCut: one object of an image as a normalised cut of the graph of its patches (Wang et al., arXiv 2202.11539).

Patches are joined by 1 where the cosine of their features exceeds tau, else by a small eps:
    W = (1 - eps) B + eps 1 1^T,   B binary,   d = W 1.
The cut is the second-smallest eigenvector y of (diag(d) - W) y = lambda diag(d) y. With M = D^-1/2 W D^-1/2 it is
y = D^-1/2 z, z the second-largest eigenvector of M; the largest, sqrt(d) of eigenvalue 1, is known and taken out. Products
with M need B alone, which is stored sparse, and an eigenvector a few dozen of them.

Letters: N patches (h*w), h w grid of patches, D width of a feature.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from utils import InputError

EPS = 1e-5  # weight of the edges that TokenCut does not want
MIN_GAP = 1e-9  # between eigenvalues whose eigenvectors can be told apart
DENSE = 256  # patches up to which all eigenvalues are computed, which finds equal ones for certain
MAX_RESTARTS = 1000  # of the Lanczos process; photographs need fewer than ten


@dataclass
class Cut:
    """An object's patches."""

    mask: np.ndarray  # h, w, bool
    eigenvector: np.ndarray  # h, w, positive at the seed
    seed: tuple[int, int] | None  # the patch with the largest |eigenvector|; None without a defined cut
    degenerate: str | None  # why there is no defined cut; the mask is empty and the eigenvector 0 then


def connect(features: np.ndarray, tau: float = 0.2) -> sparse.csr_array:
    """B [N, N] of features [N, D]: 1 where the cosine is greater than `tau`. Raises InputError if a feature is not finite."""
    if not np.isfinite(features).all():
        raise InputError("the network's features are not finite")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.maximum(lengths, 1e-12)
    near = features @ features.T > tau  # N, N; numpy computes one triangle and mirrors it: exactly symmetric
    N = len(near)
    ends = np.concatenate([[0], near.sum(1).cumsum()])
    integer = np.int32 if ends[-1] < 2**31 else np.int64  # one type for both: scipy would widen the other
    columns = np.broadcast_to(np.arange(N, dtype=integer), (N, N))[near]
    return sparse.csr_array((np.ones(len(columns)), columns, ends.astype(integer)), shape=(N, N))


def second_eigenvector(B: sparse.csr_array, eps: float = EPS) -> tuple[np.ndarray, float]:
    """The cut y [N] of a graph of at least three patches, and how far its eigenvalue is from the next.

    Where that gap is 0 the eigenvector is arbitrary in a plane. Raises InputError if the iteration does not converge.
    """
    N = B.shape[0]
    degree = (1 - eps) * (B @ np.ones(N)) + eps * N
    scale, trivial = degree**-0.5, (degree / degree.sum()) ** 0.5

    def product(x: np.ndarray) -> np.ndarray:
        """(M - trivial trivial^T) x."""
        x = x.ravel()
        y = scale * x
        return scale * ((1 - eps) * (B @ y) + eps * y.sum()) - trivial * (trivial @ x)

    if N <= DENSE:
        M = scale[:, None] * ((1 - eps) * B.toarray() + eps) * scale - np.outer(trivial, trivial)
        values, vectors = (result[..., -2:] for result in np.linalg.eigh(M))
    else:
        start = np.random.default_rng(0).standard_normal(N)  # fixed: the same image gives the same mask
        operator = LinearOperator((N, N), product, dtype=np.float64)
        try:
            values, vectors = eigsh(operator, k=2, which="LA", v0=start, maxiter=MAX_RESTARTS)
        except ArpackError as error:
            raise InputError(f"the eigenvectors of its {N} patches do not converge ({error})") from error
    return scale * vectors[:, 1], float(values[1] - values[0])


def partition(y: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Mask [h, w] of the object that an eigenvector y [h, w] of either sign shows, and its seed.

    The seed is the patch with the largest |y|, the first of equal ones; the object is what lies on its side of the mean
    and is connected to it over the patches' sides.
    """
    size = np.abs(y)
    seed = np.unravel_index(np.argmax(size >= size.max() * (1 - 1e-9)), y.shape)
    side = y > y.mean() if y[seed] > 0 else y < y.mean()
    pieces, _ = ndimage.label(side)
    return pieces == pieces[seed], (int(seed[0]), int(seed[1]))


def tokencut(features: np.ndarray, grid: tuple[int, int], tau: float = 0.2) -> Cut:
    """The object in an image whose patches, row by row on a grid of h by w, have these features [h*w, D].

    A graph without a defined cut, such as one of equal or of mutually orthogonal features, gives an empty mask and says so.
    Raises InputError if a feature is not finite.
    """
    B = connect(features, tau)
    N = B.shape[0]
    if N < 3:
        return _no_cut(grid, f"{N} patch{'es' * (N > 1)}: a cut needs three")
    y, gap = second_eigenvector(B)
    if gap <= MIN_GAP:
        alike = "all patches are alike" if B.nnz == N * N else "two cuts are equally good"
        return _no_cut(grid, alike if B.nnz > N else "no patch resembles another")
    y = y.reshape(grid)
    mask, seed = partition(y)
    return Cut(mask, y * np.sign(y[seed]), seed, None)


def _no_cut(grid: tuple[int, int], reason: str) -> Cut:
    return Cut(np.zeros(grid, bool), np.zeros(grid), None, reason)
