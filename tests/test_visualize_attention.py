"""visualize_attention.py: pictures of images and folders, videos, several processes, bad input."""

import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import fill_
from support.in_process import assert_refused, call, snapshot
from support.processes import run, write_images

import visualize_attention
from clever.evaluation.attention import cls_attention, colored, threshold_mask
from clever.evaluation.images import ToNormalizedTensor
from clever.models.backbones import build_backbone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
HEADS = [f"attn-head{j}.png" for j in range(4)]
PICTURES = ["overview.png", "img.png", "attn-mean.png", "overlay.png", *HEADS]
MASKS = [f"mask_th0.6_head{j}.png" for j in range(4)]


def visualize(*flags):
    return call(visualize_attention.main, "--num_workers", 0, *flags)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints of a ViT with 4 heads and patches of 8, and of a ResNet; images of 40 x 32 and of 37 x 29 pixels."""
    root = tmp_path_factory.mktemp("attention")
    backbone = fill_(build_backbone("vit_micro", patch_size=8, img_size=32)).eval()
    arguments = {"arch": "vit_micro", "patch_size": 8, "net": "CLeVER", "hp1": 0.8, "mean": MEAN, "std": STD}
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": state, "args": arguments}, root / "vit.pth")
    torch.save({"teacher": build_backbone("resnet8").state_dict(), "args": {"arch": "resnet8"}}, root / "resnet.pth")
    images = write_images(root / "images", 3)
    odd = root / "odd.png"
    Image.open(images / "00.png").crop((2, 1, 39, 30)).save(odd)
    (root / "movie.mp4").write_bytes(b"no movie")
    return SimpleNamespace(root=root, backbone=backbone, images=images, odd=odd, weights=root / "vit.pth")


def test_pictures_of_an_image(world, tmp_path):
    """The sides are no multiples of the patch size; every picture has the size of the network's input, 32 x 24."""
    out = tmp_path / "out"
    outcome = visualize("--pretrained_weights", world.weights, "--image_path", world.odd, "--output_dir", out,
                        "--image_size", 0, "--threshold", 0.6)  # fmt: skip
    assert outcome.status == 0 and f"wrote the attention of 1 images to {out}" in outcome.stdout, outcome
    assert sorted(snapshot(out)) == sorted(PICTURES + MASKS)
    image = ToNormalizedTensor(MEAN, STD)(Image.fromarray(np.asarray(Image.open(world.odd))[:24, :32]))
    assert {pixels(out / name).shape[:2] for name in PICTURES[1:] + MASKS} == {(24, 32)}

    values = image.permute(1, 2, 0).numpy()
    seen = 255 * (values - values.min()) / (values.max() - values.min())
    assert np.allclose(pixels(out / "img.png"), seen, atol=1)
    with torch.no_grad():
        attention = world.backbone.get_last_selfattention(image[None])[0, :, 0, 1:].reshape(4, 3, 4).numpy()
    for name, values in (*zip(HEADS, attention, strict=True), ("attn-mean.png", attention.mean(0))):
        stretched = (values - values.min()) / (values.max() - values.min())
        expected = matplotlib.colormaps["viridis"](np.kron(stretched, np.ones((8, 8))), bytes=True)
        assert np.abs(pixels(out / name).astype(int) - expected).max() <= 3, name
    plain = pixels(out / "img.png").astype(int)
    for j, name in enumerate(MASKS):
        mask = np.kron(threshold_mask(torch.from_numpy(attention[j]), 0.6).numpy(), np.ones((8, 8)))
        expected = np.where(mask[..., None], (plain + [255, 0, 0]) // 2, plain)
        assert (pixels(out / name) == expected).all(), name


def test_pictures_of_a_folder_and_a_damaged_image_that_is_named_at_the_end(world, tmp_path):
    """A folder per image; without a threshold there are no masks."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "below").mkdir(parents=True)
    for name in ("a.png", "below/a.png"):
        shutil.copy(world.images / "00.png", source / name)
    (source / "b.png").write_bytes(b"no image")
    flags = ("--pretrained_weights", world.weights, "--image_path", source, "--output_dir", out, "--image_size", 64, 48)
    assert_refused(visualize(*flags), "1 of 3 failed: image", "in/b.png: cannot be read")
    files = snapshot(out)
    assert sorted(files) == sorted(f"{folder}/{name}" for folder in ("a.png", "below/a.png") for name in PICTURES)
    assert files["a.png/attn-head2.png"] == files["below/a.png/attn-head2.png"]
    assert pixels(out / "a.png" / "img.png").shape == (64, 48, 3)


def test_two_processes_share_the_frames(world, tmp_path):
    """The first process extracts them and writes the video; the pictures are those of a single process."""
    pytest.importorskip("av")
    images = [Image.open(world.images / f"0{i}.png") for i in range(3)]
    images[0].save(tmp_path / "in.gif", save_all=True, append_images=images[1:], duration=40)
    flags = ("--pretrained_weights", world.weights, "--image_path", tmp_path / "in.gif", "--video", "true")
    flags = (*flags, "--video_format", "gif", "--num_workers", 0, "--output_dir")
    log = run("visualize_attention.py", *flags, tmp_path / "two", output=tmp_path / "log", processes=2)
    assert "attention 2/2  " in log and log.count("wrote the attention of 3 images") == 1
    assert "video.gif: 3 frames, 25 per second" in log
    assert call(visualize_attention.main, *flags, tmp_path / "one").status == 0
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    frames = [name for i in range(3) for name in (f"frames/frame-000{i}.png", f"attention/attn-frame-000{i}.png")]
    assert one == two and sorted(one) == sorted([*frames, "video.gif"])


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Eleven frames: a bright square of 8 pixels moves down the diagonal."""
    folder = tmp_path_factory.mktemp("video") / "frames"
    folder.mkdir()
    for i in range(11):
        image = np.zeros((17, 41, 3), np.uint8)
        image[i // 2 : i // 2 + 8, 3 * i : 3 * i + 8] = 255
        Image.fromarray(image).save(folder / f"f{i}.png")
    return folder


def test_video_of_a_folder_of_frames(world, frames, tmp_path):
    """f2 comes before f10; the GIF shows the pictures; frames keep their size, cropped to whole patches. Needs no PyAV."""
    out = tmp_path / "out"
    flags = ("--pretrained_weights", world.weights, "--output_dir", out, "--video", "true")
    with mock.patch.dict(sys.modules, {"av": None}):
        assert_refused(visualize(*flags, "--image_path", frames), "pip install av", "--video_format gif")
        assert not out.exists()
        outcome = visualize(*flags, "--image_path", frames, "--video_format", "gif", "--fps", 10)
    assert outcome.status == 0 and f"wrote {out / 'video.gif'}: 11 frames, 10 per second" in outcome.stdout, outcome
    assert sorted(snapshot(out)) == sorted([*(f"attention/attn-f{i}.png" for i in range(11)), "video.gif"])
    image = ToNormalizedTensor(MEAN, STD)(Image.open(frames / "f3.png"))[:, :16, :40]
    attention = cls_attention(world.backbone, image[None])[0].mean(0).numpy()
    expected = colored(np.kron(attention, np.ones((8, 8))), "inferno")
    assert np.abs(pixels(out / "attention" / "attn-f3.png").astype(int) - expected).max() <= 3
    with Image.open(out / "video.gif") as video:
        assert video.n_frames == 11 and video.size == (40, 16) and video.info["duration"] == 100
        for i in range(11):
            video.seek(i)
            picture = pixels(out / "attention" / f"attn-f{i}.png")[..., :3].astype(int)
            assert np.abs(np.asarray(video.convert("RGB")) - picture).mean() < 4, i
    # Pictures of a former video are not mixed with new ones.
    (tmp_path / "short").mkdir()
    for i in range(3):
        shutil.copy(frames / f"f{i}.png", tmp_path / "short" / f"f{i}.png")
    assert visualize(*flags, "--image_path", tmp_path / "short", "--video_format", "gif").status == 0
    outcome = visualize("--video_only", "--video_format", "gif", "--output_dir", out)
    assert outcome.status == 0 and "video.gif: 3 frames" in outcome.stdout


def test_video_files_by_pyav(world, frames, tmp_path):
    """A written video, read as input: the same number of frames of the same size, similar up to compression."""
    pytest.importorskip("av")
    common = ("--pretrained_weights", world.weights, "--video", "true", "--video_format", "mp4")
    first = visualize(*common, "--image_path", frames, "--output_dir", tmp_path / "1", "--fps", 12.5)
    assert first.status == 0 and "video.mp4: 11 frames, 12.5 per second" in first.stdout, first
    second = visualize(*common, "--image_path", tmp_path / "1" / "video.mp4", "--output_dir", tmp_path / "2")
    assert second.status == 0 and second.stdout.count("11 frames, 12.5 per second") == 2, second
    for i in range(11):
        frame = pixels(tmp_path / "2" / "frames" / f"frame-{i:04}.png").astype(int)
        picture = pixels(tmp_path / "1" / "attention" / f"attn-f{i}.png")[..., :3]
        assert frame.shape == (16, 40, 3) and np.abs(frame - picture).mean() < 25, i


VIT = "--pretrained_weights {root}/vit.pth "
# Flags, and texts that the message must contain.
BAD = [
    (VIT, "--pretrained_weights and --image_path must be given"),
    ("--pretrained_weights {root}/resnet.pth --image_path {odd}", "--arch resnet8", "pooled", "vit_tiny"),
    (VIT + "--image_path {odd} --image_size 7", "odd.png: 8x7 pixels are less than a patch of 8"),
    (VIT + "--image_path {odd} --threshold nan", "--threshold nan", "(0, 1]"),
    (VIT + "--image_path {images} --output_dir {images}/vis", "{images}/vis: pictures would mix with --image_path {images}"),
    (VIT + "--image_path {root}/movie.mp4 --video true", "{root}/movie.mp4: is not a video that can be read"),
    ("--video_only", "attention contains no attn-*.png"),
]  # fmt: skip


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in BAD])
def test_bad_input(world, flags, mentioned, tmp_path):
    before, paths = snapshot(world.images), vars(world)
    output = () if "--output_dir" in flags else ("--output_dir", tmp_path / "output")
    outcome = visualize("--video_format", "gif", *[word.format(**paths) for word in flags.split()], *output)
    assert_refused(outcome, *(text.format(**paths) for text in mentioned))
    assert snapshot(world.images) == before and not (tmp_path / "output").exists()
