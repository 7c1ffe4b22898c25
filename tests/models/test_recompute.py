"""Activation checkpointing. Its effect on whole networks: the tests of each network."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clever.models.layers import CheckpointedSequential, PreservedBuffers, checkpointed


def test_preserved_buffers_are_the_same_tensors_with_the_same_values_even_after_an_error():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).train()
    before = list(network.buffers())
    with pytest.raises(KeyError), PreservedBuffers(network):
        network(torch.randn(4, 3, 5, 5) + 7)
        assert network[0].running_mean.min() > 0.5 and network[0].num_batches_tracked == 1
        raise KeyError
    assert all(buffer is kept for buffer, kept in zip(network.buffers(), before, strict=True))
    assert (network[0].running_mean == 0).all() and network[0].num_batches_tracked == 0


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


@pytest.mark.parametrize("kind", ["sequential", "function"])
def test_backward_twice(kind):
    stage, run = build(kind)
    loss = run(torch.randn(3, 4)).square().sum()
    loss.backward(retain_graph=True)
    once = stage[0].weight.grad.clone()
    loss.backward()
    assert torch.allclose(stage[0].weight.grad, 2 * once)
