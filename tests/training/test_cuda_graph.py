"""--cuda_graph with a stand-in for CUDA's graphs: the same training, bit for bit."""

from unittest import mock

import pytest
import torch
from support.in_process import pretrain
from support.processes import write_images
from test_resume import assert_same
from torch.utils._pytree import tree_leaves

from clever.checkpoint import load_checkpoint
from clever.models.layers import StochasticDepth
from clever.training.pretraining import Pretraining

FLAGS = (
    "--arch", "resnet8", "--use_bn_in_head", "true", "--use_fp16", "true", "--amp_dtype", "bf16", "--care_chunk", 2,
    "--lr", 0.05, "--warmup_epochs", 0, "--epochs", 2,
)  # fmt: skip


def record(function, sample, allow_unused_input=False):
    """As torch.cuda.make_graphed_callables: what it asks for, its runs, and inputs that are copied into the first ones."""
    assert not torch.is_autocast_enabled("cpu") and StochasticDepth.has_fixed_shapes
    kept, run = tree_leaves(sample), getattr(function, "forward", function)
    trained = [p for p in function.parameters() if p.requires_grad] if isinstance(function, torch.nn.Module) else []
    for _ in range(3):
        outputs = tree_leaves(run(*sample))
        assert all(isinstance(value, torch.Tensor) for value in (*kept, *outputs))
        losses = [value for value in outputs if value.requires_grad]
        assert bool(trained) == bool(losses)
        if losses:
            torch.autograd.grad(losses, trained, [torch.ones_like(value) for value in losses], allow_unused=allow_unused_input)

    def replay(*inputs):
        for place, value in zip(kept, tree_leaves(inputs), strict=True):
            place.copy_(value)
        return run(*sample)

    if trained:
        function.forward = replay
    return function if trained else replay


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Graphs are recorded as if there were a GPU, by the function that the test gives."""
    capture = Pretraining.capture

    def with_gpu(function, *arguments):
        with mock.patch.multiple(torch.cuda, make_graphed_callables=function, is_available=lambda: True):
            capture(*arguments)

    return lambda function: monkeypatch.setattr(Pretraining, "capture", lambda *words: with_gpu(function, *words))


@pytest.mark.parametrize("net", ["CLeVER", "augself", "equimod", "care"])  # two outputs; codes; an extra view; embeddings
def test_training_is_the_same(net, on_a_gpu, tmp_path):
    images = write_images(tmp_path / "images", 8)
    plain = pretrain(images, tmp_path / "plain", *FLAGS, "--net", net)
    on_a_gpu(record)
    graph = pretrain(images, tmp_path / "graph", *FLAGS, "--net", net, "--cuda_graph", "true")
    assert (plain.status, graph.status) == (0, 0) and "--cuda_graph true:" not in graph.stdout, (plain, graph)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("plain", "graph")]
    for part in states[0].keys() - {"args"}:
        assert_same(states[1][part], states[0][part], part)


def test_networks_without_buffers(on_a_gpu, tmp_path):
    images = write_images(tmp_path / "images", 4)
    on_a_gpu(record)
    outcome = pretrain(images, tmp_path / "run", "--net", "dino", "--drop_path_rate", 0.5, "--cuda_graph", "true")
    assert outcome.status == 0, outcome
    assert not StochasticDepth.has_fixed_shapes


@pytest.mark.parametrize("more", [(), ("--accumulation", 2), ("--activation_checkpointing", "true")])
def test_where_it_cannot_be_a_line_says_why(more, on_a_gpu, tmp_path):
    images = write_images(tmp_path / "images", 8)
    if more:
        on_a_gpu(mock.Mock(side_effect=AssertionError))
    outcome = pretrain(images, tmp_path / "run", "--cuda_graph", "true", *more)
    assert outcome.status == 0 and "--cuda_graph true: needs a GPU, one process, and neither" in outcome.stdout, outcome
