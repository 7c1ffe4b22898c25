"""eval_video_segmentation.py on small videos: scores of the original, files, reruns, several processes, bad input."""

import csv
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from support import video_reference as reference
from support.golden import rel_error
from support.in_process import assert_refused, call, pretrain, snapshot, times
from support.processes import fork, run, wait, write_images
from support.synthetic_davis import (
    colour_probe,
    constant_network,
    save_checkpoint,
    shallow_vit_tiny,
    write_davis,
    write_labels,
    write_list,
    write_video,
)

import eval_video_segmentation as evaluation
from clever.evaluation.video.masks import palette, read_labels, write_mask
from clever.locking import locked
from clever.models import backbones
from scripts import score_davis

# --- the whole evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The videos on which the original was scored, two that are shorter, and checkpoints by name and patch size."""
    root = tmp_path_factory.mktemp("davis")
    write_davis(root / "DAVIS")
    write_video(root / "short", "one", frames=4, objects=1)
    write_video(root / "short", "two", frames=5)
    write_list(root / "short", "one", "two")
    for patch_size in (4, 16):
        save_checkpoint(colour_probe(patch_size), root / f"probe{patch_size}.pth")
        save_checkpoint(constant_network(patch_size), root / f"constant{patch_size}.pth")
    return root


def evaluate(weights, data, output, *flags):
    """eval_video_segmentation.py with a ViT-tiny of one block."""
    common = ("--pretrained_weights", weights, "--data_path", data, "--output_dir", output, "--num_workers", 0)
    with mock.patch.dict(backbones.BACKBONES, vit_tiny=shallow_vit_tiny):
        return call(evaluation.main, "--arch", "vit_tiny", *common, *flags)


def results(output):
    return json.loads((output / "results-val.json").read_text())


# Frames of 96x128, 24x32 patches: a fifth of the time.
SMALL = ("--patch_size", 4, "--short_side", 96)


@pytest.fixture(scope="module")
def small(world):
    output = world / "small"
    outcome = evaluate(world / "probe4.pth", world / "DAVIS", output, *SMALL)
    assert outcome.status == 0, outcome
    return output, outcome


@pytest.fixture(scope="module")
def short(world):
    """The short videos, evaluated."""
    outcome = evaluate(world / "probe4.pth", world / "short", world / "short-out", *SMALL)
    assert outcome.status == 0, outcome
    return world / "short-out"


# J&F, J, F of the original and the DAVIS tool, and J of the objects in order.
SCORES = {
    12: ((0.8809, 0.8479, 0.9140), (0.899, 0.937, 0.917, 0.968, 0.366, 0.938, 0.910)),
    0: ((0.9641, 0.9281, 1.000), (None, None, None, None, 0.923, None, None)),
}


@pytest.mark.parametrize("radius", SCORES)
def test_scores_are_those_of_the_original(world, tmp_path, radius):
    data, output = world / "DAVIS", tmp_path / "out"
    outcome = evaluate(world / "probe16.pth", data, output, "--size_mask_neighborhood", radius)
    assert outcome.status == 0, outcome
    means, per_object = SCORES[radius]
    found = results(output)
    assert [found["global"][name] for name in ("J&F-Mean", "J-Mean", "F-Mean")] == pytest.approx(means, abs=0.005)
    for row, expected in zip(found["objects"].values(), per_object, strict=True):
        assert expected is None or row["J-Mean"] == pytest.approx(expected, abs=0.005)
    later = [np.asarray(Image.open(output / "fast" / f"{t:05}.png")) for t in range(3, 7)]
    if radius:
        assert not np.any(later)  # the object jumped out of the window
    else:
        assert found["objects"]["fast_1"]["J-Mean"] > 0.85


def test_scores_are_those_of_vos_benchmark(world, small, tmp_path):
    shutil.copytree(small[0], tmp_path / "masks")  # it writes a file of its own there
    found = results(small[0])["global"]
    theirs = reference.vos_benchmark(world / "DAVIS/Annotations/480p", tmp_path / "masks")
    assert theirs == pytest.approx([100 * found[name] for name in ("J&F-Mean", "J-Mean", "F-Mean")], abs=1e-6)


def test_constant_features_score_low(world, short, tmp_path):
    assert evaluate(world / "constant4.pth", world / "short", tmp_path, *SMALL).status == 0
    assert results(tmp_path)["global"]["J-Mean"] < 0.4 < 0.8 < results(short)["global"]["J-Mean"]


def test_masks_tables_and_contact_sheet_of_a_run(world, small):
    output, outcome = small
    names = ["two-squares", "static", "fast", "unaligned"]
    tables = ["contact_sheet-val.png", "global_results-val.csv", "per-sequence_results-val.csv", "results-val.json"]
    assert sorted(path.name for path in output.iterdir()) == sorted(names + tables)
    for name in names:
        annotations = sorted((world / "DAVIS/Annotations/480p" / name).iterdir())
        assert sorted(p.name for p in (output / name).glob("*.png")) == [p.name for p in annotations]
        assert (output / name / "00000.png").read_bytes() == annotations[0].read_bytes()
        masks = [Image.open(path) for path in sorted((output / name).glob("*.png"))]
        assert {(mask.mode, mask.size) for mask in masks} == {("P", (160, 96))}
    found = results(output)
    assert found["kind"] == "video_segmentation" and found["arch"] == "vit_tiny" and len(found["objects"]) == 7
    assert all(row["J-Mean"] > 0.8 for name, row in found["objects"].items() if name != "fast_1")
    assert found["args"]["std"] == [0.228, 0.224, 0.225]
    assert [len(values) for values in found["frames"]["static"]["J"]] == [3, 3]  # 5 frames, the first and last do not count
    assert np.mean(found["frames"]["static"]["F"][1]) == pytest.approx(found["objects"]["static_2"]["F-Mean"])
    rows = list(csv.reader((output / "per-sequence_results-val.csv").open()))
    assert [row[0] for row in rows] == ["Sequence", *found["objects"]]
    assert f"J&F-Mean {found['global']['J&F-Mean']:.3f}" in outcome.stdout
    for number, name in enumerate(names, 1):
        line = rf"^video {number}/4 {name} \d+/28  \d+(\.\d)? frames/s  left 0:0"
        assert re.search(line, outcome.stdout, re.MULTILINE)
    assert outcome.stderr == ""


def test_contact_sheet_shows_frames_and_masks(world, small):
    sheet = np.asarray(Image.open(small[0] / "contact_sheet-val.png")).astype(int)
    assert sheet.shape == (4 * (22 + 120 + 4), 6 * 204 + 4, 3)
    top, left = 22, 4  # of the first frame: object 1 covers rows and columns 8 to 39 of 96x160, here five fourths of that
    blend = (np.array([220, 40, 40]) + palette()[1]) / 2
    assert abs(sheet[top + 30, left + 30] - blend).max() < 12
    assert abs(sheet[top + 5, left + 100] - [30, 60, 30]).max() < 12
    assert (sheet[top + 30, left + 7 : left + 14] == 255).all(-1).any()  # the outline
    assert (sheet[: top - 1] < 100).all(-1).any()  # the caption


def test_a_rerun_keeps_finished_videos_and_makes_changed_ones_again(world, short, tmp_path):
    data, output, weights = tmp_path / "DAVIS", tmp_path / "out", world / "probe4.pth"
    shutil.copytree(world / "short", data)  # with the times of the files, on which fingerprints depend
    shutil.copytree(short, output)
    before = times(output)
    again = evaluate(weights, data, output, *SMALL)
    assert again.status == 0 and again.stdout.count(": kept") == 2
    assert {name: time for name, time in times(output).items() if "/" in name} == {n: t for n, t in before.items() if "/" in n}
    assert results(output)["objects"] == results(short)["objects"]

    (output / "two/00003.png").unlink()  # missing: this video is made again
    write_labels(np.ones((96, 160), np.uint8), output / "one/00002.png")  # another mask: it is scored as it is
    third = evaluate(weights, data, output, *SMALL)
    assert third.stdout.count(": kept") == 1 and (output / "two/00003.png").exists()
    assert results(output)["objects"]["two_1"] == results(short)["objects"]["two_1"]
    assert results(output)["objects"]["one_1"] != results(short)["objects"]["one_1"]

    frame = data / "JPEGImages/480p/one/00002.jpg"
    Image.open(frame).rotate(180).save(frame)
    masks_only = (*SMALL, "--score", "false")
    assert "two: kept" in (changed := evaluate(weights, data, output, *masks_only).stdout) and "one: kept" not in changed
    assert ": kept" not in evaluate(weights, data, output, *masks_only, "--topk", 4).stdout
    assert ": kept" not in evaluate(world / "constant4.pth", data, output, *masks_only, "--topk", 4).stdout


def test_a_stopped_video_leaves_nothing_and_finished_ones_stay(world, short, tmp_path):
    output = tmp_path / "out"

    def stop(labels, path):
        if path.name == "00004.png":  # the last frame of the second video
            raise KeyboardInterrupt
        write_mask(labels, path)

    with mock.patch.object(evaluation, "write_mask", stop), pytest.raises(KeyboardInterrupt):
        evaluate(world / "probe4.pth", world / "short", output, *SMALL)
    assert [path.name for path in output.iterdir()] == ["one"]
    (output / ".two.unfinished").mkdir()  # what a SIGKILL leaves
    (output / ".two.unfinished/00001.png").write_text("half")
    outcome = evaluate(world / "probe4.pth", world / "short", output, *SMALL)
    assert outcome.stdout.count(": kept") == 1 and not list(output.glob(".*"))
    assert results(output)["objects"] == results(short)["objects"]


def test_portrait_square_and_other_first_names(world, tmp_path):
    data, output = tmp_path / "DAVIS", tmp_path / "out"
    write_video(data, "portrait", frames=4, height=160, width=96)
    write_video(data, "square", frames=4, height=96, width=96, objects=1)
    write_video(data, "late.jpg", frames=4, first=17)
    write_list(data, "portrait", "square", "late.jpg")
    outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
    assert outcome.status == 0, outcome
    assert all(row["J-Mean"] > 0.85 for row in results(output)["objects"].values())
    assert sorted(path.name for path in (output / "late.jpg").glob("*.png")) == [f"{t:05}.png" for t in range(17, 21)]
    assert Image.open(output / "portrait/00002.png").size == (96, 160)


@pytest.mark.parametrize(
    "flags", [("--n_last_frames", 0), ("--n_last_frames", 1), ("--bs", 3), ("--num_workers", 2), ("--topk", 5000)]
)
def test_unusual_settings_work(world, short, tmp_path, flags):
    outcome = evaluate(world / "probe4.pth", world / "short", tmp_path, *SMALL, *flags)
    assert outcome.status == 0, outcome
    if flags[0] in ("--bs", "--num_workers"):
        assert results(tmp_path)["objects"] == results(short)["objects"]
    assert np.isfinite(results(tmp_path)["global"]["J&F-Mean"])


def test_masks_without_scores_need_first_annotations_only(world, short, tmp_path):
    data = tmp_path / "DAVIS"
    shutil.copytree(world / "short", data)
    for path in (data / "Annotations/480p").glob("*/*.png"):
        if path.name != "00000.png":
            path.unlink()
    outcome = evaluate(world / "probe4.pth", data, tmp_path / "out", *SMALL, "--score", "false")
    assert outcome.status == 0, outcome
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["contact_sheet-val.png"]
    for name in ("00001.png", "00004.png"):
        assert (tmp_path / "out/two" / name).read_bytes() == (short / "two" / name).read_bytes()


# --- the network at these sizes ----------------------------------------------------------------------------------------


def test_positions_by_size_are_resized_to_the_grid():
    vit = backbones.build_backbone("vit_micro", 8)
    assert vit.positions_by == "factor"
    by_factor = vit._positions(60, 104)
    vit.positions_by = "size"
    square = vit.pos_embed[:, 1:].unflatten(1, (28, 28)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (60, 104), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(vit._positions(60, 104)[:, 1:], expected)
    assert rel_error(by_factor[:, 1:], expected) > 0.01


# --- as users run it ---------------------------------------------------------------------------------------------------


def test_two_processes_and_a_kill_give_what_one_process_gives(world, tmp_path):
    """vit_micro as saved by main_dino.py; the second run is killed after its first video, then restarted."""
    outcome = pretrain(write_images(tmp_path / "images", 8), tmp_path / "weights", "--epochs", 0)
    assert outcome.status == 0, outcome
    common = ("--pretrained_weights", tmp_path / "weights/checkpoint.pth", "--data_path", world / "DAVIS", "--num_workers", 1)
    flags = ("eval_video_segmentation.py", *common, "--short_side", 96, "--output_dir")
    run(*flags, tmp_path / "two", output=tmp_path / "log2", processes=2)
    run(*flags, tmp_path / "one", output=tmp_path / "log1", kill_at="video 1/4")
    assert [path.name for path in (tmp_path / "one").glob("*.*")] == ["video_segmentation.lock"]  # no tables
    assert run(*flags, tmp_path / "one", output=tmp_path / "log3").count(": kept") == 1
    one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 28 + 4 + 4  # masks, settings, tables and sheet
    assert all(one[name] == two[name] for name in one if name != "results-val.json")
    assert results(tmp_path / "one")["frames"] == results(tmp_path / "two")["frames"]


def test_runs_from_any_directory(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "short", "DAVIS")
    outcome = evaluate(world / "probe4.pth", "DAVIS", "out", *SMALL)
    assert outcome.status == 0, outcome
    scored = call(score_davis.main, "--data_path", "DAVIS", "--masks", "out", "--out", "again")
    assert scored.status == 0, scored
    for name in ("global_results-val.csv", "per-sequence_results-val.csv"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        (("--data_path", "{root}/absent"), ("{root}/absent", "no folder")),
        (("--data_path", "{root}/small"), ("no folder {root}/small/JPEGImages/480p", "JPEGImages, Annotations, ImageSets")),
        (("--subset", "train"), ("--subset train", "no list", "available: val")),
        (("--pretrained_weights", "{root}/absent.pth"), ("{root}/absent.pth", "no such file")),
        (("--arch", "vit_small"), ("weights do not fit",)),
        (("--short_side", 100), ("--short_side 100", "multiple of the patch size 16", "such as 96")),
        (("--short_side", 0), ("--short_side 0", "greater than 0")),
        (("--topk", 0), ("--topk 0", "greater than 0")),
        (("--n_last_frames", -1), ("--n_last_frames -1", "0 or greater")),
        (("--size_mask_neighborhood", -1), ("--size_mask_neighborhood -1", "0 or greater")),
        (("--similarity_mb", "nan"), ("--similarity_mb nan", "greater than 0")),
        (("--std", 0.2, 0, 0.2), ("--std [0.2, 0.0, 0.2]", "greater than 0")),
        (("--positions", "none"), ("--positions", "factor", "size")),
        (("--output_dir", "{root}/probe4.pth"), ("{root}/probe4.pth", "is a file")),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(world, tmp_path, flags, mentioned):
    words = [str(word).format(root=world) for word in flags]
    outcome = evaluate(world / "probe16.pth", world / "DAVIS", tmp_path / "out", *words)
    assert_refused(outcome, *(text.format(root=world) for text in mentioned))
    assert not (tmp_path / "out").exists()


def test_backbones_with_pooled_features_are_refused(world, tmp_path):
    weights = save_checkpoint(backbones.build_backbone("resnet8"), tmp_path / "weights.pth")
    outcome = evaluate(weights, world / "DAVIS", tmp_path / "out", "--arch", "resnet8")
    assert_refused(outcome, "--arch resnet8", "its features are pooled", "vit_small")


def remove(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def write_colours(path: Path) -> None:
    Image.fromarray(np.zeros((96, 160, 3), np.uint8)).save(path)


ANNOTATIONS, FRAMES = "Annotations/480p/bad", "JPEGImages/480p/bad"
# How a file is spoiled, and the error: found when files are listed, when frames are read, when masks are scored.
FAILURES = {
    "listing": (remove, f"{ANNOTATIONS}/00002.png", "frame 00002 has no annotation"),
    "first annotation": (write_colours, f"{ANNOTATIONS}/00000.png", "00000.png: is an image of mode RGB"),
    "frame": (cut_short, f"{FRAMES}/00002.jpg", "00002.jpg: cannot be read"),
    "scoring": (cut_short, f"{ANNOTATIONS}/00001.png", "00001.png: cannot be read"),
}


@pytest.fixture(scope="module")
def good_and_bad(tmp_path_factory):
    data = tmp_path_factory.mktemp("failures") / "DAVIS"
    write_video(data, "good", frames=3, objects=1)
    write_video(data, "bad", frames=4)
    write_list(data, "bad", "good")
    return data


@pytest.mark.parametrize("failure", FAILURES)
def test_a_video_that_fails_is_named_and_the_others_are_made(world, good_and_bad, tmp_path, failure):
    data, output = tmp_path / "DAVIS", tmp_path / "out"
    shutil.copytree(good_and_bad, data)
    output.mkdir()
    (output / "global_results-val.csv").write_text("of an earlier run")
    spoil, path, message = FAILURES[failure]
    spoil(data / path)
    outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
    assert outcome.status == 2
    left_out, error = outcome.stderr.splitlines()
    assert left_out.startswith("left out: bad: ") and error.startswith("error: 1 of 2 videos failed")
    assert message in left_out and message in error
    assert sorted(path.name for path in (output / "good").iterdir()) == ["00000.png", "00001.png", "00002.png", "settings.json"]
    assert not list(output.glob("*.csv")) and not list(output.glob("*.json")) and not list(output.glob(".*"))
    if failure == "listing":  # once it is repaired, the other video is not made again
        shutil.copytree(good_and_bad, data, dirs_exist_ok=True)
        outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
        assert outcome.status == 0 and outcome.stdout.count(": kept") == 1
        assert list(results(output)["objects"]) == ["bad_1", "bad_2", "good_1"]


def test_folders_of_others_are_never_touched(world, good_and_bad, tmp_path):
    (tmp_path / "out/bad").mkdir(parents=True)
    (tmp_path / "out/bad/precious.txt").write_text("mine")
    outcome = evaluate(world / "probe4.pth", good_and_bad, tmp_path / "out", *SMALL)
    assert outcome.status == 2 and "was not written by this script" in outcome.stderr
    assert snapshot(tmp_path / "out/bad") == {"precious.txt": b"mine"} and (tmp_path / "out/good").exists()
    before = snapshot(good_and_bad)
    outcome = evaluate(world / "probe4.pth", good_and_bad, good_and_bad / "Annotations/480p", *SMALL)
    assert outcome.status == 2 and outcome.stderr.count("left out") == 2
    assert snapshot(good_and_bad) == before


def test_frames_smaller_than_a_patch_are_refused(world, tmp_path):
    data = tmp_path / "DAVIS"
    write_video(data, "tiny", frames=3, height=15, width=40, side=4, objects=1)
    write_list(data, "tiny")
    outcome = evaluate(world / "probe16.pth", data, tmp_path / "out")
    assert outcome.status == 2
    assert "tiny: frames of 40x15 pixels are smaller than a patch (16x16)" in outcome.stderr


def test_videos_without_a_frame_or_an_object_to_score_do_not_count(world, tmp_path):
    data, output = tmp_path / "DAVIS", tmp_path / "out"
    write_video(data, "one", frames=1)
    write_video(data, "two", frames=2)
    write_video(data, "none", frames=3, objects=0)
    write_video(data, "whole", frames=3)
    write_list(data, "one", "two", "none", "whole")
    outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
    assert outcome.status == 0, outcome
    assert "not scored, because they have no objects or less than three frames: one, two, none" in outcome.stdout
    assert list(results(output)["objects"]) == ["whole_1", "whole_2"]
    assert [len(list((output / name).glob("*.png"))) for name in ("one", "two", "none")] == [1, 2, 3]
    write_list(data, "one", "none")
    assert_refused(evaluate(world / "probe4.pth", data, output, *SMALL), "nothing to score")


def test_void_pixels_are_background(world, tmp_path):
    outputs = []
    for name, void in (("plain", 0), ("void", 255)):
        data = tmp_path / name
        write_video(data, "v", frames=4)
        write_list(data, "v")
        for path in (data / "Annotations/480p/v").iterdir():
            labels = read_labels(path)
            labels[88:94, 60:90] = void
            write_labels(labels, path)
        outcome = evaluate(world / "probe4.pth", data, tmp_path / f"out-{name}", *SMALL)
        assert outcome.status == 0, outcome
        outputs.append(tmp_path / f"out-{name}")
    assert results(outputs[0])["objects"] == results(outputs[1])["objects"]
    assert (outputs[0] / "v/00002.png").read_bytes() == (outputs[1] / "v/00002.png").read_bytes()


def test_objects_are_the_labels_of_the_first_annotation(world, short, tmp_path):
    """Labels 1 and 2 as 7 and 200: the same scores, under these names."""
    data = shutil.copytree(world / "short", tmp_path / "DAVIS")
    for path in (data / "Annotations/480p/two").glob("*.png"):
        with Image.open(path) as image:
            labels = np.asarray(image)
        Image.fromarray(np.array([0, 7, 200], np.uint8)[labels]).save(path)
    outcome = evaluate(world / "probe4.pth", data, tmp_path / "out", *SMALL)
    assert outcome.status == 0, outcome
    found, expected = results(tmp_path / "out")["objects"], results(short)["objects"]
    assert set(found) == {"one_1", "two_7", "two_200"}
    assert found["two_7"] == expected["two_1"] and found["two_200"] == expected["two_2"]


def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path):
    with locked(tmp_path / "video_segmentation"):
        child = fork(refused_run, str(world), str(tmp_path))
        assert wait([child]) == [0]
    assert not list(tmp_path.iterdir())


def refused_run(world, output):
    outcome = evaluate(f"{world}/probe4.pth", f"{world}/short", output, *SMALL)
    assert_refused(outcome, "video_segmentation: another run is writing it")


def test_features_that_are_not_finite_are_an_error(world, tmp_path):
    checkpoint = torch.load(world / "probe4.pth", weights_only=True)
    (name,) = [name for name in checkpoint["teacher"] if name.split(".")[-2:] == ["norm", "weight"]]
    checkpoint["teacher"][name].fill_(3e38)
    torch.save(checkpoint, tmp_path / "huge.pth")
    outcome = evaluate(tmp_path / "huge.pth", world / "short", tmp_path / "out", *SMALL)
    assert outcome.status == 1 and "not finite: features of video one" in outcome.stderr
    assert not (tmp_path / "out" / "one").exists()
