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
and files, makes the others, and computes all scores anew. A video that fails is named at the end; the others are made, but
tables are written only if no video fails.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from clever import arguments, distributed, utils
from clever.arguments import bool_flag
from clever.entry import run_entry_point
from clever.evaluation.images import check_failures, montage, save_png
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained, result_record
from clever.evaluation.video import davis, metrics
from clever.evaluation.video.davis import Video
from clever.evaluation.video.masks import write_mask
from clever.evaluation.video.metrics import VideoScores
from clever.evaluation.video.segmentation import SETTINGS_FILE, Segmenter, is_finished
from clever.locking import locked
from clever.progress import progress
from clever.utils import IMAGENET_STD, InputError, whole_folder

DINO_STD = (0.228, 0.224, 0.225)  # DINO's evaluation has 0.228 for 0.229; its published numbers were measured with it


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
    add("--short_side", type=int, default=davis.SHORT_SIDE, help="short side in pixels of the frames that the network sees. "
        "Lower it for a quick test")  # fmt: skip
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
    arguments.check_not_negative(args, "n_last_frames", "size_mask_neighborhood")
    arguments.check_writable(args.output_dir)


def build_segmenter(args: argparse.Namespace, device: torch.device) -> tuple[Pretrained, Segmenter]:
    """The network, and what segments videos with it. Raises InputError if the network has no patch tokens."""
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("propagation compares patches")
    pretrained.backbone.positions_by = args.positions
    args.std = args.std or (DINO_STD if pretrained.std == IMAGENET_STD else pretrained.std)
    return pretrained, Segmenter(
        pretrained.backbone, device, pretrained.mean, tuple(args.std), short_side=args.short_side,
        n_last_frames=args.n_last_frames, radius=args.size_mask_neighborhood, topk=args.topk, memory_mb=args.similarity_mb,
        batch_size=args.bs,
    )  # fmt: skip


def mask_settings(args: argparse.Namespace, pretrained: Pretrained) -> dict[str, Any]:
    """What masks depend on, apart from the files of the video."""
    flags = ("n_last_frames", "size_mask_neighborhood", "topk", "short_side", "positions")
    settings = {"backbone": pretrained.fingerprint, "mean": list(pretrained.mean), "std": list(args.std)}
    return settings | {flag: getattr(args, flag) for flag in flags}


def open_videos(data_path: str, names: list[str], all_annotations: bool) -> tuple[list[Video], dict[str, str]]:
    """The videos with valid files, and {name: error} of the others."""
    videos, failures = [], {}
    for name in names:
        try:
            videos.append(davis.open_video(data_path, name, all_annotations))
        except InputError as error:
            failures[name] = str(error)
    return videos, failures


def make_masks(segmenter: Segmenter, video: Video, folder: Path, settings: dict[str, Any], bar: tqdm) -> None:
    """Write the masks of all frames, unless the folder has them; that of the first frame is its annotation."""
    settings = settings | {"files": video.fingerprint()}
    if is_finished(folder, video, settings):
        print(f"{video.name}: kept")
        bar.update(len(video.frames))
        return
    with whole_folder(folder) as scratch:
        shutil.copyfile(video.annotations[0], scratch / video.mask_names[0])
        bar.update()
        for name, labels in zip(video.mask_names[1:], segmenter.segment(video), strict=True):
            write_mask(labels, scratch / name)
            bar.update()
        utils.save_json(settings, scratch / SETTINGS_FILE)


def evaluate(
    segmenter: Segmenter, videos: list[Video], output: Path, settings: dict[str, Any], score: bool
) -> tuple[list[VideoScores], dict[str, str]]:
    """Masks and scores of this process's videos; returns those of all processes, and {name: error} of the videos that fail."""
    scores, failures = [], {}
    own = videos[distributed.get_rank() :: distributed.get_world_size()]
    for i, video in enumerate(own, 1):
        try:
            with progress(f"video {i}/{len(own)} {video.name}", len(video.frames), unit="frames") as bar:
                make_masks(segmenter, video, output / video.name, settings, bar)
            if score:
                scores.append(davis.score_video(video, output / video.name))
        except InputError as error:
            failures[video.name] = str(error)
    parts = distributed.all_gather_objects((scores, failures))
    order = [video.name for video in videos]
    scores = sorted((each for part, _ in parts for each in part), key=lambda each: order.index(each.video))
    return scores, {name: error for _, part in parts for name, error in part.items()}


def result_paths(output: Path, subset: str) -> list[Path]:
    """JSON file, contact sheet, and the tables of the DAVIS tool."""
    names = f"results-{subset}.json", f"contact_sheet-{subset}.png", *metrics.table_names(subset)
    return [output / name for name in names]


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
    utils.save_json(record, result_paths(output, args.subset)[0])
    metrics.save_tables(output, args.subset, objects)
    metrics.print_scores(objects)
    print(f"wrote the scores of {len(objects)} objects of {len(scored)} videos to {output}")


def contact_sheet_row(video: Video, folder: Path, columns: int = 6) -> list[Image.Image]:
    """Frames from the first to the last, half covered by their masks in the colours of the palette."""
    chosen = [round(i * (len(video.frames) - 1) / (columns - 1)) for i in range(columns)]
    frames = [Image.open(video.frames[i]).convert("RGB") for i in chosen]
    masks = [Image.open(folder / video.mask_names[i]).convert("RGB") for i in chosen]
    return [Image.blend(frame, mask.resize(frame.size), 0.5) for frame, mask in zip(frames, masks, strict=True)]


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    names, output = davis.list_videos(args.data_path, args.subset), Path(args.output_dir)
    videos, unreadable = open_videos(args.data_path, names, all_annotations=args.score)
    pretrained, segmenter = build_segmenter(args, device)
    with locked(output / "video_segmentation"):
        if distributed.is_main_process():  # the scores of an earlier run
            for path in result_paths(output, args.subset):
                path.unlink(missing_ok=True)
        frames = sum(len(video.frames) for video in videos)
        print(f"{pretrained.net} {pretrained.arch}, {len(videos)} videos, {frames} frames, {device}")
        scores, failures = evaluate(segmenter, videos, output, mask_settings(args, pretrained), args.score)
        failures = unreadable | failures
        finished = [video for video in videos if video.name not in failures]
        if distributed.is_main_process() and args.score and not failures:
            write_results(scores, pretrained, output, args)
        if distributed.is_main_process() and finished:
            rows = [contact_sheet_row(video, output / video.name) for video in finished]
            save_png(montage(rows), result_paths(output, args.subset)[1])
        check_failures(failures, len(names))


if __name__ == "__main__":
    run_entry_point(main)
