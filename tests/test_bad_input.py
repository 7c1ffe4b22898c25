"""Invalid flags of main_dino.py and eval_linear.py: one clear line, exit status 2, and nothing written."""

import os
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
    ("--data_path {textual}", "{textual}", "has no images", ".jpg"),
    ("--knn_data {root}/absent", "{root}/absent/train", "does not exist"),
    ("--knn_data {hole}", "{hole}/train/void", "has no images"),
    ("--knn_data {renamed}", "train/ and val/", "blue, red"),
    ("--batch_size_per_gpu 13", "batch of 13 images", "larger than the data (12 images"),
    ("--batch_size_per_gpu 4 --accumulation 4", "4 x 1 processes x 4 micro-batches", "(12 images"),
    ("--epochs 3 --warmup_epochs 4", "--warmup_epochs 4", "3 epochs"),
    ("--epochs 3 --warmup_teacher_temp_epochs 4", "--warmup_teacher_temp_epochs 4", "3 epochs"),
    ("--net simclr", "'simclr'", "dino, CLeVER"),
    ("--net DINO", "'DINO'", "dino, CLeVER"),
    ("--arch vit_gigantic_99", "'vit_gigantic_99'", "vit_tiny", "resnet18"),
    ("--aug aug9", "'aug9'", "aug1, aug1_2, aug1_4_2"),
    ("--optimizer adam", "'adam'", "adamw, sgd, lars"),
    ("--amp_dtype fp8", "'fp8'", "auto, bf16, fp16, fp32"),
    ("--reg_lambd much", "'much'", "_reg0.001"),
    ("--reg_lambd _reg", "'_reg'", "_reg0.001"),
    ("--reg_lambd nan", "'nan'", ">= 0"),
    ("--reg_lambd _reg-1", "'_reg-1'", ">= 0"),
    ("--net dino --reg_lambd much", "'much'", "_reg0.001"),
    ("--init_from {root}/absent.pth", "{root}/absent.pth", "no such file"),
    ("--init_from {empty}", "{empty}", "no such file"),
    ("--init_from {damaged}", "{damaged}", "damaged"),
    ("--init_from {file}", "{file}", "damaged"),
    ("--init_from {foreign}", "{foreign}", "holds numpy"),
    ("--init_from {listed}", "{listed}", "list"),
    ("--init_from {checkpoint} --arch resnet8", "weights do not fit", "missing", "unexpected"),
    ("--init_from {checkpoint} --patch_size 16", "weights do not fit", "of another shape"),
    ("--output_dir {file}", "{file}", "is a file"),
    ("--output_dir {file}/below", "{file}/below", "cannot be written"),
    ("--output_dir /proc/below", "/proc/below", "cannot be written"),
    ("--patch_size 5", "--patch_size 5", "32"),
    ("--patch_size 32", "--patch_size 32", "--local_crops_size 16"),
    ("--arch vit_micro --patch_size 64", "--patch_size 64", "32"),
    ("--use_fp16 perhaps", "--use_fp16", "'perhaps'", "true, false, on, off, 1, 0"),
    ("--norm_last_layer 2", "--norm_last_layer", "'2'", "true, false, on, off, 1, 0"),
    ("--epochs ten", "--epochs", "'ten'"),
    ("--epochs 1.5", "--epochs", "'1.5'"),
    ("--no_such_flag 1", "--no_such_flag", "--help"),
    ("--momentum_teacher 1.1", "--momentum_teacher 1.1", "[0, 1]"),
    ("--momentum_teacher nan", "--momentum_teacher nan", "[0, 1]"),
    ("--drop_path_rate 1", "--drop_path_rate 1.0", "[0, 1)"),
    ("--std 0.2 0 0.2", "--std [0.2, 0.0, 0.2]", "greater than 0"),
    ("--mean nan 0 0", "--mean [nan, 0.0, 0.0]", "finite"),
    ("--mean 0.5", "--mean", "3 arguments"),
]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {' '.join(str(float(v)) for v in value.split())}", "two numbers in (0, 1]")
    for name in ("global_crops_scale", "local_crops_scale")
    for value in ("0.5", "0.2 0.4 0.6", "0.6 0.4", "0 0.5", "0.5 1.5", "nan 1", "0.1 nan", "-0.5 0.5")
]
PRETRAINING += [("--hp1 1", "hp1 1.0", "EF", "empty"), ("--net dino --hp1 2", "--hp1 2.0", "(0, 1]")]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {value}", "greater than 0")
    for name in (
        "head_hidden_dim", "head_bottleneck_dim", "batch_size_per_gpu", "accumulation", "patch_size", "global_crops_size",
        "local_crops_size", "print_freq",
    )
    for value in ("0", "-3")
]  # fmt: skip
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {value}", "2 or greater") for name in ("out_dim", "DVR_out_dim") for value in ("1", "-3")
]
PRETRAINING += [
    (f"--{name} {value}", f"--{name} {value}", "0 or greater")
    for name, value in (
        ("epochs", "-1"), ("local_crops_number", "-1"), ("num_workers", "-1"), ("warmup_epochs", "-1"),
        ("warmup_teacher_temp_epochs", "-1"), ("saveckp_freq", "-1"), ("seed", "-1"), ("seed", str(2**64)), ("lr", "-0.1"),
        ("lr", "nan"), ("lr", "inf"), ("min_lr", "nan"), ("clip_grad", "nan"), ("weight_decay", "nan"), ("sep_lambd", "nan"),
    )
]  # fmt: skip


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
        ("--out_dim 48", ("--out_dim 48", "64")),
        ("--DVR_out_dim 48", ("--DVR_out_dim 48", "32")),
        ("--patch_size 16", ("--patch_size 16", "8")),
        ("--head_hidden_dim 48", ("--head_hidden_dim 48", "64")),
        ("--optimizer sgd", ("--optimizer sgd", "adamw")),
    ],
)
def test_a_run_cannot_be_continued_as_another(world, tmp_path, flags, mentioned):
    shutil.copytree(world.clever, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert_refused(pretrain(world.data / "train", tmp_path / "out", "--epochs", 2, *words(world, flags)), *mentioned)
    assert snapshot(tmp_path / "out") == before


def other_keys(state):
    del state["optimizer"], state["dino_loss"]
    return ("dino_loss",)


def silent_other_head(state):
    state["args"] = {}
    state["student"]["head.mlp.0.weight"] = state["student"]["head.mlp.0.weight"][:, :-1]
    return ("head.mlp.0.weight",)


def missing_center(state):
    del state["dino_loss"]["center2"]
    return ("center2",)


def other_groups(state):
    state["optimizer"]["param_groups"][0]["params"].pop()
    return ("parameter group",)


@pytest.mark.parametrize("change", [other_keys, silent_other_head, missing_center, other_groups])
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
    ("--data_path {data}/train/grey", "{data}/train/grey/val", "does not exist"),
    ("--data_path {hole}", "{hole}/train/void", "has no images"),
    ("--data_path {renamed}", "train/ and val/", "same class folders", "blue, red"),
    ("--dataset_type IN100", "--dataset_type IN100", "100 classes", "holds 3"),
    ("--dataset_type Imagenet", "--dataset_type Imagenet", "1000 classes", "holds 3"),
    ("--dataset_type CUB", "'CUB'", "'IN100'"),
    ("--num_labels 4", "--num_labels 4", "holds 3"),
    ("--else_part DIR", "'DIR'", "ALL, main_part, else_part"),
    ("--evaluate --else_part mainpart", "'mainpart'", "ALL, main_part, else_part"),
    ("--test_aug_type aug9", "'aug9'", "ori, basic, aug1, aug1_2"),
    ("--evaluate --test_aug_type aug9", "'aug9'", "ori, basic, aug1, aug1_2"),
    ("--optimizer adamw", "'adamw'", "sgd", "lars"),
    ("--net simclr", "'simclr'", "dino", "CLeVER"),
    ("--net dino", "--net dino", "CLeVER"),
    ("--arch resnet8", "--arch resnet8", "vit_micro"),
    ("--arch vit_gigantic_99 --pretrained_weights {bare}", "'vit_gigantic_99'", "vit_tiny", "resnet18"),
    ("--patch_size 16", "--patch_size 16", "8"),
    ("--hp1 0.5", "--hp1 0.5", "0.8"),
    ("--hp1 much", "--hp1", "'much'"),
    ("--lr much", "--lr", "'much'"),
    ("--lr 0", "--lr 0", "greater than 0"),
    ("--lr nan", "--lr nan", "greater than 0"),
    ("--n_last_blocks 99", "--n_last_blocks 99", "1..6"),
    ("--n_last_blocks 0", "--n_last_blocks 0", "greater than 0"),
    ("--batch_size_per_gpu 0", "--batch_size_per_gpu 0", "greater than 0"),
    ("--val_freq 0", "--val_freq 0", "greater than 0"),
    ("--epochs 0", "--epochs 0", "greater than 0"),
    ("--num_workers -1", "--num_workers -1", "0 or greater"),
    ("--seed -1", "--seed -1", "0 or greater"),
    (f"--seed {2**64}", f"--seed {2**64}", "less than 2**63"),
    ("--img_size 0", "--img_size 0", "1 or more"),
    ("--img_size 33", "33x33", "patch size 8"),
    ("--avgpool_patchtokens perhaps", "--avgpool_patchtokens", "'perhaps'", "true, false, on, off, 1, 0"),
    ("--trial_name a/b", "'a/b'", "/"),
    ("--trial_name " + 300 * "x", "--trial_name", "at most 100 bytes"),
    ("--trial_name " + 34 * "\u2192", "--trial_name", "at most 100 bytes"),
    ("--checkpoint_key ema", "'ema'", "student.backbone, teacher.backbone"),
    ("--pretrained_weights {root}/absent.pth", "{root}/absent.pth", "no such file"),
    ("--pretrained_weights {damaged}", "{damaged}", "damaged"),
    ("--pretrained_weights {foreign}", "{foreign}", "holds numpy"),
    ("--pretrained_weights {listed}", "{listed}", "list"),
    ("--pretrained_weights {bare} --arch resnet8", "weights do not fit", "missing", "unexpected"),
    ("--pretrained_weights {bare} --arch vit_micro", "of another shape", "[128, 3, 8, 8] in the file, [128, 3, 16, 16]"),
    ("--pretrained_weights {bare} --arch vit_micro --patch_size 8 --net CLeVER", "--hp1", "pretraining's hp1"),
    ("--pretrained_weights {dino}/checkpoint.pth --else_part main_part", "main_part", "dino", "only ALL"),
    ("--pretrained_weights {dino}/checkpoint.pth --else_part else_part", "else_part", "dino", "only ALL"),
    ("--evaluate", "checkpoint_linear_0.001_1_.pth.tar", "no such file"),
    ("--evaluate --final_eval_weights {damaged}", "{damaged}", "damaged"),
    ("--evaluate --final_eval_weights {foreign}", "{foreign}", "holds numpy"),
    ("--evaluate --final_eval_weights {checkpoint}", "{checkpoint}", "no linear classifier"),
    ("--evaluate --final_eval_weights {probe_file} --data_path {two}", "{probe_file}", "num_labels 2", "with num_labels 3"),
    ("--evaluate --final_eval_weights {probe_file} --else_part main_part", "part main_part", "with part ALL"),
    ("--evaluate --final_eval_weights {probe_file} --else_part else_part", "part else_part", "with part ALL"),
    ("--evaluate --final_eval_weights {probe_file} --n_last_blocks 2", "dim 256", "with dim 512"),
    ("--evaluate --final_eval_weights {probe_file} --checkpoint_key student", "{probe_file}", "backbone"),
    ("--output_dir {file}", "{file}", "is a file"),
    ("--output_dir {file}/below", "{file}/below", "cannot be written"),
    ("--output_dir /proc/below", "/proc/below", "cannot be written"),
]  # fmt: skip
_BARE = "--pretrained_weights {bare} --arch vit_micro --patch_size 8 --net CLeVER --else_part else_part "
PROBE += [(_BARE + "--hp1 1.5", "--hp1 1.5", "(0, 1]"), (_BARE + "--hp1 1", "no parts", "hp1 near 0 or 1")]


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in PROBE])
def test_probe_refuses(world, tmp_path, flags, mentioned):
    before = times(world.root)
    outcome = probe(world.checkpoint, world.data, tmp_path / "out", *words(world, flags))
    assert_refused(outcome, *(text.format(**vars(world)) for text in mentioned))
    assert not (tmp_path / "out").exists() and times(world.root) == before


def test_pooled_backbones_have_no_patch_tokens(world, tmp_path):
    assert pretrain(world.data / "train", tmp_path / "resnet", "--arch", "resnet8", "--epochs", 0).status == 0
    weights = tmp_path / "resnet" / "checkpoint.pth"
    outcome = probe(weights, world.data, tmp_path / "out", "--avgpool_patchtokens", "true")
    assert_refused(outcome, "--avgpool_patchtokens true", "ViT")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_without_write_permission(world, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = pretrain(world.data / "train", tmp_path / "locked" / "out")
    assert_refused(outcome, "locked", "cannot be written")


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
