"""Trainings in half precision beside the same ones in fp32, and a run that is killed: on a GPU, and small ones on a CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.in_process import call
from support.processes import ROOT, free_port, write_images

import main_dino
from clever.data.datasets import CheckRecord
from clever.training.build import build_networks, build_pretraining

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETS = ("dino", "CLeVER")
HEAD = ("--out_dim", 4096, "--DVR_out_dim", 1024, "--use_bn_in_head", "true")


def flags(images: Path, folder: Path, *more: object, side: int = 64, batch: int = 64, epochs: int = 20) -> list[str]:
    """Arguments of main_dino.py: 2 + 2 views."""
    views = ("--global_crops_size", side, "--local_crops_size", side // 2, "--local_crops_number", 2, "--patch_size", 8)
    data = ("--data_path", images, "--output_dir", folder, "--saveckp_freq", 0, "--print_freq", 1000)
    length = ("--epochs", epochs, "--warmup_epochs", 1, "--batch_size_per_gpu", batch)
    return list(map(str, (*HEAD, *views, *data, *length, *more)))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]


def assert_follows(images: Path, folder: Path, dtype: str, *more: object, **sizes: int) -> None:
    """A run in `dtype` has the losses of one in fp32: within 2 % in the first quarter of the epochs, 10 % at the end."""
    found = {}
    for name in ("fp32", dtype):
        outcome = call(main_dino.main, *flags(images, folder / name, "--amp_dtype", name, *more, **sizes))
        assert outcome.status == 0, outcome
        found[name] = losses(folder / name)
    exact, rounded = found["fp32"], found[dtype]
    assert len(exact) == len(rounded)
    quarter = max(1, len(exact) // 4)
    assert rounded[:quarter] == pytest.approx(exact[:quarter], rel=0.02), found
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.1), found
    if dtype == "fp16":
        state = torch.load(folder / dtype / "checkpoint.pth", weights_only=True)
        assert state["fp16_scaler"]["scale"] > 1


def assert_resumes(images: Path, folder: Path, variables: dict[str, str], launcher: list[str], *more: object, **sizes: int):
    """A run that is killed after its second epoch goes on, and ends with nearly the losses of an undisturbed one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(ROOT / "main_dino.py"), *flags(images, folder / name, *more, **sizes)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    text, _ = (whole := start("whole")).communicate(timeout=300)
    assert whole.returncode == 0, text
    with start("killed") as killed:
        for line in killed.stdout:
            if line.startswith("epoch 1/") and "done in" in line:
                os.killpg(killed.pid, signal.SIGKILL)
    assert 1 < len(losses(folder / "killed")) < len(losses(folder / "whole"))
    text, _ = (resumed := start("killed")).communicate(timeout=300)
    assert resumed.returncode == 0, text
    assert losses(folder / "killed") == pytest.approx(losses(folder / "whole"), rel=0.02)


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("many") / "images", 640)  # ten steps of 64


@pytest.mark.gpu
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("arch, dtype", [("vit_small", "bf16"), ("vit_small", "fp16"), ("resnet50", "bf16"),
                                         ("vssm2-vmambav2_tiny_224", "bf16")])  # fmt: skip
def test_200_steps_in_half_precision_follow_fp32(many_images, tmp_path, net, arch, dtype):
    assert_follows(many_images, tmp_path, dtype, "--net", net, "--arch", arch, "--num_workers", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["vit_small", "vssm2-vmambav2_tiny_224"])
def test_a_run_that_is_killed_goes_on(many_images, tmp_path, arch):
    assert_resumes(many_images, tmp_path, {}, [], "--arch", arch, "--num_workers", 2, epochs=4)


@pytest.mark.gpu
@pytest.mark.parametrize("net, arch", [("CLeVER", "resnet50"), ("care", "vit_small"), ("sie", "vssm2-vmambav2_tiny_224"),
                                       ("augself", "vit_small"), ("essl", "resnet50"), ("equimod", "vit_small")])  # fmt: skip
def test_cuda_graphs_give_the_same_losses(many_images, tmp_path, net, arch):
    found = {}
    for graph in ("false", "true"):
        words = ("--net", net, "--arch", arch, "--drop_path_rate", 0, "--freeze_last_layer", 0, "--cuda_graph", graph)
        outcome = call(main_dino.main, *flags(many_images, tmp_path / graph, "--amp_dtype", "bf16", *words, epochs=2))
        assert outcome.status == 0 and "--cuda_graph true:" not in outcome.stdout, outcome
        found[graph] = losses(tmp_path / graph)
    assert found["true"] == pytest.approx(found["false"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
@pytest.mark.parametrize("arch", ["vit_small", "resnet50", "vssm2-vmambav2_tiny_224"])
def test_a_step_never_waits_for_the_gpu(many_images, tmp_path, arch, graph):
    words = ("--net", "CLeVER", "--arch", arch, "--amp_dtype", "bf16", "--cuda_graph", graph, "--num_workers", 0)
    args = main_dino.resolve_args(main_dino.get_args_parser().parse_args(flags(many_images, tmp_path, *words)))
    dataset = main_dino.build_dataset(args, CheckRecord(None))
    loader = main_dino.build_loader(dataset, args)
    run = build_pretraining(args, *build_networks(args, DEVICE), DEVICE, len(loader))
    run.prepare(dataset)
    assert ("forward" in vars(run.model)) == (graph == "true")  # recorded
    try:
        for mode in ("default", "error"):  # the first step makes what later ones need
            torch.cuda.set_sync_debug_mode(mode)
            run.train_step([next(iter(loader))], mock.Mock(), 0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_on_two_gpus_that_is_killed_goes_on(many_images, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    assert_resumes(many_images, tmp_path, {}, launcher, "--arch", "vit_small", "--num_workers", 2, epochs=4, batch=32)


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    """The same checks with a small network, in bf16, in which CPUs train, too."""
    images = write_images(tmp_path / "images", 16)
    small = ("--net", "CLeVER", "--arch", "vit_micro", "--num_workers", 0)
    assert_follows(images, tmp_path / "precision", "bf16", *small, side=32, batch=8, epochs=4)
    assert_resumes(images, tmp_path / "kill", {"CUDA_VISIBLE_DEVICES": ""}, [], *small, side=32, batch=8, epochs=4)
