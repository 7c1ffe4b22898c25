"""visualize_attention.py: the attention of [CLS], masks, pictures of images and folders, videos, bad input.

Letters: H W image size in pixels, p patch size, h w patches, M heads, N patches.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import GOLDEN, fill_, rel_error, tensor
from support.in_process import assert_refused, call, snapshot
from support.processes import run, write_images

import visualize_attention as va
from augmentations import ToNormalizedTensor
from backbones import build_backbone
from utils import InputError
from vision_transformer import VisionTransformer, vit_tiny

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
HEADS = [f"attn-head{j}.png" for j in range(4)]
PICTURES = ["overview.png", "img.png", "attn-mean.png", "overlay.png", *HEADS]
MASKS = [f"mask_th0.6_head{j}.png" for j in range(4)]


def visualize(*flags):
    return call(va.main, "--num_workers", 0, *flags)


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
    (root / "movie.gif").write_bytes(b"no movie")
    return SimpleNamespace(root=root, backbone=backbone, images=images, odd=odd, weights=root / "vit.pth")


# --- attention ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_of_cls_matches_original():
    attention = fill_(vit_tiny()).eval().get_last_cls_attention(tensor("image.224x224", (2, 3, 224, 224)))
    assert rel_error(attention, GOLDEN["vit_tiny.attn_cls_row"]) < 1e-4


@pytest.mark.parametrize("H, W", [(32, 32), (24, 56), (8, 8)])
@torch.no_grad()
def test_attention_of_cls_is_a_row_of_the_whole_matrix(world, H, W):
    images = tensor("attention.images", (2, 3, H, W))
    row = world.backbone.get_last_cls_attention(images)
    whole = world.backbone.get_last_selfattention(images)  # B, M, 1+N, 1+N
    assert row.shape == (2, 4, H * W // 64)
    torch.testing.assert_close(row, whole[:, :, 0, 1:])
    torch.testing.assert_close(row.sum(-1) + whole[:, :, 0, 0], torch.ones(2, 4))
    grid = va.cls_attention(world.backbone, images)
    assert grid.shape == (2, 4, H // 8, W // 8) and torch.equal(grid.flatten(2), row)


def test_the_whole_matrix_of_the_last_block_is_never_there():
    network = VisionTransformer(patch_size=4, img_size=32, embed_dim=48, depth=2, num_heads=3).eval()
    softmaxed = []
    plain = network.blocks[-1].attn._weights

    def record(q, k):
        softmaxed.append((q.shape[-2], k.shape[-2]))
        return plain(q, k)

    with mock.patch.object(network.blocks[-1].attn, "_weights", record):
        network.get_last_cls_attention(torch.zeros(1, 3, 32, 32))
    assert softmaxed == [(1, 65)]


def test_patches_that_are_equal_get_equal_attention(world):
    network = fill_(build_backbone("vit_micro", patch_size=8, img_size=32)).eval()
    torch.nn.init.zeros_(network.pos_embed)
    attention = va.cls_attention(network, torch.ones(1, 3, 32, 40))[0]
    assert attention.std((1, 2)).max() < 1e-6 * attention.mean()
    flat = va.draw(torch.ones(3, 32, 40), torch.full((4, 4, 5), 0.05), 0.5)
    for name, picture in flat.items():
        assert name.startswith("mask") or (picture == picture[0, 0]).all(), name


# Attention over 2 x 3 patches, the share to hold, the patches of the mask.
@pytest.mark.parametrize(
    "attention, threshold, expected",
    [
        ([[0, 0, 0], [0, 1, 0]], 0.6, [[0, 0, 0], [0, 1, 0]]),
        ([[0, 0, 0], [0, 1, 0]], 1.0, [[0, 0, 0], [0, 1, 0]]),
        ([[0.1, 0.4, 0.1], [0.1, 0.3, 0]], 0.35, [[0, 1, 0], [0, 0, 0]]),
        ([[0.1, 0.4, 0.1], [0.1, 0.3, 0]], 0.5, [[0, 1, 0], [0, 1, 0]]),  # the one that crosses the threshold is kept
        ([[1, 4, 1], [1, 3, 0]], 0.69, [[0, 1, 0], [0, 1, 0]]),  # shares of the sum
        ([[1, 4, 1], [1, 3, 0]], 1.0, [[1, 1, 1], [1, 1, 0]]),
        ([[1, 1, 1], [1, 0, 0]], 0.5, [[1, 1, 0], [0, 0, 0]]),  # equal ones: the first
    ],
)
def test_mask_by_hand(attention, threshold, expected):
    mask = va.threshold_mask(torch.tensor([attention], dtype=torch.float), threshold)
    assert mask.int().tolist() == [expected]


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95])
def test_mask_holds_enough_with_the_fewest_patches(threshold):
    """And is the one that DINO defines from the other end: sorted upwards, the cumulative sum exceeds 1 - threshold."""
    attention = tensor("attention.map", (5, 6, 7)).exp()
    mask = va.threshold_mask(attention, threshold)
    for head, kept in zip(attention.double(), mask, strict=True):
        share = head / head.sum()
        assert share[kept].sum() >= threshold > share[kept].sum() - share[kept].min()
        assert share[kept].min() >= share[~kept].max()
        upwards, order = share.flatten().sort()
        assert torch.equal(kept.flatten()[order], upwards.cumsum(0) > 1 - threshold)


# --- pictures ----------------------------------------------------------------------------------------------------------


# Size of a 50 x 37 image (width x height), --image_size, the resized image cut to whole patches of 8 (H, W).
@pytest.mark.parametrize(
    "size, expected",
    [([0], (32, 48)), ([37], (32, 48)), ([74], (72, 96)), ([24, 60], (24, 56)), ([8, 8], (8, 8)), ([480, 480], (480, 480))],
)
def test_images_are_resized_and_cut_to_whole_patches(size, expected):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    prepared = va.Preparation(size, 8, MEAN, STD)(image)
    assert prepared.shape == (3, *expected)
    if size == [0]:
        assert torch.equal(prepared, ToNormalizedTensor(MEAN, STD)(image)[:, :32, :48])  # lost at the right and the bottom


def test_image_smaller_than_a_patch():
    with pytest.raises(InputError, match="image of 50x7 pixels: smaller than a patch of 8; give a larger --image_size"):
        va.Preparation([0], 8, MEAN, STD)(Image.new("RGB", (50, 7)))


def test_outline_and_inside_of_a_mask():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    picture = va.masked(np.full((7, 7, 3), 100, np.uint8), mask)
    assert picture[0, 0].tolist() == [100] * 3  # outside
    for row, column in ((1, 3), (5, 3), (3, 1), (3, 5)):  # outline
        assert picture[row, column].tolist() == [255, 0, 0]
    assert picture[3, 3].tolist() == picture[2, 4].tolist() == [177, 50, 50]  # half red
    whole = va.masked(np.full((2, 2, 3), 100, np.uint8), np.ones((2, 2), bool))
    assert (whole == [177, 50, 50]).all()  # the border of the image is no outline


def test_overlay_is_half_heat_half_image():
    image = np.array([[[0, 0, 0], [255, 255, 255]], [[0, 0, 0], [102, 51, 0]]], np.uint8)
    heads = np.array([[[0, 0], [1, 1]], [[5, 5], [5, 9.0]]])  # stretched: 0 0 1 1 and 0 0 0 1, mean 0 0 0.5 1
    jet = matplotlib.colormaps["jet"]([[0.0, 0.0], [0.5, 1.0]])[..., :3]
    blend = jet + image / 255
    assert np.allclose(va.overlay(image, heads), 255 * blend / blend.max(), atol=1)
    assert va.overlay(image, heads).max() == 255


def test_pictures_of_an_image(world, tmp_path):
    """Sides that patches do not divide; every picture has the size of what the network saw, 32 x 24."""
    outcome = visualize("--pretrained_weights", world.weights, "--image_path", world.odd, "--output_dir", tmp_path / "out",
                        "--image_size", 0, "--threshold", 0.6)  # fmt: skip
    assert outcome.status == 0, outcome
    assert "attention 1/1" in outcome.stdout and f"wrote the attention of 1 image to {tmp_path / 'out'}" in outcome.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(PICTURES + MASKS)
    original = np.asarray(Image.open(world.odd))[:24, :32]
    image = ToNormalizedTensor(MEAN, STD)(Image.fromarray(original))
    for name in PICTURES[1:] + MASKS:
        assert pixels(tmp_path / "out" / name).shape[:2] == (24, 32), name
    assert min(pixels(tmp_path / "out" / "overview.png").shape[:2]) > 200

    values = image.permute(1, 2, 0).numpy()
    seen = 255 * (values - values.min()) / (values.max() - values.min())
    assert np.allclose(pixels(tmp_path / "out" / "img.png"), seen, atol=1)
    with torch.no_grad():
        attention = world.backbone.get_last_selfattention(image[None])[0, :, 0, 1:].reshape(4, 3, 4).numpy()
    for name, values in (*zip(HEADS, attention, strict=True), ("attn-mean.png", attention.mean(0))):
        stretched = (values - values.min()) / (values.max() - values.min())
        expected = matplotlib.colormaps["viridis"](np.kron(stretched, np.ones((8, 8))), bytes=True)
        assert np.abs(pixels(tmp_path / "out" / name).astype(int) - expected).max() <= 3, name
    for j, name in enumerate(MASKS):
        mask = va.threshold_mask(torch.from_numpy(attention[j]), 0.6).numpy()
        centers = pixels(tmp_path / "out" / name)[4::8, 4::8].astype(int)
        plain = pixels(tmp_path / "out" / "img.png")[4::8, 4::8].astype(int)
        expected = np.where(mask[..., None], (plain + [255, 0, 0]) // 2, plain)
        assert np.abs(centers - expected).max() <= 1, name


def test_pictures_of_a_folder(world, tmp_path):
    """A folder per image; the default size is 480 x 480; without a threshold there are no masks."""
    source = tmp_path / "in"
    (source / "below").mkdir(parents=True)
    for name in ("a.png", "below/a.png"):
        (source / name).write_bytes((world.images / "00.png").read_bytes())
    outcome = visualize("--pretrained_weights", world.weights, "--image_path", source, "--output_dir", tmp_path / "out",
                        "--image_size", 64, 48)  # fmt: skip
    assert outcome.status == 0, outcome
    files = snapshot(tmp_path / "out")
    assert sorted(files) == sorted(f"{folder}/{name}" for folder in ("a.png", "below/a.png") for name in PICTURES)
    assert files["a.png/attn-head2.png"] == files["below/a.png/attn-head2.png"]
    assert pixels(tmp_path / "out" / "a.png" / "img.png").shape == (64, 48, 3)


def test_default_size_is_dinos():
    args = va.get_args_parser().parse_args(["--pretrained_weights", "x", "--image_path", __file__])
    va.check_args(args)
    assert args.image_size == [480, 480]


def test_a_broken_image_is_named_or_left_out(world, tmp_path):
    source = write_images(tmp_path / "in", 2)
    (source / "00.png").write_bytes(b"no image")
    flags = (
        "--pretrained_weights",
        world.weights,
        "--image_path",
        source,
        "--output_dir",
        tmp_path / "out",
        "--image_size",
        16,
    )
    assert_refused(visualize(*flags), "in/00.png")
    assert visualize(*flags, "--skip_bad_images", "true").status == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01.png"]


def test_two_processes_share_the_frames(world, tmp_path):
    """The first one extracts them, both find the attention, the first joins it: the very pictures of one process."""
    images = [Image.open(world.images / f"0{i}.png") for i in range(3)]
    images[0].save(tmp_path / "in.gif", save_all=True, append_images=images[1:], duration=40)
    flags = ("--pretrained_weights", world.weights, "--image_path", tmp_path / "in.gif", "--video", "true")
    flags = (*flags, "--video_format", "gif", "--num_workers", 0, "--output_dir")
    log = run("visualize_attention.py", *flags, tmp_path / "two", output=tmp_path / "log", processes=2)
    assert "attention 2/2 of each of 2 processes" in log and log.count("wrote the attention of 3 images") == 1
    assert call(va.main, *flags, tmp_path / "one").status == 0
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert one == two and len(one) == 7


# --- videos ------------------------------------------------------------------------------------------------------------


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
    """f2 comes before f10; the frames of the GIF are the pictures; sizes are the frames' own, cut to patches."""
    out = tmp_path / "out"
    flags = ("--pretrained_weights", world.weights, "--image_path", frames, "--output_dir", out, "--video", "true")
    outcome = visualize(*flags, "--video_format", "gif", "--fps", 10)
    assert outcome.status == 0, outcome
    assert f"wrote {out / 'video.gif'}: 11 frames, 10 per second" in outcome.stdout
    assert sorted(snapshot(out)) == sorted([*(f"attention/attn-f{i}.png" for i in range(11)), "video.gif"])
    image = ToNormalizedTensor(MEAN, STD)(Image.open(frames / "f3.png"))[:, :16, :40]
    attention = va.cls_attention(world.backbone, image[None])[0].mean(0).numpy()
    expected = va.colored(np.kron(attention, np.ones((8, 8))), "inferno")
    assert np.abs(pixels(out / "attention" / "attn-f3.png").astype(int) - expected).max() <= 3
    with Image.open(out / "video.gif") as video:
        assert video.n_frames == 11 and video.size == (40, 16) and video.info["duration"] == 100
        for i in range(11):
            video.seek(i)
            picture = pixels(out / "attention" / f"attn-f{i}.png")[..., :3].astype(int)
            assert np.abs(np.asarray(video.convert("RGB")) - picture).mean() < 4, i


def test_video_file_in(world, frames, tmp_path):
    """A GIF needs nothing but Pillow; its frames are saved as pictures, its rate is kept."""
    images = [Image.open(frames / f"f{i}.png") for i in range(4)]
    images[0].save(tmp_path / "in.gif", save_all=True, append_images=images[1:], duration=40)
    out = tmp_path / "out"
    flags = ("--pretrained_weights", world.weights, "--image_path", tmp_path / "in.gif", "--output_dir", out)
    outcome = visualize(*flags, "--video", "true", "--video_format", "gif")
    assert outcome.status == 0, outcome
    assert "in.gif: 4 frames, 25 per second" in outcome.stdout and "video.gif: 4 frames, 25 per second" in outcome.stdout
    names = [*(f"frames/frame-000{i}.png" for i in range(4)), *(f"attention/attn-frame-000{i}.png" for i in range(4))]
    assert sorted(snapshot(out)) == sorted([*names, "video.gif"])
    for i in range(4):
        assert np.abs(pixels(out / "frames" / f"frame-000{i}.png").astype(int) - np.asarray(images[i])).max() < 3
    assert_refused(visualize(*flags), "in.gif: is a video; give --video true")


def test_without_pyav_the_pictures_are_there_and_a_line_says_what_is_missing(world, frames, tmp_path):
    flags = ("--pretrained_weights", world.weights, "--image_path", frames, "--output_dir", tmp_path, "--video", "true")
    with mock.patch.dict(sys.modules, {"av": None}):
        outcome = visualize(*flags)
        assert outcome.status == 0 and "wrote no video.mp4" in outcome.stdout and "pip install av" in outcome.stdout
        assert len(snapshot(tmp_path)) == 11
        assert_refused(visualize("--output_dir", tmp_path, "--video_only"), "pip install av", "--video_format gif")
        movie = visualize("--pretrained_weights", world.weights, "--image_path", world.root / "movie.mp4",
                          "--output_dir", tmp_path / "movie", "--video", "true")  # fmt: skip
        assert_refused(movie, "movie.mp4", "pip install av")
        assert not (tmp_path / "movie").exists()
    assert visualize("--output_dir", tmp_path, "--video_only", "--video_format", "gif").status == 0
    with Image.open(tmp_path / "video.gif") as video:
        assert video.n_frames == 11


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_video_files_by_pyav(world, frames, kind, tmp_path):
    """Written, read again as input: as many frames of the same size, alike but for the compression."""
    pytest.importorskip("av")
    common = ("--pretrained_weights", world.weights, "--video", "true", "--video_format", kind)
    first = visualize(*common, "--image_path", frames, "--output_dir", tmp_path / "1", "--fps", 12.5)
    assert first.status == 0 and f"video.{kind}: 11 frames, 12.5 per second" in first.stdout, first
    second = visualize(*common, "--image_path", tmp_path / "1" / f"video.{kind}", "--output_dir", tmp_path / "2")
    assert second.status == 0 and second.stdout.count("11 frames, 12.5 per second") == 2, second
    for i in range(11):
        frame = pixels(tmp_path / "2" / "frames" / f"frame-{i:04}.png").astype(int)
        picture = pixels(tmp_path / "1" / "attention" / f"attn-f{i}.png")[..., :3]
        assert frame.shape == (16, 40, 3) and np.abs(frame - picture).mean() < 25, i


# --- bad input ---------------------------------------------------------------------------------------------------------

VIT = "--pretrained_weights {root}/vit.pth "
# Flags, and what the message must hold.
BAD = [
    (VIT, "--image_path: must be given"),
    ("--image_path {odd}", "--pretrained_weights: must be given"),
    ("--pretrained_weights {root}/absent.pth --image_path {odd}", "{root}/absent.pth", "no such file"),
    ("--pretrained_weights {root}/resnet.pth --image_path {odd}", "--arch resnet8", "pooled", "vit_tiny"),
    (VIT + "--image_path {odd} --patch_size 16", "--patch_size 16", "patch_size 8"),
    (VIT + "--image_path {root}/absent.png", "{root}/absent.png", "does not exist"),
    (VIT + "--image_path {root}/vit.pth", "image {root}/vit.pth: cannot be read"),
    (VIT + "--image_path {empty}", "{empty}", "has no images"),
    (VIT + "--image_path {odd} --image_size 7", "image of 8x7 pixels", "smaller than a patch of 8"),
    (VIT + "--image_path {odd} --image_size 0 5", "--image_size 0 5", "must be height and width"),
    (VIT + "--image_path {odd} --image_size -1", "--image_size -1", "must be"),
    (VIT + "--image_path {odd} --image_size 8 8 8", "--image_size 8 8 8", "must be"),
    (VIT + "--image_path {odd} --threshold 0", "--threshold 0.0", "(0, 1]"),
    (VIT + "--image_path {odd} --threshold nan", "--threshold nan", "(0, 1]"),
    (VIT + "--image_path {odd} --threshold 1.1", "--threshold 1.1", "(0, 1]"),
    (VIT + "--image_path {odd} --fps 0", "--fps 0.0", "greater than 0"),
    (VIT + "--image_path {images} --output_dir {images}/vis", "{images}/vis", "would become input"),
    (VIT + "--image_path {images} --output_dir {root}/vit.pth", "{root}/vit.pth", "is a file"),
    (VIT + "--image_path {named} --output_dir {empty}", "{named} could be overwritten"),
    (VIT + "--image_path {root}/movie.mp4", "{root}/movie.mp4", "is a video; give --video true"),
    (VIT + "--image_path {root}/movie.gif --video true", "--image_path {root}/movie.gif: cannot be read"),
    (VIT + "--image_path {odd} --video true", "{odd} is neither a folder nor a video", ".mp4"),
    (VIT + "--image_path {same} --video true", "{same}: frames need names of their own", "a.jpg", "a.png"),
    (VIT + "--image_path {images} --video true --video_format wmv", "'wmv'", "mp4", "gif"),
    ("--video_only", "attention holds no attn-*.png"),
]  # fmt: skip


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in BAD])
def test_bad_input(world, flags, mentioned, tmp_path):
    given = tmp_path / "given"
    paths = vars(world) | {"empty": given / "empty", "named": given / "empty" / "img.png", "same": given / "same"}
    (given / "empty").mkdir(parents=True)
    (given / "same").mkdir()
    if "{named}" in flags:
        Image.new("RGB", (16, 16)).save(paths["named"])
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(given / "same" / name)
    before = snapshot(given), snapshot(world.images)
    output = () if "--output_dir" in flags else ("--output_dir", tmp_path / "output")
    outcome = visualize(*[word.format(**paths) for word in flags.split()], *output)
    assert_refused(outcome, *(text.format(**paths) for text in mentioned))
    assert (snapshot(given), snapshot(world.images)) == before and not (tmp_path / "output").exists()
