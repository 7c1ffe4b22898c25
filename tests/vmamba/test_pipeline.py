"""VMamba in the pipeline: pretraining, a probe of a part on perturbed images."""

import pytest
import torch
from support.in_process import probe
from support.processes import run, write_images, write_labelled_images

from clever.checkpoint import load_checkpoint

FLAGS = (
    "--net", "CLeVER", "--arch", "vssm2-vmambav2_micro", "--global_crops_size", 32, "--local_crops_size", 17,
    "--local_crops_number", 2, "--out_dim", 64, "--DVR_out_dim", 32, "--head_hidden_dim", 64, "--head_bottleneck_dim", 32,
    "--use_fp16", "false", "--warmup_epochs", 1, "--print_freq", 1, "--drop_path_rate", 0.2, "--lr", 0.032,
    "--batch_size_per_gpu", 4, "--num_workers", 0, "--epochs", 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "flat", 12)
    run("main_dino.py", *FLAGS, "--data_path", images, "--output_dir", folder / "run", output=folder / "output")
    return folder / "run" / "checkpoint.pth"


def test_pretraining_moves_every_parameter_of_the_backbone(checkpoint):
    state = load_checkpoint(checkpoint)
    student, teacher = state["student"], state["teacher"]
    for name in student:
        assert torch.isfinite(student[name]).all(), name
        if name.startswith("backbone."):
            assert not torch.equal(student[name], teacher[name]), name


def test_probe_and_perturbed_evaluation(checkpoint, tmp_path):
    data = write_labelled_images(tmp_path / "labelled", train=4, val=2)
    flags = ("--else_part", "main_part", "--batch_size_per_gpu", 4, "--lr", 0.1)
    outcome = probe(checkpoint, data, tmp_path / "probe", *flags)
    assert outcome.status == 0 and "102" in outcome.stdout, outcome.stderr  # width of the part
    outcome = probe(checkpoint, data, tmp_path / "probe", *flags, "--evaluate", "--test_aug_type", "aug1_2")
    assert outcome.status == 0 and "Accuracy of the network on the" in outcome.stdout, outcome.stderr
