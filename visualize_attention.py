"""What the [CLS] token of a ViT's last block attends to: pictures of each head, of their mean, and threshold masks; or a video.

An image, or every image of a folder, as DINO's script of this name:
    python visualize_attention.py --pretrained_weights R/checkpoint.pth --image_path photo.jpg --output_dir vis --threshold 0.6
A video, or a folder of its frames:
    python visualize_attention.py --pretrained_weights R/checkpoint.pth --image_path walk.mp4 --output_dir vis --video true

Written to <output_dir> for an image (for a folder: to <output_dir>/<name of the image>/):
    overview.png               all of the following pictures
    img.png                    the image as the network sees it, its values stretched to 0..255
    attn-head0.png ...         attention of a head, stretched to its own range (viridis)
    attn-mean.png              mean over heads, likewise
    overlay.png                mean of the stretched heads (jet) on top of the image; the original's infer_*.png
    mask_th0.6_head0.png ...   in red, the fewest patches that hold the fraction --threshold of a head's attention
For a video: frames/frame-0000.png ... (if it is a file), attention/attn-<frame>.png (mean over heads, inferno), video.<format>.
"""

import argparse
import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clever import arguments, distributed, utils
from clever.arguments import bool_flag
from clever.data.datasets import keep_readable, shard, worker_count, worker_options
from clever.data.files import list_images
from clever.entry import run_entry_point
from clever.evaluation.attention import (
    PictureDataset,
    ResizeAndCrop,
    cls_attention,
    draw_frame,
    draw_overview,
    draw_pictures,
)
from clever.evaluation.pretrained import add_backbone_arguments, load_pretrained
from clever.evaluation.video.files import (
    DEFAULT_FPS,
    FORMATS,
    MAX_FPS,
    MAX_GIF_FPS,
    MIN_FPS,
    SUFFIXES,
    extract_frames,
    write_video,
)
from clever.locking import locked
from clever.progress import with_progress
from clever.utils import InputError, plural

OUTPUT_NAMES = re.compile(r"(overview|img|overlay|attn-.*|mask_th.*)\.png|video\..*")


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, required=False, parts=False)
    add = parser.add_argument
    add("--image_path", "--input_path", help="an image, a folder of images, or a video")
    add("--output_dir", "--output_path", default=".", help="folder of the pictures")
    add(
        "--image_size", "--resize", type=int, nargs="+", help="size of the images: height and width; one number: the shorter "
        "side; 0: as they are. Then cropped at the right and the bottom to whole patches. A larger size gives finer maps. "
        "Default: 480 480, for videos 0",
    )  # fmt: skip
    add("--threshold", type=float, help="also write masks of the fewest patches that hold this fraction of a head's "
        "attention, such as 0.6; without it there are no masks")  # fmt: skip
    add("--video", type=bool_flag, default=False, help="--image_path is a video, or a folder of its frames")
    add("--video_only", action="store_true", help="only write the video again, from <output_dir>/attention/attn-*.png")
    add("--video_format", default="mp4", choices=FORMATS, help="all except gif need PyAV (pip install av)")
    add("--fps", type=float, help="frames per second of the video; default: those of the input, else 30")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first and leave out those that cannot be "
        "read, instead of ending with an error")  # fmt: skip
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    output = Path(args.output_dir)
    if not args.video_only:
        for name in ("pretrained_weights", "image_path"):
            if getattr(args, name) is None:
                raise InputError(f"--{name}: must be given")
        check_paths(Path(args.image_path), output, args.video)
    size = resolve_image_size(args)
    if len(size) > 2 or min(size) < (len(size) == 2):
        raise InputError(f"--image_size {' '.join(map(str, size))}: must be height and width, the shorter side, or 0")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: must lie in (0, 1]")
    if args.fps is not None:
        limit = MAX_GIF_FPS if args.video_format == "gif" else MAX_FPS
        if not MIN_FPS <= args.fps <= limit:
            raise InputError(f"--fps {args.fps}: must lie in {MIN_FPS}..{limit} for --video_format {args.video_format}")
    arguments.check_not_negative(args, "num_workers")
    arguments.check_writable(output)


def check_paths(source: Path, output: Path, video: bool) -> None:
    """Raise InputError for a source that does not exist or is of the wrong kind, and for an output that mixes with it."""
    if not source.exists():
        raise InputError(f"--image_path {source}: does not exist")
    if source.is_dir():
        if output.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--output_dir {output}: lies in --image_path {source}, where pictures would become input")
        return
    if source.resolve().parent == output.resolve() and OUTPUT_NAMES.fullmatch(source.name):
        raise InputError(f"--output_dir {output}: --image_path {source} could be overwritten; choose another folder")
    is_video = source.suffix.lower() in SUFFIXES
    if is_video and not video:
        raise InputError(f"--image_path {source}: is a video; give --video true")
    if video and not is_video:
        raise InputError(f"--video true: {source} is neither a folder nor a video ({' '.join(SUFFIXES)})")


def resolve_image_size(args: argparse.Namespace) -> list[int]:
    """--image_size or its default: DINO's for images, unchanged for videos."""
    return args.image_size or ([0] if args.video else [480, 480])


# --- input -------------------------------------------------------------------------------------------------------------


def video_path(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / f"video.{args.video_format}"


def natural_order(path: str | Path) -> list[str | int]:
    """Sort key that puts frame-2 before frame-10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", str(path))]


def find_images(source: Path, skip_bad_images: bool) -> list[str]:
    """Paths of the images below a folder in natural order, or of the single image."""
    paths = sorted(list_images(source), key=natural_order) if source.is_dir() else [str(source)]
    return [path for path, _ in keep_readable([(path, 0) for path in paths], True)] if skip_bad_images else paths


def find_frames(source: Path, output: Path, skip_bad_images: bool) -> tuple[list[str], float]:
    """Paths of the frames and their number per second. The first process extracts the frames of a video file.

    Raises InputError if two frames have the same name without suffix.
    """
    if source.is_dir():
        paths, fps = find_images(source, skip_bad_images), DEFAULT_FPS
    else:
        frames = [extract_frames(source, output / "frames") if distributed.is_main_process() else None]
        if distributed.is_distributed():
            dist.broadcast_object_list(frames)
        paths, fps = frames[0]
        print(f"{source}: {len(paths)} frames, {fps:.4g} per second")
    count = Counter(Path(path).stem for path in paths)
    duplicates = [path for path in paths if count[Path(path).stem] > 1]
    if duplicates:
        raise InputError(f"--image_path {source}: frames must have different names: {', '.join(duplicates[:3])}")
    return paths, fps


def build_network(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, ResizeAndCrop]:
    """The network and the transform of its images. Raises InputError unless the network has a [CLS] token."""
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("no [CLS] token attends to patches")
    patch_size = pretrained.backbone.patch_embed.patch_size
    transform = ResizeAndCrop(resolve_image_size(args), patch_size, pretrained.mean, pretrained.std)
    return pretrained.backbone, transform


def build_loader(paths: list[str], transform: ResizeAndCrop, num_workers: int) -> DataLoader:
    """This process's share of the images, one by one: their sizes may differ."""
    own = shard(PictureDataset(paths, transform), distributed.get_rank(), distributed.get_world_size())
    return DataLoader(own, batch_size=1, **worker_options(min(worker_count(num_workers), max(len(own) - 1, 0))))


# --- attention and pictures --------------------------------------------------------------------------------------------


def attention_maps(
    paths: list[str], backbone: nn.Module, loader: DataLoader, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path, image [3, H, W], attention [heads, rows, columns]) of each image of the loader."""
    for images, numbers in with_progress(loader, "attention", len(loader)):
        yield paths[numbers], images[0], cls_attention(backbone, images.to(device))[0]


def write_pictures(maps: Iterator[tuple[str, Tensor, Tensor]], source: Path, output: Path, threshold: float | None) -> None:
    """The pictures of each image, in `output` or, if `source` is a folder, in one folder per image below it."""
    for path, image, attention in maps:
        folder = output / os.path.relpath(path, source) if source.is_dir() else output
        pictures = draw_pictures(image, attention, threshold)
        for name, pixels in pictures.items():
            utils.save_png(pixels, folder / f"{name}.png")
        (H, W), (h, w) = image.shape[1:], attention.shape[1:]
        title = f"{os.path.basename(path)}: {W} x {H} pixels, {w} x {h} patches"
        utils.save_png(draw_overview(pictures, title), folder / "overview.png")


def attention_file(frame: str, output: Path) -> Path:
    return output / "attention" / f"attn-{Path(frame).stem}.png"


def write_frames(maps: Iterator[tuple[str, Tensor, Tensor]], output: Path) -> None:
    """The picture of each frame."""
    for path, image, attention in maps:
        utils.save_png(draw_frame(image, attention), attention_file(path, output))


def remove_other_pictures(frames: list[str], output: Path) -> None:
    """Remove the pictures of an earlier video, which --video_only would take for frames of this one."""
    kept = {attention_file(frame, output) for frame in frames}
    for path in output.glob("attention/attn-*.png"):
        if path not in kept:
            path.unlink()


def save_video(pictures: list[Path], path: Path, fps: float) -> None:
    write_video(pictures, path, fps)
    print(f"wrote {path}: {len(pictures)} frames, {fps:.4g} per second")


def visualize(args: argparse.Namespace, source: Path, output: Path, device: torch.device) -> None:
    """The pictures of all images, or of all frames and then the video."""
    backbone, transform = build_network(args, device)
    if args.video:
        paths, fps = find_frames(source, output, args.skip_bad_images)
    else:
        paths = find_images(source, args.skip_bad_images)
    maps = attention_maps(paths, backbone, build_loader(paths, transform, args.num_workers), device)
    if args.video:
        if distributed.is_main_process():
            remove_other_pictures(paths, output)
        write_frames(maps, output)
    else:
        write_pictures(maps, source, output, args.threshold)
    distributed.barrier()
    folder = output / "attention" if args.video else output
    print(f"wrote the attention of {plural(len(paths), 'image')} to {folder}")

    if args.video and distributed.is_main_process():
        video = video_path(args)
        try:
            limit = MAX_GIF_FPS if args.video_format == "gif" else MAX_FPS
            save_video([attention_file(path, output) for path in paths], video, args.fps or min(fps, limit))
        except InputError as error:  # such as missing PyAV; the pictures are there
            print(f"no {video.name} written, try again with --video_only: {error}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    source, output = Path(args.image_path or ""), Path(args.output_dir)
    if args.video_only:
        pictures = sorted(output.glob("attention/attn-*.png"), key=natural_order)
        if not pictures:
            raise InputError(f"--video_only: {output / 'attention'} contains no attn-*.png")
        with locked(video_path(args)):
            save_video(pictures, video_path(args), args.fps or DEFAULT_FPS)
        return

    device = distributed.init_distributed(args)
    with locked(video_path(args)) if args.video else contextlib.nullcontext():
        visualize(args, source, output, device)


if __name__ == "__main__":
    run_entry_point(main)
