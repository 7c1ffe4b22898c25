"""Which test images a classifier got right, as a short text in result files: to compare networks image by image later."""

import base64

import numpy as np


def pack_hits(hits: np.ndarray) -> str:
    """Right or wrong for each of N images, bool [N], as text: one bit per image, base64."""
    return base64.b64encode(np.packbits(hits.astype(bool)).tobytes()).decode()


def unpack_hits(text: str, count: int) -> np.ndarray:
    """The hits bool [N] of `count` = N images, from the text of pack_hits. Raises ValueError if it is one for other images."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"hits of {8 * len(packed)} images or a few less, expected {count}")
    return np.unpackbits(packed, count=count).astype(bool)
