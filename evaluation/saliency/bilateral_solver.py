"""Edge-aware smoothing of a mask: the fast bilateral solver (Barron and Poole, arXiv 1511.03296), as TokenCut uses it.

Pixels that are close in position and colour fall into one cell (vertex) of a grid in the five dimensions x, y, Y, U, V. The
solver finds values of the vertices that are close to the mask's and smooth over the grid.

Letters: H W image size in pixels, P pixels (H*W), V vertices.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import LinearOperator, cg

# JPEG's colour transform; the last two rows get 128 added.
RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
SMOOTHNESS = 256.0
CONFIDENCE = 0.999
# Part of the definition: the original stops before it has converged, and its masks are those of this point.
MAX_ITERATIONS = 25
BISTOCHASTIZATIONS = 10


@dataclass
class BilateralGrid:
    """The grid of an image."""

    vertex: np.ndarray  # P: the vertex of each pixel
    blur: sparse.csr_array  # V, V: 10 for a vertex itself, 1 for each of its up to ten neighbours

    def splat(self, pixels: np.ndarray) -> np.ndarray:
        """Sums of pixel values [P] over each vertex, [V]."""
        return np.bincount(self.vertex, pixels, minlength=self.blur.shape[0])

    def slice(self, values: np.ndarray) -> np.ndarray:
        """The value of its vertex [V] for each pixel, [P]."""
        return values[self.vertex]


def build_grid(image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float) -> BilateralGrid:
    """The grid of an RGB image [H, W, 3], uint8; cells are so many pixels wide, and so many levels of brightness and colour."""
    H, W = image.shape[:2]
    # Rounded: grey is 128 exactly, on the border of two cells, and must not fall to either side of it by rounding errors.
    yuv = (image.reshape(-1, 3) @ RGB_TO_YUV.T + [0, 128, 128]).round(9)  # P, 3
    y, x = np.divmod(np.arange(H * W), W)
    sizes = [sigma_spatial, sigma_spatial, sigma_luma, sigma_chroma, sigma_chroma]
    cells = [(values / size).astype(np.int64) for values, size in zip((x, y, *yuv.T), sizes, strict=True)]
    steps, code = [], np.zeros(H * W, np.int64)
    stride = 1
    for cell in cells:
        steps.append(stride)
        code += (cell + 1) * stride
        stride *= int(cell.max()) + 3  # a free place at either end, so that a step never reaches another row's vertex
    codes, vertex = np.unique(code, return_inverse=True)
    return BilateralGrid(vertex.ravel(), _blur(codes, steps))


def _blur(codes: np.ndarray, steps: list[int]) -> sparse.csr_array:
    """The blur [V, V] of vertices with these sorted codes, whose neighbours' codes differ by one of the steps."""
    V = len(codes)
    rows, columns = [], []
    for step in steps:
        place = np.searchsorted(codes, codes + step).clip(max=V - 1)
        found = np.flatnonzero(codes[place] == codes + step)
        rows.append(found)
        columns.append(place[found])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    above = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(V, V)).tocsr()
    return (above + above.T + 2 * len(steps) * sparse.eye_array(V)).tocsr()


def bistochastize(grid: BilateralGrid) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals n, m [V] for which diag(n) blur diag(n) has nearly the row sums m, the numbers of pixels."""
    counts = grid.splat(np.ones(len(grid.vertex)))
    n = np.ones_like(counts)
    for _ in range(BISTOCHASTIZATIONS):
        n = np.sqrt(n * counts / (grid.blur @ n))
    return n, n * (grid.blur @ n)


def smoothness_matrix(grid: BilateralGrid) -> sparse.csr_array:
    """The matrix [V, V] whose quadratic form is small for smooth values; positive semidefinite, and its rows sum to 0."""
    n, m = bistochastize(grid)
    return (sparse.diags_array(m) - sparse.diags_array(n) @ grid.blur @ sparse.diags_array(n)).tocsr()


def solve(grid: BilateralGrid, target: np.ndarray) -> np.ndarray:
    """Smoothed values [P] of the target [P], each pixel of it trusted alike.

    Conjugate gradients with Jacobi's preconditioner, from the mean target of each vertex, in at most MAX_ITERATIONS steps.
    """
    weight = CONFIDENCE * grid.splat(np.ones(len(grid.vertex)))  # V
    A = (SMOOTHNESS * smoothness_matrix(grid) + sparse.diags_array(weight)).tocsr()
    b = grid.splat(CONFIDENCE * target)
    inverse = 1 / np.maximum(A.diagonal(), 1e-5)
    jacobi = LinearOperator(A.shape, lambda r: inverse * r, dtype=np.float64)
    values, _ = cg(A, b, x0=b / weight, rtol=1e-5, atol=0, maxiter=MAX_ITERATIONS, M=jacobi)
    return grid.slice(values)


def bilateral_solver(
    image: np.ndarray, mask: np.ndarray, sigma_spatial: float = 16, sigma_luma: float = 16, sigma_chroma: float = 8
) -> np.ndarray:
    """A mask [H, W], 0 to 1, moved to the edges of its image [H, W, 3], uint8: soft values [H, W] (TokenCut's settings)."""
    grid = build_grid(image, sigma_spatial, sigma_luma, sigma_chroma)
    return solve(grid, mask.ravel().astype(np.float64)).reshape(mask.shape)


def largest_object(soft: np.ndarray) -> np.ndarray:
    """The largest piece, connected over pixels' sides, of what is above 0.5 with its holes filled: [H, W], for pictures."""
    pieces, count = ndimage.label(ndimage.binary_fill_holes(soft > 0.5))
    if count == 0:
        return np.zeros(soft.shape, bool)
    return pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
