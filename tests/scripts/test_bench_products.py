"""The benchmark's record of a step's matrix products."""

import torch
import torch.nn.functional as F

from scripts.bench.products import ProductRecorder, gigaflops, time_products


def test_products_of_layers_forward_and_backward():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight, depthwise = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(4, 1, 1, 1, requires_grad=True)
    tokens = torch.randn(2, 3, 5, 4, requires_grad=True)
    with ProductRecorder() as recorder:
        F.conv2d(F.conv2d(x, weight, stride=2), depthwise, groups=4).sum().backward()
        F.scaled_dot_product_attention(tokens, tokens, tokens).square().sum().backward()
        F.linear(torch.randn(7, 4), torch.randn(6, 4), torch.randn(6))
    shapes = {shape: count for (shape, _), count in recorder.counts.items()}
    convolution = {(1, 32, 12, 4): 1, (1, 32, 4, 12): 1, (1, 12, 32, 4): 1}
    attention = {(6, 5, 4, 5): 2, (6, 5, 5, 4): 4}
    assert shapes == convolution | attention | {(1, 7, 4, 6): 1}
    expected = 2 * (3 * 32 * 12 * 4 + 6 * 6 * 5 * 4 * 5 + 7 * 4 * 6) / 1e9
    assert abs(gigaflops(recorder.counts) / expected - 1) < 1e-9
    assert time_products(recorder.counts, torch.device("cpu")) > 0
