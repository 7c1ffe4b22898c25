"""Schedules, optimizers, clipping and the teacher's moving average, each against a few lines of plain code."""

import copy
import math

import numpy as np
import pytest
import torch
from support.networks import small_network, with_gradients
from torch import nn

from clever.models.heads import DINOHead
from clever.training import optim

# --- schedules ---------------------------------------------------------------------------------------------------------


def test_cosine_schedule_by_hand():
    """Two epochs of two steps of warm-up, ends included; then half a cosine over four steps, without its end."""
    values = optim.cosine_scheduler(1.0, 0.2, epochs=4, niter_per_ep=2, warmup_epochs=2, start_warmup_value=0.1)
    warmup = [0.1, 0.4, 0.7, 1.0]
    cosine = [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    assert values.tolist() == pytest.approx(warmup + cosine)


def test_cosine_schedule_at_its_limits():
    assert optim.cosine_scheduler(0.5, 1.0, 3, 4).shape == (12,)
    assert np.all(np.diff(optim.cosine_scheduler(0.996, 1.0, 3, 4)) > 0)  # the teacher's momentum rises
    assert optim.cosine_scheduler(3.0, 3.0, 2, 5).tolist() == [3.0] * 10
    assert optim.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=2).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert optim.cosine_scheduler(1.0, 0.0, 0, 3).shape == (0,)
    assert optim.cosine_scheduler(2.0, 0.0, 1, 1000)[-1] == pytest.approx(0, abs=1e-5)


# --- optimizers --------------------------------------------------------------------------------------------------------


def test_1d_parameters_and_biases_are_not_decayed():
    network = nn.ModuleDict({"net": small_network(), "head": DINOHead(5, 7, hidden_dim=6, bottleneck_dim=3)})
    network.register_parameter("matrix", nn.Parameter(torch.ones(2, 2)))
    network.register_parameter("scale", nn.Parameter(torch.ones(3)))
    odd = nn.Module()
    odd.register_parameter("bias", nn.Parameter(torch.ones(2, 2)))  # not 1-D, but a bias
    odd.register_parameter("projs_bias", nn.Parameter(torch.ones(2, 2)))  # only named a bit like one: decays
    network["odd"] = odd
    decayed, plain = optim.param_groups(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "matrix", "net.0.weight", "net.3.weight", "head.mlp.0.weight", "head.mlp.2.weight", "head.mlp.4.weight",
        "head.last_layer.weight_v", "odd.projs_bias",
    }  # fmt: skip
    assert {names[id(p)] for p in plain["params"]} == {
        "scale", "net.0.bias", "net.1.weight", "net.1.bias", "net.3.bias", "head.mlp.0.bias", "head.mlp.2.bias",
        "head.mlp.4.bias", "odd.bias",
    }  # fmt: skip
    assert not network["head"].last_layer.weight_g.requires_grad  # frozen: in neither
    assert plain["weight_decay"] == 0


def test_lars_by_hand():
    """Two steps with a constant gradient; 1-D: plain momentum. 2-D: (g + wd p) scaled by trust |p| / |g + wd p|, momentum."""
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.LARS([matrix, vector], lr=10.0, weight_decay=0.5, momentum=0.9, trust=0.001)
    expected = matrix.detach().clone()
    buffer = torch.zeros(2, 2)
    for _ in range(2):
        matrix.grad, vector.grad = torch.tensor([[-1.5, 0.0], [0.0, 4.0]]), torch.tensor([0.1, -0.2])
        optimizer.step()
        update = matrix.grad + 0.5 * expected
        buffer = 0.9 * buffer + update * 0.001 * expected.norm() / update.norm()
        expected = expected - 10 * buffer
    assert torch.allclose(matrix, expected)
    assert vector.tolist() == pytest.approx([1 - 10 * (1 + 1.9) * 0.1, 2 + 10 * (1 + 1.9) * 0.2])

    first = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    first.grad = torch.tensor([[-1.5, 0.0], [0.0, 4.0]])
    optim.LARS([first], lr=10.0, weight_decay=0.5).step()
    # g + wd p = diag(0, 6) of norm 6, |p| = 5: the step is 10 * 0.001 * 5 / 6 * 6 = 0.05 in the last entry.
    assert first.flatten().tolist() == pytest.approx([3, 0, 0, 3.95])


def test_lars_of_the_probe_adapts_1d_too():
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.tensor([0.0, 10.0])
    optim.LARS([bias], lr=10.0, adapt_1d=True).step()
    assert bias.tolist() == pytest.approx([3, 4 - 10 * 0.001 * 5])


@pytest.mark.parametrize("max_norm", [0.3, 3.0])
def test_gradients_are_clipped_one_by_one(max_norm):
    network = with_gradients(small_network())
    network[1].bias.grad *= 1e-4  # below the threshold: stays
    network[3].bias.grad = None
    reference = copy.deepcopy(network)
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
        if q.grad is not None:
            torch.nn.utils.clip_grad_norm_([q], max_norm)
    small = network[1].bias.grad.clone()
    optim.clip_gradients(network.parameters(), max_norm)
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-5) and p.grad.norm() <= max_norm * (1 + 1e-5)
    assert torch.equal(network[1].bias.grad, small)
    assert network[0].weight.grad.norm().item() == pytest.approx(max_norm, rel=1e-4)


def test_teacher_follows_the_parameters_and_keeps_its_buffers():
    student, teacher = small_network(), small_network()
    with torch.no_grad():
        for p in student.parameters():
            p += torch.randn_like(p)
    student(torch.randn(8, 3, 3, 3))  # moves the student's running statistics
    before, buffers = copy.deepcopy(teacher), copy.deepcopy(dict(teacher.named_buffers()))
    teacher.requires_grad_(False)
    optim.update_teacher(teacher, student, 0.9)
    for old, new, p in zip(before.parameters(), teacher.parameters(), student.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-6) and not torch.equal(new, old)
        assert p.requires_grad and not new.requires_grad
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not torch.equal(student[1].running_mean, teacher[1].running_mean)
    still = copy.deepcopy(teacher)
    optim.update_teacher(teacher, student, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), still.parameters(), strict=True))
    optim.update_teacher(teacher, student, 0.0)
    assert all(torch.allclose(p, q) for p, q in zip(teacher.parameters(), student.parameters(), strict=True))
