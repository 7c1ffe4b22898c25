"""Video object segmentation on DAVIS 2017 with frozen patch features, scored by J&F. No training.

    python eval_video_segmentation.py --pretrained_weights R/checkpoint.pth --data_path data/DAVIS --output_dir R/davis
Several processes share the videos: torchrun --nproc_per_node=2 eval_video_segmentation.py ...

The annotation of a video's first frame is propagated to the other frames by nearest neighbours among patch features.
Written to --output_dir:
    <video>/<frame>.png                  masks (palette PNGs); <video>/settings.json: what they depend on
    global_results-<subset>.csv          the two tables of the DAVIS tool
    per-sequence_results-<subset>.csv
    results-<subset>.json                all scores and settings
    contact_sheet-<subset>.png           frames of every video with their masks

The folder of a video appears when the video is finished. A rerun keeps the videos that were made with the same weights, flags
and files, makes the others, and computes all scores anew. A video that fails is named and left out; the others are made, but
tables are written only if no video fails.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from clever import arguments, distributed, utils
from clever.arguments import bool_flag
from clever.data.augmentations import IMAGENET_STD
from clever.entry import run_entry_point
from clever.evaluation.pretrained import (
    Pretrained,
    add_backbone_arguments,
    load_pretrained,
    result_record,
)
from clever.evaluation.video import davis, metrics
from clever.evaluation.video.contact_sheet import contact_sheet
from clever.evaluation.video.davis import Video
from clever.evaluation.video.masks import write_mask
from clever.evaluation.video.metrics import VideoScores
from clever.evaluation.video.segmentation import SETTINGS_FILE, Segmenter, is_finished
from clever.locking import locked
from clever.progress import Progress
from clever.utils import InputError, plural, whole_folder

DINO_STD = (0.228, 0.224, 0.225)  # DINO's evaluation has 0.228 for 0.229; its published numbers were measured with it
MAX_READING_THREADS = 4


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, parts=False)
    add = parser.add_argument
    add("--data_path", required=True, help="folder of DAVIS, which contains JPEGImages, Annotations and ImageSets")
    add("--subset", default="val", help="list of videos: a file of ImageSets/2017, without .txt")
    add("--output_dir", default=".", help="folder of masks, tables and contact sheet")
    add("--n_last_frames", type=int, default=7, help="number of previous frames in the context, besides the first frame")
    add("--size_mask_neighborhood", type=int, default=12, help="radius of the attention window in patches; 0: the whole "
        "frame. Increase it if objects that move fast are lost")  # fmt: skip
    add("--topk", type=int, default=5, help="number of nearest neighbours that determine the label of a patch")
    add("--short_side", type=int, default=davis.SHORT_SIDE, help="short side in pixels of the frames that the network sees; "
        "a multiple of the patch size. Lower it for a quick test")  # fmt: skip
    add("--bs", type=int, default=1, help="frames per forward pass of the network; the scores do not depend on it")
    add("--similarity_mb", type=float, default=256, help="largest memory of the similarities in MiB")
    add("--std", type=float, nargs=3, help="standard deviation of the channels; default: the checkpoint's, but 0.228 0.224 "
        "0.225 instead of ImageNet's, as in DINO's evaluation")  # fmt: skip
    add("--positions", default="factor", choices=["factor", "size"], help="interpolation of the position embedding: by "
        "scale factor, as in DINO, or to the size of the grid")  # fmt: skip
    add("--score", type=bool_flag, default=True, help="false: write masks only; only first frames need an annotation then")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    arguments.check_positive(args, "topk", "short_side", "bs", "similarity_mb")
    arguments.check_not_negative(args, "n_last_frames", "size_mask_neighborhood", "num_workers")
    if args.std is not None and not all(0 < value < math.inf for value in args.std):
        raise InputError(f"--std {args.std}: must be greater than 0, and finite")
    arguments.check_writable(args.output_dir)


# --- building ----------------------------------------------------------------------------------------------------------


def build_segmenter(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> Segmenter:
    """Raises InputError if the network has no patch tokens, or if --short_side is not a multiple of its patch size."""
    pretrained.check_patches("propagation compares patches")
    backbone = pretrained.backbone
    davis.check_short_side(args.short_side, backbone.patch_embed.patch_size)
    backbone.positions_by = args.positions
    return Segmenter(
        backbone, device, pretrained.mean, tuple(args.std or (DINO_STD if pretrained.std == IMAGENET_STD else pretrained.std)),
        short_side=args.short_side, n_last_frames=args.n_last_frames, radius=args.size_mask_neighborhood, topk=args.topk,
        memory_mb=args.similarity_mb, batch_size=args.bs, threads=min(args.num_workers, MAX_READING_THREADS),
    )  # fmt: skip


def mask_settings(args: argparse.Namespace, pretrained: Pretrained, std: tuple[float, ...]) -> dict[str, Any]:
    """What masks depend on, apart from the files of the video."""
    flags = ("n_last_frames", "size_mask_neighborhood", "topk", "short_side", "positions")
    return {
        "backbone": pretrained.fingerprint, **{flag: getattr(args, flag) for flag in flags},
        "mean": list(pretrained.mean), "std": list(std),
    }  # fmt: skip


# --- evaluation --------------------------------------------------------------------------------------------------------


def open_videos(data_path: str, names: list[str], all_annotations: bool) -> tuple[list[Video], dict[str, str]]:
    """The videos with valid files, and {name: error} of the others."""
    videos, failures = [], {}
    for name in names:
        try:
            videos.append(davis.open_video(data_path, name, all_annotations))
        except InputError as error:
            failures[name] = str(error)
    return videos, failures


def make_masks(segmenter: Segmenter, video: Video, folder: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Write the masks of all frames, unless the folder has them; that of the first frame is its annotation."""
    settings = settings | {"files": video.fingerprint()}
    if is_finished(folder, video, settings):
        print(f"{video.name}: kept")
        return
    with whole_folder(folder) as scratch:
        shutil.copyfile(video.annotations[0], scratch / video.mask_names[0])
        progress.advance()
        for name, labels in zip(video.mask_names[1:], segmenter.segment(video), strict=True):
            write_mask(labels, scratch / name)
            progress.advance()
        utils.save_json(settings, scratch / SETTINGS_FILE)


def evaluate(
    segmenter: Segmenter, videos: list[Video], output: Path, settings: dict[str, Any], score: bool
) -> tuple[list[VideoScores], dict[str, str]]:
    """Masks and scores of these videos; returns the scores, and {name: error} of the videos that failed."""
    scores, failures = [], {}
    progress = Progress("", sum(len(video.frames) for video in videos), unit="frames")
    for i, video in enumerate(videos, 1):
        progress.header = f"video {i}/{len(videos)} {video.name}"
        before = progress.done
        try:
            make_masks(segmenter, video, output / video.name, settings, progress)
            if score:
                scores.append(davis.score_video(video, output / video.name))
        except InputError as error:
            failures[video.name] = str(error)
            print_failure(video.name, str(error))
        progress.total -= len(video.frames) - (progress.done - before)  # frames that are kept, or lost by an error
        progress.print_line()
    return scores, failures


def own_share(videos: list[Video]) -> list[Video]:
    """This process's videos. Several processes take turns from the longest to the shortest."""
    if not distributed.is_distributed():
        return videos
    longest_first = sorted(videos, key=lambda video: -len(video.frames))
    return longest_first[distributed.get_rank() :: distributed.get_world_size()]


def print_failure(name: str, error: str) -> None:
    print(f"left out: {name}: {error}", file=sys.stderr, flush=True)


# --- results -----------------------------------------------------------------------------------------------------------


def result_paths(output: Path, subset: str) -> tuple[Path, Path]:
    """JSON file and contact sheet."""
    return output / f"results-{subset}.json", output / f"contact_sheet-{subset}.png"


def remove_results(output: Path, subset: str) -> None:
    """Remove the tables and the contact sheet of an earlier run; masks stay."""
    for path in (*result_paths(output, subset), *(output / name for name in metrics.table_names(subset))):
        path.unlink(missing_ok=True)


def write_results(scores: list[VideoScores], pretrained: Pretrained, output: Path, args: argparse.Namespace) -> None:
    """Print the scores and write them as JSON and CSV. Videos without objects or without a frame to score do not count."""
    scored = [video for video in scores if video.j.size]
    unscored = [video.video for video in scores if not video.j.size]
    if unscored:
        print(f"not scored, because they have no objects or less than three frames: {', '.join(unscored)}")
    if not scored:
        raise InputError(f"--data_path {args.data_path}: nothing to score, no video has objects and three frames")
    objects = {name: row for video in scored for name, row in video.objects().items()}
    frames = {video.video: {"J": video.j.T.tolist(), "F": video.f.T.tolist()} for video in scored}
    values = {"global": metrics.global_scores(objects), "objects": objects, "unscored": unscored, "frames": frames}
    record = result_record("video_segmentation", {"subset": args.subset, **pretrained.record()}, args, **values)
    path, _ = result_paths(output, args.subset)
    utils.save_json(record, path)
    metrics.print_scores(objects)
    print(f"{len(objects)} objects of {len(scored)} videos; wrote {path}")
    for table in metrics.save_tables(output, args.subset, objects):
        print(f"wrote {table}")


def write_contact_sheet(videos: list[Video], scores: list[VideoScores], output: Path, subset: str) -> None:
    captions = {s.video: f"   J {s.j.mean():.3f}  F {s.f.mean():.3f}" for s in scores if s.j.size}
    rows = [(video, output / video.name, video.name + captions.get(video.name, "")) for video in videos]
    _, path = result_paths(output, subset)
    utils.save_png(contact_sheet(rows), path)
    print(f"wrote {path}")


def segment_videos(
    args: argparse.Namespace, pretrained: Pretrained, segmenter: Segmenter, names: list[str], output: Path
) -> None:
    """Masks, tables and contact sheet. Raises InputError if a video has failed, after the others."""
    videos, failures = open_videos(args.data_path, names, all_annotations=args.score)
    if distributed.is_main_process():
        remove_results(output, args.subset)
        for name, error in failures.items():
            print_failure(name, error)
    frames = sum(len(video.frames) for video in videos)
    print(f"{pretrained.net} {pretrained.arch}, {plural(len(videos), 'video')}, {plural(frames, 'frame')}, {segmenter.device}")

    settings = mask_settings(args, pretrained, segmenter.std)
    shares = distributed.all_gather_objects(evaluate(segmenter, own_share(videos), output, settings, args.score))
    scores = sorted((s for scores, _ in shares for s in scores), key=lambda s: names.index(s.video))
    failures |= {name: error for _, failed in shares for name, error in failed.items()}

    if distributed.is_main_process():
        finished = [video for video in videos if video.name not in failures]
        if args.score and not failures:
            write_results(scores, pretrained, output, argparse.Namespace(**vars(args) | {"std": segmenter.std}))
        if finished:
            write_contact_sheet(finished, scores, output, args.subset)
    if failures:
        name, error = next(iter(failures.items()))
        raise InputError(
            f"{len(failures)} of {len(names)} videos failed (masks of the other {len(names) - len(failures)} are in {output}, "
            f"no tables are written); {name}: {error}"
        )


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    names, output = davis.list_videos(args.data_path, args.subset), Path(args.output_dir)
    pretrained = load_pretrained(args, device)
    segmenter = build_segmenter(args, pretrained, device)
    with locked(output / "video_segmentation"):
        segment_videos(args, pretrained, segmenter, names, output)


if __name__ == "__main__":
    run_entry_point(main)
