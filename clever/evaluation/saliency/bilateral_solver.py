"""Edge-aware smoothing of a mask: the fast bilateral solver (Barron and Poole, arXiv 1511.03296), as TokenCut uses it.

Pixels that are close in position and colour fall into the same cell (vertex) of a grid with the five dimensions x, y, Y, U,
V. The solver finds values of the vertices that are close to those of the mask and smooth over the grid.

Shapes: P = H*W pixels, V vertices.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import LinearOperator, cg

# The colour transform of JPEG; 128 is added to the last two channels.
RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
SMOOTHNESS = 256.0
CONFIDENCE = 0.999
# Part of the definition: the original stops before convergence, so another number of steps would give other masks.
MAX_ITERATIONS = 25
BISTOCHASTIZATION_STEPS = 10


@dataclass
class BilateralGrid:
    """The bilateral grid of an image."""

    vertex: np.ndarray  # P: index of each pixel's vertex
    blur: sparse.csr_array  # V, V: 10 on the diagonal, 1 for each of the up to ten neighbours of a vertex

    def splat(self, pixels: np.ndarray) -> np.ndarray:
        """Sums [V] of the pixel values [P] of each vertex."""
        return np.bincount(self.vertex, pixels, minlength=self.blur.shape[0])


def build_grid(image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float) -> BilateralGrid:
    """The grid of an RGB image [H, W, 3], uint8. The sigmas are the sizes of a cell: pixels, levels of Y, levels of U and V."""
    H, W = image.shape[:2]
    # Rounded, because the U and V of grey are exactly 128, the border of two cells: rounding errors must not decide.
    yuv = (image.reshape(-1, 3) @ RGB_TO_YUV.T + [0, 128, 128]).round(9)  # P, 3
    y, x = np.divmod(np.arange(H * W), W)
    sizes = [sigma_spatial, sigma_spatial, sigma_luma, sigma_chroma, sigma_chroma]
    cells = [(values / size).astype(np.int64) for values, size in zip((x, y, *yuv.T), sizes, strict=True)]
    steps, code = [], np.zeros(H * W, np.int64)
    stride = 1
    for cell in cells:
        steps.append(stride)
        code += (cell + 1) * stride
        stride *= int(cell.max()) + 3  # one unused code at either end, so that a step never leads to another row of cells
    codes, vertex = np.unique(code, return_inverse=True)
    return BilateralGrid(vertex.ravel(), _blur(codes, steps))


def _blur(codes: np.ndarray, steps: list[int]) -> sparse.csr_array:
    """The blur matrix [V, V] of vertices with these sorted codes; the codes of two neighbours differ by one of the steps."""
    V = len(codes)
    rows, columns = [], []
    for step in steps:
        candidate = np.searchsorted(codes, codes + step).clip(max=V - 1)
        has_neighbour = np.flatnonzero(codes[candidate] == codes + step)
        rows.append(has_neighbour)
        columns.append(candidate[has_neighbour])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    upper = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(V, V)).tocsr()
    return (upper + upper.T + 2 * len(steps) * sparse.eye_array(V)).tocsr()


def bistochastize(grid: BilateralGrid) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals n, m [V]: the row sums of diag(n) blur diag(n) are m, which is close to the number of pixels per vertex."""
    counts = grid.splat(np.ones(len(grid.vertex)))
    n = np.ones_like(counts)
    for _ in range(BISTOCHASTIZATION_STEPS):
        n = np.sqrt(n * counts / (grid.blur @ n))
    return n, n * (grid.blur @ n)


def smoothness_matrix(grid: BilateralGrid) -> sparse.csr_array:
    """The matrix [V, V] whose quadratic form is small for smooth values; positive semidefinite with row sums 0."""
    n, m = bistochastize(grid)
    return (sparse.diags_array(m) - sparse.diags_array(n) @ grid.blur @ sparse.diags_array(n)).tocsr()


def bilateral_solver(
    image: np.ndarray, mask: np.ndarray, sigma_spatial: float = 16, sigma_luma: float = 16, sigma_chroma: float = 8
) -> np.ndarray:
    """A mask [H, W], 0..1, aligned with the edges of its image [H, W, 3], uint8; the result is soft, [H, W].

    All pixels have the same confidence. At most MAX_ITERATIONS steps of conjugate gradients with a Jacobi preconditioner, from
    the mean target of each vertex. The defaults are those of TokenCut.
    """
    grid = build_grid(image, sigma_spatial, sigma_luma, sigma_chroma)
    weight = CONFIDENCE * grid.splat(np.ones(mask.size))  # V
    A = (SMOOTHNESS * smoothness_matrix(grid) + sparse.diags_array(weight)).tocsr()
    b = grid.splat(CONFIDENCE * mask.ravel())
    inverse = 1 / np.maximum(A.diagonal(), 1e-5)
    jacobi = LinearOperator(A.shape, lambda r: inverse * r, dtype=np.float64)
    values, _ = cg(A, b, x0=b / weight, rtol=1e-5, atol=0, maxiter=MAX_ITERATIONS, M=jacobi)
    return values[grid.vertex].reshape(mask.shape)


def largest_object(soft: np.ndarray) -> np.ndarray:
    """The largest 4-connected component, holes filled, of the values above 0.5: bool, [H, W]."""
    components, count = ndimage.label(ndimage.binary_fill_holes(soft > 0.5))
    if count == 0:
        return np.zeros(soft.shape, bool)
    return components == 1 + np.bincount(components.ravel())[1:].argmax()
