"""What the [CLS] token of a ViT's last block attends to: pictures per head, their mean, threshold masks, or a video.

An image, or every image of a folder, as DINO's script of this name does:
    python visualize_attention.py --pretrained_weights R/checkpoint.pth --image_path photo.jpg --output_dir vis --threshold 0.6
A video, or a folder of its frames:
    python visualize_attention.py --pretrained_weights R/checkpoint.pth --image_path walk.mp4 --output_dir vis --video true

For an image <output_dir> gets (for a folder, <output_dir>/<name of the image>/):
    overview.png             all of the following side by side, for people
    img.png                  the image as the network saw it, its values stretched to 0..255
    attn-head0.png ...       a head's attention, stretched to its own range (viridis)
    attn-mean.png            the mean over heads, likewise
    overlay.png              the mean of the stretched heads (jet), half and half with the image: CLeVER's infer_*.png
    mask_th0.6_head0.png ... in red, the fewest patches that hold this share of a head's attention
For a video: frames/frame-0000.png ... (from a file), attention/attn-<frame>.png (mean over heads, inferno), video.<format>.

Letters: H W image size in pixels, p patch size, h w = H/p W/p patches, M heads.
"""

import argparse
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import distributed
import utils
from augmentations import ToNormalizedTensor
from datasets import DECODE_ERRORS, ImageDataset, keep_readable, list_images, read_image, shard
from evaluation.pretrained import add_backbone_arguments, load_pretrained
from telemetry import progress
from utils import InputError, bool_flag

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
FORMATS = ("mp4", "avi", "gif")
DEFAULT_FPS = 30.0
RED = np.array([255, 0, 0])
OUTPUTS = re.compile(r"(overview|img|overlay|attn-.*|mask_th.*)\.png|video\..*")


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser, required=False, parts=False)
    add = parser.add_argument
    add("--image_path", "--input_path", help="an image, a folder of images, or a video")
    add("--output_dir", "--output_path", default=".")
    add(
        "--image_size", "--resize", type=int, nargs="+", help="height and width; one number: the shorter side; 0: as it is; "
        "default: 480 480 for images, 0 for videos; then cut at the right and the bottom to whole patches",
    )  # fmt: skip
    add("--threshold", type=float, help="share of the attention that a mask has to hold, such as 0.6; default: no masks")
    add("--video", type=bool_flag, default=False, help="--image_path is a video, or a folder of its frames")
    add("--video_only", action="store_true", help="only join <output_dir>/attention/attn-*.png to a video again")
    add("--video_format", default="mp4", choices=FORMATS, help="all but gif need PyAV (pip install av)")
    add("--fps", type=float, help="frames per second; default: the input's, else 30")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first, leave out those that cannot be")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written; fills in --image_size."""
    output = Path(args.output_dir)
    for name in () if args.video_only else ("pretrained_weights", "image_path"):
        if getattr(args, name) is None:
            raise InputError(f"--{name}: must be given")
    if not args.video_only:
        check_paths(Path(args.image_path), output, args.video)
    if args.image_size is None:
        args.image_size = [0] if args.video else [480, 480]
    if len(args.image_size) > 2 or min(args.image_size) < (len(args.image_size) == 2):
        raise InputError(f"--image_size {' '.join(map(str, args.image_size))}: must be height and width, a side, or 0")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: must lie in (0, 1]")
    if args.fps is not None:
        utils.check_positive(args, "fps")
    utils.check_not_negative(args, "num_workers")
    utils.check_writable(output)


def check_paths(source: Path, output: Path, video: bool) -> None:
    """Raise InputError unless `source` is there, is a video if `video`, and no output would overwrite or join the input."""
    if not source.exists():
        raise InputError(f"--image_path {source}: does not exist")
    if source.is_dir():
        if output.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--output_dir {output}: lies in --image_path {source}, where pictures would become input")
        return
    if source.resolve().parent == output.resolve() and OUTPUTS.fullmatch(source.name):
        raise InputError(f"--output_dir {output}: --image_path {source} could be overwritten; choose another folder")
    is_video = source.suffix.lower() in VIDEO_SUFFIXES
    if is_video and not video:
        raise InputError(f"--image_path {source}: is a video; give --video true")
    if video and not is_video:
        raise InputError(f"--video true: {source} is neither a folder nor a video ({' '.join(VIDEO_SUFFIXES)})")


# --- attention ---------------------------------------------------------------------------------------------------------


class Preparation:
    """PIL image -> normalised tensor [3, H, W], resized, then cut at the bottom and the right to whole patches."""

    def __init__(self, size: list[int], patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.resize = v2.Resize(size, antialias=True) if any(size) else nn.Identity()
        self.patch_size, self.to_tensor = patch_size, ToNormalizedTensor(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        image = self.resize(image)
        p, (W, H) = self.patch_size, image.size
        if min(W, H) < p:
            raise InputError(f"image of {W}x{H} pixels: smaller than a patch of {p}; give a larger --image_size")
        return self.to_tensor(image.crop((0, 0, W - W % p, H - H % p)))


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in the last block, per head: [B, 3, H, W] -> [B, M, h, w], on the CPU."""
    p = backbone.patch_embed.patch_size
    H, W = images.shape[-2:]
    return backbone.get_last_cls_attention(images).unflatten(-1, (H // p, W // p)).float().cpu()  # B, M, h, w


def threshold_mask(attention: Tensor, threshold: float) -> Tensor:
    """The fewest patches [..., h, w] that together hold at least this share of each head's attention to the patches."""
    ordered, order = attention.flatten(-2).double().sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1)
    before = sums - ordered  # held by the patches that come first
    return (
        torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, before < threshold * sums[..., -1:]).view(attention.shape)
    )


# --- pictures ----------------------------------------------------------------------------------------------------------


def stretch(x: np.ndarray) -> np.ndarray:
    """Values moved and scaled to 0..1; all 0 where they are equal."""
    spread = x.max() - x.min()
    return (x - x.min()) / spread if spread > 0 else np.zeros_like(x)


def colored(x: np.ndarray, colormap: str) -> np.ndarray:
    """Values [H, W], stretched, as colours [H, W, 4]."""
    return matplotlib.colormaps[colormap](stretch(x), bytes=True)


def enlarged(x: np.ndarray, p: int) -> np.ndarray:
    """A value per patch [..., h, w] -> per pixel [..., H, W]."""
    return x.repeat(p, axis=-2).repeat(p, axis=-1)


def overlay(image: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Image [H, W, 3] uint8 with the mean of the stretched heads [M, H, W] in jet upon it, its maximum made 255."""
    mean = np.mean([stretch(head) for head in heads], axis=0)
    blend = matplotlib.colormaps["jet"](mean)[..., :3] + image / 255
    return (255 * blend / blend.max()).astype(np.uint8)


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Image [H, W, 3] uint8 with the mask [H, W] half red upon it, and its outline red."""
    inner = mask.copy()  # without the pixels next to one outside
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    alpha = np.where(mask & ~inner, 1.0, 0.5 * mask)[..., None]  # H, W, 1
    return (image * (1 - alpha) + RED * alpha).astype(np.uint8)


def draw(image: Tensor, attention: Tensor, threshold: float | None) -> dict[str, np.ndarray]:
    """All pictures of an image [3, H, W] and its attention [M, h, w], by the names of their files."""
    p = image.shape[-1] // attention.shape[-1]
    seen = (255 * stretch(image.permute(1, 2, 0).numpy())).round().astype(np.uint8)  # H, W, 3
    heads = enlarged(attention.numpy(), p)  # M, H, W
    pictures = {"img": seen, "overlay": overlay(seen, heads), "attn-mean": colored(heads.mean(0), "viridis")}
    pictures |= {f"attn-head{j}": colored(head, "viridis") for j, head in enumerate(heads)}
    if threshold is not None:
        masks = enlarged(threshold_mask(attention, threshold).numpy(), p)  # M, H, W
        pictures |= {f"mask_th{threshold}_head{j}": masked(seen, mask) for j, mask in enumerate(masks)}
    return pictures


def overview(pictures: dict[str, np.ndarray], title: str) -> np.ndarray:
    """The pictures with their names side by side, up to six in a row: [H, W, 4]."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    H, W = pictures["img"].shape[:2]
    figure = Figure(figsize=(2.4 * columns, (2.4 * H / W + 0.35) * rows + 0.35), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes in (all_axes := figure.subplots(rows, columns, squeeze=False).flatten()):
        axes.axis("off")
    for axes, (name, pixels) in zip(all_axes, pictures.items(), strict=False):
        axes.imshow(pixels)
        axes.set_title(name, fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


# --- images and videos -------------------------------------------------------------------------------------------------


def natural_order(path: str | Path) -> list[str | int]:
    """Sort key by which frame-2 comes before frame-10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", str(path))]


def find_images(source: Path, skip_bad_images: bool) -> list[str]:
    """The image `source`, or those below the folder `source`, in natural order."""
    paths = sorted(list_images(source), key=natural_order) if source.is_dir() else [str(source)]
    return [path for path, _ in keep_readable([(path, 0) for path in paths], True)] if skip_bad_images else paths


def attentions(
    paths: list[str], backbone: nn.Module, prepare: Preparation, device: torch.device, num_workers: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path, image [3, H, W], attention [M, h, w]) of this process's share of the images, one by one: sizes may differ."""
    dataset = ImageDataset([(path, number) for number, path in enumerate(paths)], prepare)
    own = shard(dataset, distributed.get_rank(), distributed.get_world_size())
    loader = DataLoader(own, batch_size=1, num_workers=min(distributed.worker_count(num_workers), max(len(own) - 1, 0)))
    for images, numbers in progress(loader, "attention", len(own)):
        yield paths[numbers], images[0], cls_attention(backbone, images.to(device))[0]


def write_pictures(found: Iterator[tuple[str, Tensor, Tensor]], source: Path, output: Path, threshold: float | None) -> None:
    """The pictures of each image: in `output`, or, if `source` is a folder, in a folder per image below `output`."""
    for path, image, attention in found:
        folder = output / os.path.relpath(path, source) if source.is_dir() else output
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw(image, attention, threshold)
        for name, pixels in pictures.items():
            utils.save_png(pixels, folder / f"{name}.png")
        (H, W), (h, w) = image.shape[1:], attention.shape[1:]
        title = f"{os.path.basename(path)}: {W} x {H} pixels, {w} x {h} patches"
        utils.save_png(overview(pictures, title), folder / "overview.png")


def write_frames(found: Iterator[tuple[str, Tensor, Tensor]], output: Path) -> None:
    """<output>/attention/attn-<frame>.png of each frame: the mean over heads."""
    for path, image, attention in found:
        p = image.shape[-1] // attention.shape[-1]
        utils.save_png(colored(enlarged(attention.mean(0).numpy(), p), "inferno"), attention_file(path, output))


def attention_file(frame: str, output: Path) -> Path:
    return output / "attention" / f"attn-{Path(frame).stem}.png"


# --- video files -------------------------------------------------------------------------------------------------------


def pyav() -> ModuleType:
    """PyAV, FFmpeg's libraries for Python; it is optional. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError(
            "mp4, avi and the like need PyAV (pip install av); a folder of frames and --video_format gif do without"
        ) from error


def extract_frames(video: Path, folder: Path) -> tuple[list[str], float]:
    """Write <folder>/frame-0000.png ... one by one; their paths and the frames per second. InputError if it cannot be read."""
    paths = []
    with utils.error_prefix(f"--image_path {video}"):
        for image, rate in _frames_of_gif(video) if video.suffix.lower() == ".gif" else _frames_of_video(video):
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(str(folder / f"frame-{len(paths):04}.png"))
            utils.save_png(np.asarray(image), Path(paths[-1]))
            fps = rate
        if not paths:
            raise InputError("holds no frames")
    print(f"{video}: {len(paths)} frames, {fps:.4g} per second")
    return paths, fps


def _frames_of_gif(path: Path) -> Iterator[tuple[Image.Image, float]]:
    try:
        with Image.open(path) as video:
            fps = 1000 / (video.info.get("duration") or 1000 / DEFAULT_FPS)
            for frame in ImageSequence.Iterator(video):
                yield frame.convert("RGB"), fps
    except DECODE_ERRORS as error:
        raise InputError(f"cannot be read ({error})") from error


def _frames_of_video(path: Path) -> Iterator[tuple[Image.Image, float]]:
    av = pyav()
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video[:1]:
                fps = float(stream.average_rate or DEFAULT_FPS)
                for frame in container.decode(stream):
                    yield frame.to_image(), fps
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"cannot be read ({error})") from error


def join_video(pictures: list[Path], path: Path, fps: float) -> None:
    """Write the pictures as a video, whole or not at all, in the size of the first, cut to even numbers (H.264 wants them)."""
    temporary = path.with_name(path.name + ".tmp")
    W, H = read_image(pictures[0]).size
    size = (W - W % 2, H - H % 2)
    frames = (read_image(picture).resize(size, Image.Resampling.NEAREST) for picture in pictures)
    if path.suffix == ".gif":
        next(frames).save(temporary, format="GIF", save_all=True, append_images=frames, duration=1000 / fps, loop=0)
    else:
        _encode(frames, size, temporary, path.suffix[1:], fps)
    os.replace(temporary, path)
    print(f"wrote {path}: {len(pictures)} frames, {fps:.4g} per second")


def _encode(frames: Iterator[Image.Image], size: tuple[int, int], path: Path, container_format: str, fps: float) -> None:
    av = pyav()
    try:
        with av.open(str(path), "w", format=container_format) as container:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise InputError(f"--video_format {container_format}: the video cannot be written ({error})") from error


def join_if_possible(pictures: list[Path], args: argparse.Namespace, fps: float) -> None:
    """<output_dir>/video.<format>; without PyAV only a line says what is missing: the pictures are there."""
    try:
        join_video(pictures, Path(args.output_dir) / f"video.{args.video_format}", fps)
    except InputError as error:
        if args.video_only:
            raise
        print(f"wrote no video.{args.video_format}, which --video_only can do later: {error}")


def find_frames(args: argparse.Namespace) -> tuple[list[str], float]:
    """Paths of the frames, extracted by the first process if they are in a file, and their number per second."""
    source = Path(args.image_path)
    if source.is_dir():
        paths, fps = find_images(source, args.skip_bad_images), DEFAULT_FPS
    else:
        found = [extract_frames(source, Path(args.output_dir) / "frames")] if distributed.is_main_process() else [None]
        if distributed.is_distributed():
            dist.broadcast_object_list(found)
        paths, fps = found[0]
    count = Counter(Path(path).stem for path in paths)
    same = [path for path in paths if count[Path(path).stem] > 1]
    if same:
        raise InputError(f"--image_path {source}: frames need names of their own, these share one: {', '.join(same[:3])}")
    return paths, fps


def build(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Preparation]:
    """The network, and how its images are prepared. InputError if it has no attention."""
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("no [CLS] token attends to patches")
    patch_size = pretrained.backbone.patch_embed.patch_size
    return pretrained.backbone, Preparation(args.image_size, patch_size, pretrained.mean, pretrained.std)


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    output = Path(args.output_dir)
    if args.video_only:
        pictures = sorted(output.glob("attention/attn-*.png"), key=natural_order)
        if not pictures:
            raise InputError(f"--video_only: {output / 'attention'} holds no attn-*.png")
        join_if_possible(pictures, args, args.fps or DEFAULT_FPS)
        return
    device = distributed.init_distributed(args)
    network = build(args, device)
    if args.video:
        paths, fps = find_frames(args)
        (output / "attention").mkdir(parents=True, exist_ok=True)
        write_frames(attentions(paths, *network, device, args.num_workers), output)
    else:
        paths = find_images(Path(args.image_path), args.skip_bad_images)
        write_pictures(attentions(paths, *network, device, args.num_workers), Path(args.image_path), output, args.threshold)
    distributed.barrier()
    number = f"{len(paths)} image{'s' * (len(paths) > 1)}"
    print(f"wrote the attention of {number} to {output / 'attention' if args.video else output}")
    if args.video and distributed.is_main_process():
        join_if_possible([attention_file(path, output) for path in paths], args, args.fps or fps)


if __name__ == "__main__":
    distributed.run_entry_point(main)
