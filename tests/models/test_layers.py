"""Stochastic depth against its definition on all samples, and recomputation; their effects on whole networks: their tests."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from support.golden import rel_error
from torch import Tensor, nn

from clever.models.layers import CheckpointedSequential, StochasticDepth, checkpointed
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


def build(kind: str) -> tuple[nn.Sequential, Callable[[Tensor], Tensor]]:
    """Layers, and a function that runs them with recomputation."""
    layers = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
    stage = CheckpointedSequential(*layers) if kind == "sequential" else nn.Sequential(*layers)
    return stage, stage if kind == "sequential" else partial(checkpointed, stage)


@pytest.mark.parametrize("kind", ["sequential", "function"])
def test_recomputes_only_in_training_and_with_gradients(kind):
    stage, run = build(kind)
    x, calls = torch.randn(2, 4), []
    stage[0].register_forward_hook(lambda *_: calls.append(1))
    run(x).sum().backward()
    assert len(calls) == 2 and stage[1].num_batches_tracked == 1
    with torch.no_grad():
        run(x)
    assert len(calls) == 3
    stage.eval()
    run(x).sum().backward()
    assert len(calls) == 4
    stage.train()
    checkpointed(nn.Sequential(*stage), x, enabled=False).sum().backward()
    assert len(calls) == 5
