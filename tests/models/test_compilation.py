"""--compile: the same numbers, gradients and names of weights as without, for every size of images."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from support.golden import rel_error
from support.in_process import pretrain
from support.processes import write_images

from clever.models.backbones import build_backbone
from clever.models.compilation import compile_blocks
from clever.training.telemetry import read_log

CPU = torch.device("cpu")


@pytest.fixture
def without_code(monkeypatch):
    """Blocks are recorded as graphs, but no code is generated for them, which would take minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    "arch, blocks, checkpointing",
    [("vit_micro", 6, True), ("resnet8", 3, True), ("vssm2-vmambav2_micro", 3, False)],
)
def test_outputs_gradients_and_names_are_the_same(without_code, arch, blocks, checkpointing, capsys):
    torch.manual_seed(0)
    plain = build_backbone(arch, patch_size=8, img_size=32, checkpointing=checkpointing).train()
    compiled = copy.deepcopy(plain)
    compile_blocks([compiled], CPU)
    assert f"compiled blocks: {blocks};" in capsys.readouterr().out
    for size in (32, 16, 32):
        images, results = torch.randn(4, 3, size, size), []
        for network in (plain, compiled):
            network.zero_grad()
            y = network(images)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in network.parameters()), *network.buffers()])
        assert all(rel_error(a, b) < 1e-4 for a, b in zip(*results, strict=True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert not torch._dynamo.utils.counters["graph_break"]


def test_blocks_share_their_code_whatever_their_rate_of_stochastic_depth(without_code):
    torch.manual_seed(0)
    network = build_backbone("vit_micro", patch_size=8, img_size=32, drop_path_rate=0.5).train()
    compile_blocks([network], CPU)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    outputs = torch.stack([network(torch.ones(64, 3, 32, 32)) for _ in range(2)])
    assert counted["unique_graphs"] == before + 2  # of the first block, which drops nothing; of the others
    assert outputs.std(1).min() > 0  # equal images differ in what is dropped
    network(torch.ones(2, 3, 16, 16))
    assert counted["unique_graphs"] == before + 4


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no\ncompiler")))
    compile_blocks([build_backbone("resnet8")], CPU)
    assert "(RuntimeError: no compiler); nothing is compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_compiled_blocks_equals_one_without(tmp_path):
    write_images(tmp_path / "images", 8)
    for epochs, name in ((1, "false"), (1, "true"), (2, "false"), (2, "true")):
        flags = ("--epochs", epochs, "--warmup_epochs", 0, "--drop_path_rate", 0, "--compile", name)
        outcome = pretrain(tmp_path / "images", tmp_path / name, *flags)
        assert outcome.status == 0 and ("compiled blocks: 12;" in outcome.stdout) == (name == "true")
    plain, compiled = ([record["train_loss"] for record in read_log(tmp_path / name / "log.txt")] for name in ("false", "true"))
    assert compiled == pytest.approx(plain, rel=1e-4)
