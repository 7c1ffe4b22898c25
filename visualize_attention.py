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
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from clever import arguments, distributed
from clever.arguments import bool_flag
from clever.data.datasets import make_loader
from clever.data.files import list_images
from clever.entry import run_entry_point
from clever.evaluation.attention import PictureDataset, cls_attention, draw_frame, draw_overview, draw_pictures
from clever.evaluation.images import check_failures, images_by_name, natural_order, save_png
from clever.evaluation.pretrained import add_backbone_arguments, load_pretrained
from clever.evaluation.video.files import DEFAULT_FPS, FORMATS, extract_frames, import_pyav, write_video
from clever.locking import locked
from clever.progress import progress
from clever.utils import InputError


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
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Fill in --image_size. Raises InputError for invalid values, before anything is read or written."""
    if not args.video_only and None in (args.pretrained_weights, args.image_path):
        raise InputError("--pretrained_weights and --image_path must be given")
    args.image_size = args.image_size or ([0] if args.video else [480, 480])
    if len(args.image_size) > 2 or min(args.image_size) < (len(args.image_size) == 2):
        raise InputError(f"--image_size {args.image_size}: must be height and width, the shorter side, or 0")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: must lie in (0, 1]")
    if args.fps is not None:
        arguments.check_positive(args, "fps")
    if (args.video or args.video_only) and args.video_format != "gif":
        import_pyav()
    arguments.check_not_negative(args, "num_workers")
    arguments.check_writable(args.output_dir)
    if args.image_path:
        check_output(Path(args.image_path).resolve(), Path(args.output_dir).resolve(), args)


def check_output(source: Path, output: Path, args: argparse.Namespace) -> None:
    """Raise InputError if pictures would become input of the next run, or replace the input."""
    pictures = [output / name for name in ("img.png", "overlay.png", "overview.png", video_path(args).name)]
    if output.is_relative_to(source) or source in pictures:
        raise InputError(f"--output_dir {args.output_dir}: pictures would mix with --image_path {args.image_path}")


def video_path(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / f"video.{args.video_format}"


def find_images(source: Path, output: Path) -> dict[str, Path]:
    """{path of an image: folder of its pictures}, in natural order."""
    if not source.is_dir():
        return {str(source): output}
    return {path: output / os.path.relpath(path, source) for path in sorted(list_images(source), key=natural_order)}


def find_frames(source: Path, output: Path) -> tuple[dict[str, Path], float]:
    """{path of a frame: its picture}, and the frames per second. The first process extracts the frames of a video file."""
    if source.is_dir():
        frames, fps = images_by_name(source), DEFAULT_FPS
    else:
        extracted = extract_frames(source, output / "frames") if distributed.is_main_process() else None
        paths, fps = distributed.all_gather_objects(extracted)[0]
        frames = {Path(path).stem: path for path in paths}
        print(f"{source}: {len(paths)} frames, {fps:.4g} per second")
    return {path: output / "attention" / f"attn-{name.replace(os.sep, '-')}.png" for name, path in frames.items()}, fps


def save_pictures(image: torch.Tensor, attention: torch.Tensor, output: Path, args: argparse.Namespace) -> None:
    """Write the picture of a frame, or all pictures of an image to a folder. Image [3, H, W], attention [heads, h, w]."""
    if args.video:
        save_png(draw_frame(image, attention), output)
        return
    pictures = draw_pictures(image, attention, args.threshold)
    for name, pixels in (pictures | {"overview": draw_overview(pictures)}).items():
        save_png(pixels, output / f"{name}.png")


def draw(backbone: nn.Module, loader: DataLoader, outputs: dict[str, Path], args: argparse.Namespace) -> dict[str, str]:
    """Draw the attention of this process's images; returns {path: reason} of the images of all processes that failed."""
    failures, device = {}, next(backbone.parameters()).device
    with progress("attention", len(loader)) as bar:
        for path, image in loader:
            if isinstance(image, str):
                failures[path] = image
            else:
                save_pictures(image, cls_attention(backbone, image[None].to(device))[0], outputs[path], args)
            bar.update()
    return {path: reason for part in distributed.all_gather_objects(failures) for path, reason in part.items()}


def save_video(pictures: list[Path], args: argparse.Namespace, fps: float) -> None:
    """Write the video, and remove pictures of an earlier one, which --video_only would take for frames of this one."""
    if not distributed.is_main_process() or not pictures:
        return
    for path in set(Path(args.output_dir).glob("attention/attn-*.png")) - set(pictures):
        path.unlink()
    write_video(pictures, video_path(args), args.fps or fps)
    print(f"wrote {video_path(args)}: {len(pictures)} frames, {args.fps or fps:.4g} per second")


def visualize(args: argparse.Namespace, device: torch.device) -> None:
    """The pictures of all images, or of all frames and then the video."""
    source, output = Path(args.image_path), Path(args.output_dir)
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("no [CLS] token attends to patches")
    outputs, fps = find_frames(source, output) if args.video else (find_images(source, output), DEFAULT_FPS)
    own = list(outputs)[distributed.get_rank() :: distributed.get_world_size()]
    dataset = PictureDataset(own, args.image_size, pretrained.backbone.patch_embed.patch_size, *pretrained.stats)
    loader = make_loader(dataset, batch_size=None, num_workers=args.num_workers)  # sizes differ
    failures = draw(pretrained.backbone, loader, outputs, args)
    print(f"wrote the attention of {len(outputs) - len(failures)} images to {output}")
    if args.video:
        save_video([picture for path, picture in outputs.items() if path not in failures], args, fps)
    check_failures(failures, len(outputs))


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    with locked(video_path(args)) if args.video or args.video_only else contextlib.nullcontext():
        if args.video_only:
            pictures = sorted(Path(args.output_dir).glob("attention/attn-*.png"), key=natural_order)
            if not pictures:
                raise InputError(f"--video_only: {args.output_dir}/attention contains no attn-*.png")
            save_video(pictures, args, DEFAULT_FPS)
        else:
            visualize(args, device)


if __name__ == "__main__":
    run_entry_point(main)
