"""eval_equivariance.py: files, controls, choice of images and parts, protocols, several processes, bad input."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.in_process import assert_refused, call
from support.processes import run, write_images

import eval_equivariance
from clever.evaluation.transforms import TRANSFORMS
from clever.models.backbones import build_backbone


def equivariance(*flags):
    return call(eval_equivariance.main, "--num_workers", 0, *flags)


def measured(output, name="equivariance"):
    """The record, and its results as {(transform, part, control): result}, those of the first head and input."""
    record = json.loads((output / f"{name}.json").read_text())
    results = {}
    for result in record["results"]:
        results.setdefault((result["transform"], result["part"], result["control"]), result)
    return record, results


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """20 and 12 images without labels, checkpoints of one network, and what a run on all transformations found."""
    root = tmp_path_factory.mktemp("equivariance")
    data = root / "data"
    write_images(data / "train", 20)
    write_images(data / "val" / "nested", 12, seed=1)
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=16).eval()
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    arguments = {"arch": "vit_micro", "patch_size": 8, "net": "CLeVER", "hp1": 0.8, "global_crops_size": 16, "aug": "aug1_2"}
    for net, name in (("CLeVER", "clever"), ("dino", "dino")):
        torch.save({"teacher": state, "args": arguments | {"net": net}, "epoch": 7}, root / f"{name}.pth")
    flags = ("--pretrained_weights", root / "clever.pth", "--data_path", data, "--views_per_image", 3)
    outcome = equivariance(*flags, "--output_dir", root / "all", "--input", "pair", "single", "--random_subspaces", 2)
    assert outcome.status == 0, outcome
    return SimpleNamespace(root=root, data=data, flags=flags, outcome=outcome)


# --- what a run finds and writes ---------------------------------------------------------------------------------------


def test_what_a_run_prints_and_writes(world):
    out = world.outcome.stdout
    assert "20 training images, 12 test images, 3 views of each" in out
    assert "rotation, training images 20/20" in out and "crop, test images 12/12" in out
    files = sorted(path.name for path in (world.root / "all").iterdir())
    assert files == ["equivariance.json", "equivariance.md", "equivariance.png"]
    record, _ = measured(world.root / "all")
    expected = {"kind": "equivariance", "net": "CLeVER", "arch": "vit_micro", "hp1": 0.8, "img_size": 16, "protocol": "own",
                "pretrained_epochs": 7, "aug": "aug1_2", "num_train_images": 20, "num_test_images": 12}  # fmt: skip
    assert record.items() >= expected.items() and record["args"]["head"] == ["linear"]
    with Image.open(world.root / "all" / "equivariance.png") as picture:
        assert picture.width > 800 and len(picture.getcolors(2**24)) > 20
    table = (world.root / "all" / "equivariance.md").read_text()
    assert table.strip() in out and "| rotation: error (degrees)" in table and "head linear, input single" in table


def test_all_parts_stand_beside_all_controls(world):
    record, results = measured(world.root / "all")
    parts = [(part, control) for part in ("ALL", "IR", "EF") for control in (None, "shuffled", "untrained")]
    parts.append(("EF", "random_subspace"))
    assert results.keys() == {(name, *key) for name in TRANSFORMS for key in parts}
    gaps = {(gap["transform"], gap["part"], gap["control"]): gap for gap in record["gaps"]}
    assert gaps.keys() == {key for key in results if key[2] != "shuffled"}
    for (name, _, control), result in results.items():
        kind = TRANSFORMS[name].kind
        assert isinstance(result["r2"], float) and result["r2_per_target"].keys() == TRANSFORMS[name].targets.keys()
        assert (result["mae_degrees"] is None) == (kind != "angle")
        assert (result["accuracy"] is None) == (result["auc"] is None) == (kind != "class")
        assert ("r2_std" in result) == (result.get("draws") == 2) == (control == "random_subspace")
        assert "cosine_gap_std" in gaps[name, "EF", "random_subspace"]
    inputs = {(result["transform"], result["input"]) for result in record["results"]}
    assert ("flip", "single") not in inputs and {("flip", "pair"), ("grey", "single")} <= inputs
    untrained = results["rotation", "ALL", "untrained"]["r2"], results["rotation", "ALL", None]["r2"]
    assert untrained[0] != untrained[1]


def test_two_processes_agree_with_one(world, tmp_path):
    flags = ("--transforms", "rotation", "--head", "linear", "mlp", "--mlp_epochs", 1, "--random_subspaces", 2)
    flags = (*world.flags, *flags, "--num_workers", 0)
    for processes, folder in ((1, "one"), (2, "two")):
        output = ("--output_dir", tmp_path / folder)
        log = run("eval_equivariance.py", *flags, *output, output=tmp_path / "log", processes=processes)
    assert "rotation, training images 10/10  " in log and log.count("wrote ") == 2
    one, two = (measured(tmp_path / folder)[0] for folder in ("one", "two"))
    for kind in ("results", "gaps"):
        for a, b in zip(one[kind], two[kind], strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert b[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, (float, dict)) else value), name


# --- protocols, parts, images ------------------------------------------------------------------------------------------


def test_protocol_of_sie(world, tmp_path):
    """An MLP on pairs, half angles; SIE's R2 stands beside ours, and is not 0 for a regressor that knows nothing."""
    flags = ("--protocol", "sie", "--mlp_epochs", 1, "--transforms", "rotation", "--untrained", "false", "--parts", "ALL")
    outcome = equivariance(*world.flags, "--output_dir", tmp_path, *flags)
    assert outcome.status == 0, outcome
    record, results = measured(tmp_path)
    assert [(result["head"], result["input"]) for result in record["results"][:1]] == [("mlp", "pair")]
    shuffled = results["rotation", "ALL", "shuffled"]
    assert shuffled["r2_sie"] > shuffled["r2"] + 0.3 and 20 < shuffled["mae_degrees"] < 80
    defaults = eval_equivariance.get_args_parser().parse_args(
        ["--pretrained_weights", "-", "--data_path", "-", "--output_dir", str(tmp_path), "--protocol", "sie"]
    )
    assert eval_equivariance.resolve_args(defaults).mlp_epochs == 300


@pytest.mark.parametrize("flags, parts, random", [((), {"ALL"}, False), (("--hp1", "0.8"), {"ALL"}, True)])
def test_dino_has_random_subspaces_where_the_width_is_given(world, tmp_path, flags, parts, random):
    outcome = equivariance("--pretrained_weights", world.root / "dino.pth", "--data_path", world.data, "--output_dir", tmp_path,
                           "--transforms", "blur", *flags)  # fmt: skip
    assert outcome.status == 0, outcome
    _, results = measured(tmp_path)
    assert {part for _, part, control in results if control is None} == parts
    assert (("blur", "EF", "random_subspace") in results) == random
    assert ("no random subspaces" in outcome.stdout) != random


def test_choice_of_images(tmp_path):
    """Without train/ and val/ a fifth tests; at most --num_images of each; unreadable ones are left out on demand."""
    write_images(tmp_path / "flat", 20)

    def choose(folder, *flags):
        words = ["--pretrained_weights", "-", "--data_path", str(folder), "--num_workers", "0", *flags]
        return eval_equivariance.choose_images(eval_equivariance.get_args_parser().parse_args(words))

    everything = sorted(map(str, (tmp_path / "flat").iterdir()))
    train, test = choose(tmp_path / "flat")
    assert (len(train), len(test)) == (16, 4) and sorted(train + test) == everything
    assert train == sorted(train) and choose(tmp_path / "flat") == (train, test) != choose(tmp_path / "flat", "--seed", "1")
    few = choose(tmp_path / "flat", "--num_images", "6")
    assert len(few[0]) == 6 and set(few[0]) < set(train) and few[1] == test
    assert choose(tmp_path / "flat", "--num_images", "0") == (train, test)
    (tmp_path / "flat" / "bad.png").write_text("no image")
    assert sorted(sum(choose(tmp_path / "flat", "--skip_bad_images", "true"), [])) == everything


# --- bad input ---------------------------------------------------------------------------------------------------------

CLEVER = "--pretrained_weights {root}/clever.pth --data_path {data} "
# Flags, and what the message must hold.
BAD = [
    (CLEVER + "--transforms crop shear", "--transforms 'shear'", "rotation, rotation_corners, crop, jitter, blur, elastic"),
    (CLEVER + "--transforms flip --input single", "--transforms 'flip'", "solarize, grey"),
    (CLEVER + "--num_images 4", "4 images to fit regressors to, 4 to test them on", "at least 5 and 2"),
    ("--pretrained_weights {root}/clever.pth --data_path {root}/bad", "{root}/bad", "cannot be read"),
    ("--pretrained_weights {root}/clever.pth --data_path {root}/nine --transforms flip --views_per_image 1 --seed 2",
     "--transforms flip: flip is the same in all views of the 2 test images", "--views_per_image"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_folders(world):
    """A folder with nine images, and one with an image that cannot be read."""
    for name, count in (("nine", 9), ("bad", 12)):
        write_images(world.root / name, count)
    (world.root / "bad" / "bad.png").write_text("no image")
    return {"root": world.root, "data": world.data}


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in BAD])
def test_bad_input(bad_folders, flags, mentioned, tmp_path):
    output = () if "--output_dir" in flags else ("--output_dir", tmp_path / "output")
    words = [word.format(**bad_folders) for word in flags.split()]
    assert_refused(equivariance(*words, *output), *(text.format(**bad_folders) for text in mentioned))
    assert not list(tmp_path.iterdir())
