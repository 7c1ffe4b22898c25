"""Video object segmentation on DAVIS 2017 with frozen patch features, without any training, and its J&F measure.

    python eval_video_segmentation.py --pretrained_weights R/checkpoint.pth --data_path data/DAVIS --output_dir R/davis
Several processes share the videos: torchrun --nproc_per_node=2 eval_video_segmentation.py ...

The mask of a video's first frame is carried through it by the patches' nearest neighbours. Written to --output_dir:
<video>/<frame>.png (palette PNGs), global_results-<subset>.csv and per-sequence_results-<subset>.csv (as the DAVIS tool writes
them), results-<subset>.json (everything), contact_sheet-<subset>.png.

A video's folder appears when the video is finished. Started again, the script keeps the videos that were made with the same
weights, flags and files, makes the others, and scores all masks anew. A video that is at fault is told and left out; the
others are made all the same, but there are no tables until none is at fault.
"""

import argparse
import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import distributed
import utils
from augmentations import IMAGENET_STD
from evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained
from evaluation.video import davis, metrics
from evaluation.video.davis import Video
from evaluation.video.propagation import Propagation
from telemetry import Progress
from utils import InputError, bool_flag, whole_folder

ORIGINAL_STD = (0.228, 0.224, 0.225)  # the original's slip for 0.229; its published numbers were measured with it


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser, parts=False)
    add = parser.add_argument
    add("--data_path", required=True, help="folder of DAVIS, with JPEGImages, Annotations and ImageSets")
    add("--subset", default="val", help="which list of ImageSets/2017")
    add("--output_dir", default=".", help="masks, tables and contact sheet")
    add("--n_last_frames", type=int, default=7, help="context frames besides the first one")
    add("--size_mask_neighborhood", type=int, default=12, help="reach of the window in patches; 0: the whole frame")
    add("--topk", type=int, default=5, help="neighbours that vote")
    add("--short_side", type=int, default=davis.SHORT_SIDE, help="of the frames that the network sees, in pixels")
    add("--bs", type=int, default=1, help="frames per pass of the network (without effect in the original)")
    add("--similarity_mb", type=float, default=256, help="similarities held at a time, at most, in MiB")
    add("--std", type=float, nargs=3, help="default: the checkpoint's; for ImageNet's 0.228 0.224 0.225, as in the original")
    add("--positions", default="factor", choices=["factor", "size"], help="how they are interpolated; see vision_transformer")
    add("--score", type=bool_flag, default=True, help="false: masks only, for which first annotations suffice")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    utils.check_positive(args, "topk", "short_side", "bs", "similarity_mb")
    utils.check_not_negative(args, "n_last_frames", "size_mask_neighborhood", "num_workers")
    if args.std is not None and not all(0 < value < float("inf") for value in args.std):
        raise InputError(f"--std {args.std}: must be greater than 0, and finite")
    utils.check_writable(args.output_dir)


# --- one video ---------------------------------------------------------------------------------------------------------


def read_ahead(read: Callable[[Path], torch.Tensor], paths: Iterable[Path], threads: int) -> Iterator[torch.Tensor]:
    """Frames in order, each read by a thread while those before it are in use; 0 threads: read when asked for."""
    if threads == 0:
        yield from map(read, paths)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for path in paths:
            waiting.append(pool.submit(read, path))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.inference_mode()
def frame_features(video: Video, pretrained: Pretrained, device: torch.device, args) -> Iterator[torch.Tensor]:
    """Patch tokens of the last block after the final norm, frame by frame, [rows, columns, D]."""
    patch_size = pretrained.backbone.patch_embed.patch_size
    size = davis.network_size(video.size, patch_size, args.short_side)
    rows, columns = davis.grid_of(size, patch_size)
    frames = read_ahead(
        lambda path: davis.read_frame(path, size, pretrained.mean, args.std), video.frames, min(args.num_workers, 4)
    )
    while batch := list(islice(frames, args.bs)):
        images = torch.stack(batch).to(device)  # B, 3, h, w
        tokens = pretrained.backbone.get_intermediate_layers(images, 1)[0][:, 1:]  # B, rows*columns, D
        yield from tokens.unflatten(1, (rows, columns))


@torch.inference_mode()
def propagate(video: Video, pretrained: Pretrained, device: torch.device, args, progress, folder: Path) -> None:
    """Write the masks of all frames into the folder; that of the first is the annotation itself."""
    patch_size = pretrained.backbone.patch_embed.patch_size
    grid = davis.grid_of(davis.network_size(video.size, patch_size, args.short_side), patch_size)
    labels = davis.one_hot_labels(davis.read_labels(video.annotations[0]), grid).to(device)  # rows, columns, 1 + n
    shutil.copyfile(video.annotations[0], folder / video.mask_names[0])
    features = frame_features(video, pretrained, device, args)
    window = args.n_last_frames, args.size_mask_neighborhood, args.topk, args.similarity_mb
    propagation = Propagation(next(features), labels, *window)
    progress.advance()
    for name, feature in zip(video.mask_names[1:], features, strict=True):
        soft = propagation.step(feature)  # rows, columns, 1 + n
        davis.write_mask(davis.soft_labels_to_mask(soft, patch_size, video.size), folder / name)
        progress.advance()


RECORD = "settings.json"  # what a video's masks were made with, beside them


def settings_of(video: Video, pretrained: Pretrained, args: argparse.Namespace) -> dict[str, Any]:
    """What the masks of a video depend on."""
    names = ("n_last_frames", "size_mask_neighborhood", "topk", "short_side", "positions")
    return {
        "backbone": pretrained.fingerprint, **{name: getattr(args, name) for name in names},
        "mean": list(pretrained.mean), "std": list(args.std), "files": video.fingerprint(),
    }  # fmt: skip


def is_finished(folder: Path, video: Video, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the video's masks of these settings. Raises InputError if this script did not make it."""
    if not folder.exists():
        return False
    try:
        same = json.loads((folder / RECORD).read_text()) == settings
        return same and all((folder / name).is_file() for name in video.mask_names)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: exists, and is not of this script's making; move it away") from error


# --- all videos --------------------------------------------------------------------------------------------------------


def open_videos(names: list[str], args: argparse.Namespace) -> tuple[list[Video], dict[str, str]]:
    """The videos whose files are in order, and {name: what is wrong} of the others."""
    videos, faults = [], {}
    for name in names:
        try:
            videos.append(davis.open_video(args.data_path, name, args.score))
        except InputError as error:
            faults[name] = str(error)
    return videos, faults


def run_video(
    video: Video, pretrained: Pretrained, device: torch.device, args, progress: Progress
) -> metrics.Scores | None:
    """Make a video's masks unless they are there, and score them (None without --score).

    Raises InputError if the video is at fault.
    """
    folder, settings = Path(args.output_dir) / video.name, settings_of(video, pretrained, args)
    if is_finished(folder, video, settings):
        progress.total -= len(video.frames)
        print(f"{video.name}: kept")
    else:
        with whole_folder(folder) as scratch:
            propagate(video, pretrained, device, args, progress, scratch)
            (scratch / RECORD).write_text(json.dumps(settings, indent=1) + "\n")
    return davis.score_video(video, folder) if args.score else None


def run_share(
    videos: list[Video], pretrained: Pretrained, device: torch.device, args
) -> tuple[list[metrics.Scores], dict[str, str]]:
    """Masks and scores of this process's videos, and {name: what is wrong} of those at fault."""
    scores, faults = [], {}
    progress = Progress("", sum(len(video.frames) for video in videos), unit="frames")
    for i, video in enumerate(videos, 1):
        progress.header = f"video {i}/{len(videos)} {video.name}"
        before = progress.done
        try:
            found = run_video(video, pretrained, device, args, progress)
        except InputError as error:
            faults[video.name] = str(error)
            progress.total -= len(video.frames) - (progress.done - before)
            tell_fault(video.name, str(error))
            continue
        scores += [found] if found else []
        progress.print_line()
    return scores, faults


def tell_fault(name: str, fault: str) -> None:
    print(f"left out: {name}: {fault}", file=sys.stderr, flush=True)


def gather(share: tuple[list[metrics.Scores], dict[str, str]]) -> tuple[list[metrics.Scores], dict[str, str]]:
    """The shares of all processes in one, for every process."""
    shares = distributed.all_gather_objects(share)
    return [s for scores, _ in shares for s in scores], {k: v for _, faults in shares for k, v in faults.items()}


def write_results(scores: list[metrics.Scores], pretrained: Pretrained, args: argparse.Namespace) -> None:
    """The tables, CSV and JSON, and the result on the screen. Videos without a frame to score, or objects, do not count."""
    unscored = [s.video for s in scores if s.j.size == 0]
    scored = [s for s in scores if s.j.size]
    if unscored:
        print(f"not scored, for lack of objects or of a third frame: {', '.join(unscored)}")
    if not scored:
        raise InputError(f"--data_path {args.data_path}: no video has both objects and three frames, nothing can be scored")
    objects = {name: row for s in scored for name, row in s.objects().items()}
    frames = {s.video: {"J": s.j.T.tolist(), "F": s.f.T.tolist()} for s in scored}
    record = {
        "kind": "video_segmentation", "subset": args.subset, **pretrained.record(),
        "global": metrics.global_scores(objects), "objects": objects, "unscored": unscored, "frames": frames,
        "args": utils.plain_args(args),
    }  # fmt: skip
    path = Path(args.output_dir) / f"results-{args.subset}.json"
    utils.save_json(record, path)
    metrics.print_scores(objects)
    print(f"{len(objects)} objects of {len(scored)} videos; wrote {path}")
    for table in metrics.write_csv(args.output_dir, args.subset, objects):
        print(f"wrote {table}")


def write_contact_sheet(videos: list[Video], scores: list[metrics.Scores], args: argparse.Namespace) -> None:
    known = {s.video: f"   J {s.j.mean():.3f}  F {s.f.mean():.3f}" for s in scores if s.j.size}
    rows = [(video, Path(args.output_dir) / video.name, video.name + known.get(video.name, "")) for video in videos]
    path = Path(args.output_dir) / f"contact_sheet-{args.subset}.png"
    davis.contact_sheet(rows).save(path)
    print(f"wrote {path}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    names = davis.list_videos(args.data_path, args.subset)
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("propagation compares patches")
    args.std = tuple(args.std or (ORIGINAL_STD if pretrained.std == IMAGENET_STD else pretrained.std))
    davis.check_short_side(args.short_side, pretrained.backbone.patch_embed.patch_size)
    pretrained.backbone.positions_by = args.positions
    videos, faults = open_videos(names, args)
    if distributed.is_main_process():
        for stale in outputs(args):
            stale.unlink(missing_ok=True)
        for name, fault in faults.items():
            tell_fault(name, fault)
    print(f"{pretrained.net} {pretrained.arch}, {len(videos)} videos, {sum(len(v.frames) for v in videos)} frames, {device}")

    longest_first = sorted(videos, key=lambda video: -len(video.frames))
    own = longest_first[distributed.get_rank() :: distributed.get_world_size()] if distributed.is_distributed() else videos
    scores, found = gather(run_share(own, pretrained, device, args))
    faults |= found
    if distributed.is_main_process():
        done = [video for video in videos if video.name not in faults]
        scores.sort(key=lambda s: names.index(s.video))
        if done:
            write_contact_sheet(done, scores, args)
        if args.score and not faults:
            write_results(scores, pretrained, args)
    if faults:
        first = next(iter(faults))
        made = f"masks of the other {len(names) - len(faults)} are in {args.output_dir}, no tables are written"
        raise InputError(f"{len(faults)} of {len(names)} videos at fault ({made}); {first}: {faults[first]}")


def outputs(args: argparse.Namespace) -> list[Path]:
    """The files beside the videos' folders, which a new run replaces."""
    names = (f"global_results-{args.subset}.csv", f"per-sequence_results-{args.subset}.csv", f"results-{args.subset}.json")
    return [Path(args.output_dir) / name for name in (*names, f"contact_sheet-{args.subset}.png")]


if __name__ == "__main__":
    distributed.run_entry_point(main)
