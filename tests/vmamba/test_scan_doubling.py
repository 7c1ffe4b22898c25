"""The scan of exported programs against the step-by-step reference."""

import pytest
import torch
from support.scans import EXTREMES, assert_close, draw_images, extreme_images, without

from vmamba.scan_doubling import linear_recurrence, selective_scan_2d_doubling
from vmamba.scan_reference import selective_scan_2d_reference


def test_recurrence_by_hand():
    decay, h = torch.tensor([[0.5, 0.5, 0.25, 2.0, 1.0]]), torch.tensor([[4.0, 0.0, 1.0, 3.0, -1.0]])
    expected = torch.tensor([[4.0, 2.0, 1.5, 6.0, 5.0]])  # 4; 4/2; 2/4 + 1; 2 * 1.5 + 3; 6 - 1
    assert torch.equal(linear_recurrence(decay, h), expected)
    assert torch.equal(linear_recurrence(decay[:, :1], h[:, :1]), h[:, :1])


@pytest.mark.parametrize("size", [(2, 1, 1, 3, 1, 1), (1, 3, 5, 4, 2, 3), (2, 7, 1, 2, 1, 16), (1, 14, 14, 8, 3, 1)])
@pytest.mark.parametrize("missing", [(), (4,), (5,)])
def test_as_the_reference(size, missing):
    tensors = without(draw_images(*size), *missing)
    doubles = [tensor if tensor is None else tensor.double() for tensor in tensors]
    expected = selective_scan_2d_reference(*doubles)
    assert_close([selective_scan_2d_doubling(*tensors)], [expected], y=1e-6, gradients=0)
    assert_close([selective_scan_2d_doubling(*doubles)], [expected], y=1e-14, gradients=0)


@pytest.mark.parametrize("delta, A", EXTREMES)
def test_extreme_decays_stay_exact(delta, A):
    tensors = extreme_images(delta, A)
    expected = selective_scan_2d_reference(*(tensor.double() for tensor in tensors))
    found = selective_scan_2d_doubling(*tensors)
    assert found.isfinite().all()
    assert_close([found], [expected], y=1e-5, gradients=0)
