"""Activation checkpointing. Its effect on whole networks: the tests of each network."""

import pytest
import torch
from torch import nn

from recompute import CheckpointedSequential, PreservedBuffers, checkpointed


def test_preserved_buffers_are_the_same_tensors_with_the_same_values_even_after_an_error():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).train()
    before = list(network.buffers())
    with pytest.raises(KeyError), PreservedBuffers(network):
        network(torch.randn(4, 3, 5, 5) + 7)
        assert network[0].running_mean.min() > 0.5 and network[0].num_batches_tracked == 1
        raise KeyError
    assert all(buffer is kept for buffer, kept in zip(network.buffers(), before, strict=True))
    assert (network[0].running_mean == 0).all() and network[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda *modules: CheckpointedSequential(*modules),
        lambda *modules: lambda x, stack=nn.Sequential(*modules): checkpointed(stack, x),
    ],
    ids=["sequential", "function"],
)
def test_recomputes_with_gradients_and_in_training_only(build):
    layers, calls = (nn.Linear(4, 4), nn.ReLU()), []
    network, x = build(*layers), torch.ones(2, 4)
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    network(x).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        network(x)
    assert len(calls) == 3


def test_backward_twice_through_a_recomputed_stage():
    stage = CheckpointedSequential(nn.Linear(4, 4), nn.ReLU())
    loss = stage(torch.ones(2, 4)).square().sum()
    loss.backward(retain_graph=True)
    once = stage[0].weight.grad.clone()
    loss.backward()
    assert torch.allclose(stage[0].weight.grad, 2 * once)
