"""Stochastic depth that runs a branch on the kept samples only, against its definition on all samples."""

import copy

import pytest
import torch
import torchvision
from support.golden import rel_error
from torch import nn

from clever.models.layers import StochasticDepth
from clever.models.vision_transformer import Block


def reference(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The block with torchvision's stochastic depth: all branches are computed, then those dropped are multiplied by 0."""
    drop = torchvision.ops.StochasticDepth(block.drop_path.p, mode="row").train()
    x = x + drop(block.attn(block.norm1(x)))
    return x + drop(block.mlp(block.norm2(x)))


def make_block(rate: float) -> Block:
    torch.manual_seed(0)
    return Block(16, 2, drop_path=rate).train()


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_output_gradients_and_draws_equal_torchvisions(rate):
    block, x = make_block(rate), torch.randn(12, 5, 16)
    results = []
    for function in (reference, lambda block, x: block(x)):
        network, images = copy.deepcopy(block), x.clone().requires_grad_()
        torch.manual_seed(1)
        y = function(network, images)
        y.square().sum().backward()
        results.append([y, images.grad, *(p.grad for p in network.parameters()), torch.rand(3)])
    for expected, actual in zip(*results, strict=True):
        assert rel_error(actual, expected) < 1e-5


def test_each_sample_is_dropped_independently_and_kept_ones_are_scaled():
    torch.manual_seed(0)
    drop, batch, draws, rate = StochasticDepth(0.3).train(), 6, 3000, 0.3
    added = torch.stack([drop(torch.zeros(batch, 1), torch.ones_like) for _ in range(draws)]).squeeze(-1)  # [draws, B]
    kept = added > 0
    assert torch.equal(added, kept / (1 - torch.tensor(rate)))
    rate_error = (rate * (1 - rate) / draws) ** 0.5
    assert (kept.float().mean(0) - (1 - rate)).abs().max() < 4 * rate_error
    correlation = torch.corrcoef(kept.float().T) - torch.eye(batch)
    assert correlation.abs().max() < 4 / draws**0.5
    binomial = torch.distributions.Binomial(batch, torch.tensor(1 - rate)).log_prob(torch.arange(batch + 1.0)).exp()
    counts = torch.bincount(kept.sum(1), minlength=batch + 1) / draws
    assert (counts - binomial).abs().max() < 4 * 0.5 / draws**0.5


def test_branch_sees_only_the_kept_samples():
    torch.manual_seed(0)
    sizes = []

    def branch(x):
        sizes.append(len(x))
        return x

    drop, x = StochasticDepth(0.5).train(), torch.ones(64, 3)
    y = drop(x, branch)
    assert sizes == [(y[:, 0] == 3).sum()] and 16 < sizes[0] < 48
    drop(x, branch, all_samples=True)
    drop.eval()(x, branch)
    assert sizes[1:] == [64, 64]


@pytest.mark.parametrize("all_samples", [False, True])
def test_gradients_when_all_samples_are_dropped(all_samples):
    drop, branch = StochasticDepth(1.0).train(), nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    y = drop(x, branch, all_samples)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert all(p.grad is not None and not p.grad.any() for p in branch.parameters())


def test_branch_that_all_samples_sees_the_whole_batch():
    torch.manual_seed(0)
    x, norm = torch.randn(32, 4), nn.BatchNorm1d(4)
    y = StochasticDepth(0.5).train()(x, norm, all_samples=True)
    expected = nn.BatchNorm1d(4)(x) * 2
    kept = (y != x).any(1)
    assert 8 < kept.sum() < 24
    torch.testing.assert_close((y - x)[kept], expected[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))


def test_branch_in_reduced_precision():
    torch.manual_seed(0)
    x, layer = torch.randn(16, 4), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = StochasticDepth(0.5).train()(x, layer)
    assert y.dtype == torch.float32 and (y != x).any()


def test_compiles():
    torch.manual_seed(0)
    block = Block(16, 2, drop_path=0.5).train()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, 3, 16)
    y = compiled(x)
    y.sum().backward()
    dropped = (y == x).flatten(1).all(1)
    assert 4 < dropped.sum() < 32  # a quarter loses both branches
    assert block.mlp.fc1.weight.grad.any()
