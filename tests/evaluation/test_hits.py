"""Hits of test images as text: by hand, there and back, of another number of images."""

import numpy as np
import pytest

from clever.evaluation.hits import pack_hits, unpack_hits


@pytest.mark.parametrize("count", [1, 8, 9, 1000])
def test_one_bit_per_image_there_and_back(count):
    assert pack_hits(np.array([1, 0, 1, 0, 0, 0, 0, 0, 1])) == "oIA="  # bits 10100000 1, bytes A0 80
    hits = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpack_hits(pack_hits(hits), count), hits)
    with pytest.raises(ValueError):
        unpack_hits(pack_hits(hits), count + 8)
