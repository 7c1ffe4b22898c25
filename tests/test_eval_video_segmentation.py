"""eval_video_segmentation.py on small videos: scores of the original, files, reruns, several processes, bad input."""

import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from support.in_process import assert_refused, call, pretrain, snapshot, times
from support.processes import run, write_images
from support.synthetic_davis import write_davis, write_labels, write_list, write_video
from support.synthetic_saliency import colour_probe_, constant_network_, save_checkpoint, shallow_vit_tiny

import eval_video_segmentation as evaluation
from clever.models import backbones
from scripts import score_davis


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The videos on which the original was scored, two that are shorter, and checkpoints by name and patch size."""
    root = tmp_path_factory.mktemp("davis")
    write_davis(root / "DAVIS")
    write_video(root / "short", "one", frames=4, objects=1)
    write_video(root / "short", "two", frames=5)
    write_list(root / "short", "one", "two")
    for patch_size in (4, 16):
        save_checkpoint(colour_probe_(shallow_vit_tiny(patch_size)), root / f"probe{patch_size}.pth")
    save_checkpoint(constant_network_(shallow_vit_tiny(4)), root / "constant4.pth")
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
    assert bool(radius) != np.any(later)  # the object jumps out of the window


def test_masks_tables_and_contact_sheet_of_a_run(world, tmp_path):
    output, names = tmp_path / "out", ["two-squares", "static", "fast", "unaligned"]
    outcome = evaluate(world / "probe4.pth", world / "DAVIS", output, *SMALL)
    assert outcome.status == 0 and outcome.stderr == "", outcome
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
    assert found["args"]["std"] == [0.228, 0.224, 0.225]
    assert [len(values) for values in found["frames"]["static"]["J"]] == [3, 3]  # 5 frames, the first and last do not count
    scored = call(score_davis.main, "--data_path", world / "DAVIS", "--masks", output, "--out", tmp_path / "again")
    assert scored.status == 0, scored
    for name in tables[1:3]:
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()
    assert f"J&F-Mean {found['global']['J&F-Mean']:.3f}" in outcome.stdout
    assert re.search(r"^video 4/4 unaligned \d+/\d+ ", outcome.stdout, re.MULTILINE)
    sheet = np.asarray(Image.open(output / "contact_sheet-val.png")).astype(int)
    assert sheet.shape == (4 * 150, 6 * 200, 3)  # frames of 200 x 120 pixels
    object_and_background = np.array([[220, 40, 40], [30, 60, 30]]) / 2 + [[64, 0, 0], [0, 0, 0]]
    assert abs(sheet[[30, 5], [30, 100]] - object_and_background).max() < 12


def test_a_rerun_keeps_finished_videos_and_makes_changed_ones_again(world, short, tmp_path):
    data, output, weights = tmp_path / "DAVIS", tmp_path / "out", world / "probe4.pth"
    shutil.copytree(world / "short", data)  # with the times of the files, on which fingerprints depend
    shutil.copytree(short, output)
    before = {name: time for name, time in times(output).items() if "/" in name}
    again = evaluate(weights, data, output, *SMALL)
    assert again.status == 0 and again.stdout.count(": kept") == 2 and before.items() <= times(output).items()
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


def test_portrait_square_and_tiny_frames_and_other_first_names(world, tmp_path):
    data, output = tmp_path / "DAVIS", tmp_path / "out"
    write_video(data, "portrait", frames=4, height=160, width=96)
    write_video(data, "square", frames=4, height=96, width=96, objects=1)
    write_video(data, "tiny", frames=4, height=15, width=40, side=8, objects=1, step=(0, 1))
    write_video(data, "late.jpg", frames=4, first=17)
    write_list(data, "portrait", "square", "tiny", "late.jpg")
    outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
    assert outcome.status == 0, outcome
    assert all(row["J-Mean"] > 0.7 for row in results(output)["objects"].values())
    assert sorted(path.name for path in (output / "late.jpg").glob("*.png")) == [f"{t:05}.png" for t in range(17, 21)]
    assert Image.open(output / "portrait/00002.png").size == (96, 160)


@pytest.mark.parametrize("flags", [("--n_last_frames", 0), ("--bs", 3)])
def test_masks_without_scores_need_first_annotations_only(world, short, tmp_path, flags):
    data, output = shutil.copytree(world / "short", tmp_path / "DAVIS"), tmp_path / "out"
    for path in (data / "Annotations/480p").glob("*/0000[1-9].png"):
        path.unlink()
    outcome = evaluate(world / "probe4.pth", data, output, *SMALL, "--score", "false", *flags)
    assert outcome.status == 0 and [path.name for path in output.glob("*.*")] == ["contact_sheet-val.png"], outcome
    same = (output / "two/00004.png").read_bytes() == (short / "two/00004.png").read_bytes()
    assert same or flags[0] != "--bs"


def test_two_processes_and_a_kill_give_what_one_process_gives(world, tmp_path):
    """vit_micro as saved by main_dino.py; the second run is killed after its first video, then restarted."""
    assert pretrain(write_images(tmp_path / "images", 8), tmp_path / "weights", "--epochs", 0).status == 0
    common = ("--pretrained_weights", tmp_path / "weights/checkpoint.pth", "--data_path", world / "DAVIS", "--num_workers", 1)
    flags = ("eval_video_segmentation.py", *common, "--short_side", 96, "--output_dir")
    run(*flags, tmp_path / "two", output=tmp_path / "log2", processes=2)
    run(*flags, tmp_path / "one", output=tmp_path / "log1", kill_at="video 1/4")
    assert not list((tmp_path / "one").glob("*.csv"))
    assert run(*flags, tmp_path / "one", output=tmp_path / "log3").count(": kept") == 1
    one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
    masks = {name for name in two if not name.endswith(".lock")}
    assert masks <= one.keys() and len(masks) == 28 + 4 + 4  # masks, settings, tables and sheet
    assert all(one[name] == two[name] for name in masks if name != "results-val.json")
    assert results(tmp_path / "one")["frames"] == results(tmp_path / "two")["frames"]


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        (("--data_path", "{root}/absent"), "no list {root}/absent/ImageSets/2017/val.txt"),
        (("--short_side", 0), "--short_side 0: must be greater than 0"),
        (("--arch", "resnet8", "--pretrained_weights", "{root}/resnet.pth"), "its features are pooled"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(world, tmp_path, flags, mentioned):
    save_checkpoint(backbones.build_backbone("resnet8"), world / "resnet.pth")
    words = [str(word).format(root=world) for word in flags]
    outcome = evaluate(world / "probe16.pth", world / "DAVIS", tmp_path / "out", *words)
    assert_refused(outcome, mentioned.format(root=world))
    assert not (tmp_path / "out").exists()


# How a file of a video is spoiled, and the error: found when files are listed, when frames are read, when masks are scored.
FAILURES = {
    "listing": ("Annotations/480p/bad/00002.png", None, "no counterpart, such as 00002"),
    "frame": ("JPEGImages/480p/bad/00002.jpg", 900, "00002.jpg: cannot be read"),
    "scoring": ("Annotations/480p/bad/00001.png", 900, "00001.png: cannot be read"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_video_that_fails_is_named_and_the_others_are_made(world, tmp_path, failure):
    data, output = tmp_path / "DAVIS", tmp_path / "out"
    write_video(data, "good", frames=3, objects=1)
    write_video(data, "bad", frames=4)
    write_list(data, "bad", "good")
    output.mkdir()
    (output / "global_results-val.csv").write_text("of an earlier run")
    path, length, message = FAILURES[failure]
    content = (data / path).read_bytes()
    (data / path).write_bytes(content[:length]) if length else (data / path).unlink()
    assert_refused(evaluate(world / "probe4.pth", data, output, *SMALL), "1 of 2 failed", message)
    assert sorted(path.name for path in (output / "good").iterdir()) == ["00000.png", "00001.png", "00002.png", "settings.json"]
    assert not list(output.glob("*.csv")) and not list(output.glob("*.json")) and not list(output.glob(".*"))
    if failure == "listing":  # once it is repaired, the other video is not made again
        (data / path).write_bytes(content)
        outcome = evaluate(world / "probe4.pth", data, output, *SMALL)
        assert outcome.status == 0 and outcome.stdout.count(": kept") == 1
        assert list(results(output)["objects"]) == ["bad_1", "bad_2", "good_1"]


def test_folders_of_others_are_never_touched(world, tmp_path):
    data = shutil.copytree(world / "short", tmp_path / "DAVIS")
    before = snapshot(data)
    outcome = evaluate(world / "probe4.pth", data, data / "Annotations/480p", *SMALL)
    assert_refused(outcome, "2 of 2 failed", "was not written by this script")
    assert snapshot(data) == before


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
    write_list(data, "one", "none")
    assert_refused(evaluate(world / "probe4.pth", data, output, *SMALL), "nothing to score")
