"""Invalid flags of main_dino.py and eval_linear.py: one clear line, exit status 2, and nothing written."""

import shutil

import pytest
import torch
from support.in_process import Outcome, assert_refused, pretrain, probe, snapshot, times
from support.processes import TINY_NETWORK, launch


@pytest.fixture
def world(world_of_bad_input):
    return world_of_bad_input


def words(world, text):
    """`text` split at blanks, with the paths of `world` in place of {name}."""
    return [word.format(**vars(world)) for word in text.split()]


# --- main_dino.py ------------------------------------------------------------------------------------------------------

# Flags, and what the message must hold: the name, the value, the valid choices.
PRETRAINING = [
    ("--data_path {root}/absent", "{root}/absent", "does not exist"),
    ("--data_path {file}", "{file}", "is not a folder"),
    ("--data_path {empty}", "{empty}", "has no images", ".jpg"),
    ("--knn_data {hole}", "{hole}/train/void", "has no images"),
    ("--knn_data {renamed}", "train/ and val/", "blue, red"),
    ("--batch_size_per_gpu 13", "batch of 13 images", "larger than the data (12 images"),
    ("--batch_size_per_gpu 4 --accumulation 4", "4 x 1 processes x 4 micro-batches", "(12 images"),
    ("--epochs 3 --warmup_epochs 4", "--warmup_epochs 4", "3 epochs"),
    ("--net simclr", "'simclr'", "dino, CLeVER"),
    ("--arch vit_gigantic_99", "'vit_gigantic_99'", "vit_tiny", "resnet18"),
    ("--aug aug9", "'aug9'", "aug1, aug1_2, aug1_4_2"),
    ("--reg_lambd much", "'much'", "_reg0.001"),
    ("--reg_lambd _reg-1", "'_reg-1'", ">= 0"),
    ("--init_from {root}/absent.pth", "{root}/absent.pth", "no such file"),
    ("--init_from {damaged}", "{damaged}", "damaged"),
    ("--init_from {foreign}", "{foreign}", "holds numpy"),
    ("--init_from {checkpoint} --arch resnet8", "weights do not fit", "missing", "unexpected"),
    ("--output_dir {file}", "{file}", "is a file"),
    ("--output_dir=~/R", "--output_dir ~/R", "$HOME"),
    ("--output_dir {file}/below", "{file}/below", "cannot be written"),
    ("--output_dir /proc/below", "/proc/below", "cannot be written"),
    ("--patch_size 5", "--patch_size 5", "32"),
    ("--patch_size 32", "--patch_size 32", "--local_crops_size 16"),
    ("--use_fp16 perhaps", "--use_fp16", "'perhaps'", "true, false, on, off, 1, 0"),
    ("--epochs ten", "--epochs", "'ten'"),
    ("--no_such_flag 1", "--no_such_flag", "--help"),
    ("--momentum_teacher 1.1", "--momentum_teacher 1.1", "[0, 1]"),
    ("--drop_path_rate 1", "--drop_path_rate 1.0", "[0, 1)"),
    ("--std 0.2 0 0.2", "--std [0.2, 0.0, 0.2]", "greater than 0"),
]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {' '.join(str(float(v)) for v in value.split())}", "two numbers in (0, 1]")
    for name, value in (("global_crops_scale", "0.6 0.4"), ("local_crops_scale", "nan 1"))
]
PRETRAINING += [("--hp1 1", "hp1 1.0", "EF", "empty"), ("--net dino --hp1 2", "--hp1 2.0", "(0, 1]")]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {value}", "greater than 0")
    for name, value in (("batch_size_per_gpu", "0"), ("accumulation", "-3"), ("patch_size", "0"))
]
PRETRAINING += [("--out_dim 1", "--out_dim 1", "2 or greater")]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {value}", "0 or greater")
    for name, value in (("epochs", "-1"), ("seed", str(2**64)), ("lr", "nan"), ("weight_decay", "inf"))
]


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in PRETRAINING])
def test_pretraining_refuses(world, tmp_path, flags, mentioned):
    before = times(world.root)
    outcome = pretrain(world.data / "train", tmp_path / "out", *words(world, flags))
    assert_refused(outcome, *(text.format(**vars(world)) for text in mentioned))
    assert not (tmp_path / "out").exists() and times(world.root) == before


def test_crops_that_patches_do_not_divide_are_refused_for_timms_models_too(world, tmp_path):
    pytest.importorskip("timm")
    flags = ("--arch", "vit_tiny_patch16_224", "--global_crops_size", 32, "--local_crops_size", 24)
    outcome = pretrain(world.data / "train", tmp_path / "out", *flags)
    assert_refused(outcome, "16 does not divide --local_crops_size 24")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        ("--arch resnet8", ("--arch resnet8", "vit_micro", "--output_dir")),
        ("--net dino", ("--net dino", "CLeVER", "--output_dir")),
        ("--hp1 0.5", ("--hp1 0.5", "0.8")),
        ("--optimizer sgd", ("--optimizer sgd", "adamw")),
    ],
)
def test_a_run_cannot_be_continued_as_another(world, tmp_path, flags, mentioned):
    shutil.copytree(world.clever, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert_refused(pretrain(world.data / "train", tmp_path / "out", "--epochs", 2, *words(world, flags)), *mentioned)
    assert snapshot(tmp_path / "out") == before


def silent_other_head(state):
    state["args"] = {}
    state["student"]["head.mlp.0.weight"] = state["student"]["head.mlp.0.weight"][:, :-1]
    return ("head.mlp.0.weight",)


def other_groups(state):
    state["optimizer"]["param_groups"][0]["params"].pop()
    return ("parameter group",)


@pytest.mark.parametrize("change", [silent_other_head, other_groups])
def test_a_checkpoint_with_other_content_is_not_continued(world, tmp_path, change):
    state = torch.load(world.checkpoint, weights_only=True)
    mentioned = change(state)
    (tmp_path / "out").mkdir()
    torch.save(state, tmp_path / "out" / "checkpoint.pth")
    before = snapshot(tmp_path / "out")
    assert_refused(pretrain(world.data / "train", tmp_path / "out", "--epochs", 2), "checkpoint", *mentioned)
    assert snapshot(tmp_path / "out") == before


# --- eval_linear.py ----------------------------------------------------------------------------------------------------

PROBE = [
    ("--data_path {root}/absent", "{root}/absent/val", "does not exist"),
    ("--data_path {empty}", "{empty}/val", "does not exist"),
    ("--data_path {hole}", "{hole}/train/void", "has no images"),
    ("--data_path {renamed}", "train/ and val/", "same class folders", "blue, red"),
    ("--dataset_type IN100", "--dataset_type IN100", "100 classes", "holds 3"),
    ("--dataset_type CUB", "'CUB'", "'IN100'"),
    ("--num_labels 4", "--num_labels 4", "holds 3"),
    ("--else_part DIR", "'DIR'", "ALL, main_part, else_part"),
    ("--test_aug_type aug9", "'aug9'", "ori, basic, aug1, aug1_2"),
    ("--net dino", "--net dino", "CLeVER"),
    ("--arch resnet8", "--arch resnet8", "vit_micro"),
    ("--patch_size 16", "--patch_size 16", "8"),
    ("--hp1 0.5", "--hp1 0.5", "0.8"),
    ("--lr nan", "--lr nan", "greater than 0"),
    ("--n_last_blocks 99", "--n_last_blocks 99", "1..6"),
    ("--epochs 0", "--epochs 0", "greater than 0"),
    ("--img_size 33", "33x33", "patch size 8"),
    ("--trial_name a/b", "'a/b'", "/"),
    ("--trial_name " + 300 * "x", "--trial_name", "at most 100 bytes"),
    ("--checkpoint_key ema", "'ema'", "student.backbone, teacher.backbone"),
    ("--pretrained_weights {root}/absent.pth", "{root}/absent.pth", "no such file"),
    ("--pretrained_weights {bare} --arch resnet8", "weights do not fit", "missing", "unexpected"),
    ("--pretrained_weights {bare} --arch vit_micro --patch_size 8 --net CLeVER", "--hp1", "pretraining's hp1"),
    ("--pretrained_weights {dino}/checkpoint.pth --else_part main_part", "main_part", "dino", "only ALL"),
    ("--evaluate", "checkpoint_linear_0.001_1_.pth.tar", "no such file"),
    ("--evaluate --final_eval_weights {checkpoint}", "{checkpoint}", "no linear classifier"),
    ("--evaluate --final_eval_weights {probe_file} --data_path {two}", "{probe_file}", "num_labels 2", "with num_labels 3"),
    ("--evaluate --final_eval_weights {probe_file} --else_part main_part", "part main_part", "with part ALL"),
    ("--evaluate --final_eval_weights {probe_file} --n_last_blocks 2", "dim 256", "with dim 512"),
    ("--evaluate --final_eval_weights {probe_file} --checkpoint_key student", "{probe_file}", "backbone"),
]  # fmt: skip
_BARE = "--pretrained_weights {bare} --arch vit_micro --patch_size 8 --net CLeVER --else_part else_part "
PROBE += [(_BARE + "--hp1 1.5", "--hp1 1.5", "(0, 1]"), (_BARE + "--hp1 1", "no parts", "hp1 near 0 or 1")]


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in PROBE])
def test_probe_refuses(world, tmp_path, flags, mentioned):
    before = times(world.root)
    outcome = probe(world.checkpoint, world.data, tmp_path / "out", *words(world, flags))
    assert_refused(outcome, *(text.format(**vars(world)) for text in mentioned))
    assert not (tmp_path / "out").exists() and times(world.root) == before


def test_a_probe_of_other_weights_is_not_continued(world, tmp_path):
    shutil.copytree(world.probe, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert_refused(probe(world.dino / "checkpoint.pth", world.data, tmp_path / "out"), "net dino", "with net CLeVER")
    assert_refused(probe(world.checkpoint, world.two, tmp_path / "out"), "num_labels 2", "with num_labels 3")
    assert snapshot(tmp_path / "out") == before


def test_a_bare_classifier_is_evaluated_but_not_continued(world, tmp_path):
    state = torch.load(world.probe_file, weights_only=True)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / world.probe_file.name
    torch.save({"state_dict": state["state_dict"]}, path)
    assert_refused(probe(world.checkpoint, world.data, tmp_path / "out"), str(path), "optimizer")
    assert probe(world.checkpoint, world.data, tmp_path / "out", "--evaluate").status == 0


# --- output folders and real processes ---------------------------------------------------------------------------------


def test_a_real_process_prints_one_line(world, tmp_path):
    flags = ("--data_path", world.data / "train", "--output_dir", tmp_path / "out", "--use_fp16", "perhaps")
    process = launch("", "main_dino.py", *TINY_NETWORK, *flags)
    assert_refused(Outcome(process.returncode, process.stdout, process.stderr), "'perhaps'", "true, false")
    assert not (tmp_path / "out").exists()


def test_two_processes_print_one_line(world, tmp_path):
    flags = ("--data_path", world.data / "train", "--output_dir", tmp_path / "out", "--batch_size_per_gpu", 7)
    process = launch("torch.distributed.launch", "main_dino.py", *TINY_NETWORK, *flags, "--epochs", 1, "--num_workers", 0)
    assert process.returncode != 0
    assert [line for line in process.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: batch of 14 images (7 x 2 processes x 1 micro-batches): larger than the data (12 images in {world.data}/train)"
    ]
    assert "error: " not in process.stdout and not (tmp_path / "out").exists()
