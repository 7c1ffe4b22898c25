"""Hits of test images as text: by hand, there and back, damaged."""

import numpy as np
import pytest

from clever.evaluation.hits import pack_hits, unpack_hits


def test_one_bit_per_image_by_hand():
    """Images 0, 2 and 8 of nine: bits 10100000 1, bytes A0 80."""
    assert pack_hits(np.array([1, 0, 1, 0, 0, 0, 0, 0, 1])) == "oIA="


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_there_and_back(count):
    hits = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpack_hits(pack_hits(hits), count), hits)


@pytest.mark.parametrize("text, count", [("oIA=", 8), ("oIA=", 17), ("o?A=", 9)])
def test_another_number_of_images_is_an_error(text, count):
    with pytest.raises(ValueError):
        unpack_hits(text, count)
