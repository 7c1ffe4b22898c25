"""Pictures for tests of views."""

import numpy as np
from PIL import Image


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """A smooth colourful image with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-10, 11, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
