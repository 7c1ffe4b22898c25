"""Pictures for tests of views."""

import numpy as np
from PIL import Image

from clever.data.augmentations import VIEW


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """A smooth colourful image with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-10, 11, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def view_of(height: int, width: int, size: int, /, **changes: float) -> np.ndarray:
    """VIEW [1]: a box at the top left of an image, resized to a square, and nothing else, but for `changes`."""
    view = np.zeros(1, VIEW)
    values = {"height": height, "width": width, "resized_height": size, "resized_width": size, "size": size, "bicubic": 1}
    for name, value in (values | {"brightness": 1, "contrast": 1, "saturation": 1} | changes).items():
        view[name] = value
    return view
