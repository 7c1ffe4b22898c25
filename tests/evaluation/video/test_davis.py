"""Frames, label images and masks of videos, and the files that videos are made of."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import video_reference as reference
from support.synthetic_davis import write_labels, write_list, write_video

from clever.evaluation.video import davis
from clever.evaluation.video.masks import one_hot_labels, read_labels, soft_labels_to_mask, write_mask
from clever.utils import InputError


@pytest.mark.parametrize(
    "size, patch_size, short_side, expected",
    [
        ((480, 854), 16, 480, (480, 832)), ((480, 910), 8, 480, (480, 896)), ((480, 1152), 16, 480, (480, 1152)),
        ((854, 480), 16, 480, (832, 480)), ((100, 100), 16, 480, (480, 448)), ((96, 160), 16, 480, (480, 768)),
        ((96, 160), 16, 96, (96, 128)), ((480, 854), 14, 480, (476, 840)), ((20, 30), 8, 32, (32, 48)),
        ((15, 40), 16, 10, (16, 32)),
    ],
)  # fmt: skip
def test_network_sees_frames_of_the_originals_size(size, patch_size, short_side, expected):
    assert davis.network_size(size, patch_size, short_side) == expected


def test_frames_are_resized_like_the_originals(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 2:, 0] = 200
    Image.fromarray(pixels).save(tmp_path / "x.png")
    frame = davis.read_frame(tmp_path / "x.png", (2, 2), (0.5, 0, 0), (0.25, 1, 1))  # every output lies between two pixels
    assert frame[0].tolist() == [[-2, pytest.approx((200 / 255 - 0.5) / 0.25)]] * 2
    assert frame[1:].abs().max() == 0


def test_masks_survive_being_written_in_the_colours_of_pascal(tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (13, 17)).astype(np.uint8)
    write_mask(labels, tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png") == labels).all()
    first = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0]
    assert Image.open(tmp_path / "mask.png").getpalette()[:27] == first


def test_objects_keep_their_channel_however_small_and_void_has_none(tmp_path):
    labels = np.zeros((64, 64), np.uint8)
    labels[8:40, 8:40], labels[60:63, 60:61], labels[:4] = 1, 3, 255
    write_labels(labels, tmp_path / "first.png")
    hot = one_hot_labels(read_labels(tmp_path / "first.png"), (4, 4))
    assert hot.shape == (4, 4, 4)  # background and three objects: 2 is absent, 3 falls between the samples
    assert hot.sum((0, 1)).tolist() == [12, 4, 0, 0]


def test_soft_labels_become_masks_as_in_the_original():
    generator = torch.Generator().manual_seed(0)
    for size in ((40, 56), (33, 21)):
        soft = torch.rand(5, 7, 3, generator=generator)
        assert (soft_labels_to_mask(soft, 8, size) == reference.mask_of(soft, 8, size)).all()
    assert (soft_labels_to_mask(torch.tensor([0.3, 0]).expand(2, 2, 2), 4, (8, 8)) == 0).all()  # constant: as they are
    weak = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).view(1, 2, 2)
    assert soft_labels_to_mask(weak, 4, (4, 8))[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # stretched: a weak peak wins


def test_videos_are_those_of_the_list_and_frames_come_in_natural_order(tmp_path):
    write_video(tmp_path, "b", frames=3, first=9)
    write_video(tmp_path, "a", frames=2)
    write_list(tmp_path, "b", "", "a", "b")
    for kind in ("JPEGImages", "Annotations"):
        for path in (tmp_path / kind / "480p/b").iterdir():
            path.rename(path.with_name(path.name.lstrip("0")))  # 9, 10, 11
    (tmp_path / "JPEGImages/480p/b/.hidden.jpg").write_text("")
    (tmp_path / "JPEGImages/480p/b/Thumbs.db").write_text("")
    assert davis.list_videos(tmp_path, "val") == ["b", "a"]
    video = davis.open_video(tmp_path, "b")
    assert video.mask_names == ["9.png", "10.png", "11.png"] and video.size == (96, 160)
    assert [path.name for path in video.annotations] == video.mask_names


A, J = "Annotations/480p/b", "JPEGImages/480p/b"


@pytest.mark.parametrize(
    "path, content, message",
    [
        (A, None, f"{A}: does not exist"),
        (f"{J}/00002.jpg", None, "no counterpart, such as 00002"),
        (f"{J}/00000.jpg", b"no image", "00000.jpg: cannot be read"),
    ],
)
def test_videos_with_missing_or_wrong_files_are_refused(tmp_path, path, content, message):
    write_video(tmp_path, "b", frames=3)
    path = tmp_path / path
    if content is not None:
        path.write_bytes(content)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        davis.open_video(tmp_path, "b")


def test_masks_of_any_objects_can_be_scored(tmp_path):
    """Objects are the labels of the first annotation; void is background; the first and the last mask need not exist."""
    labels, marked = np.array([0, 7, 200], np.uint8), np.zeros((96, 160), np.uint8)
    marked[80:90, 5:20] = 255
    write_video(tmp_path, "b", frames=4)
    for t, path in enumerate(sorted((tmp_path / "Annotations/480p/b").iterdir())):
        truth = labels[read_labels(path)]
        write_labels(np.maximum(truth, marked), path)
        if t in (1, 2):
            write_labels(np.where(truth == labels[t], 0, truth), tmp_path / f"masks/{path.name}")  # lacks object t
    video = davis.open_video(tmp_path, "b")
    scores = davis.score_video(video, tmp_path / "masks")
    assert scores.j.tolist() == scores.f.tolist() == [[0, 1], [1, 0]] and list(scores.objects()) == ["b_7", "b_200"]
    write_labels(marked // 255, tmp_path / "masks/00001.png")
    with pytest.raises(InputError, match="masks/00001.png: .*label 1,"):
        davis.score_video(video, tmp_path / "masks")
