"""J&F of masks from any source, in the layout <masks>/<video>/<frame>.png, against the annotations of DAVIS 2017.

    python -m scripts.score_davis --data_path data/DAVIS --masks results/osvos
Prints the scores. With --out, also writes the two tables of the DAVIS tool to that folder.
"""

from pathlib import Path

from clever import arguments, utils
from clever.entry import run_entry_point
from clever.evaluation.video import davis, metrics


def main() -> None:
    parser = arguments.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="folder of DAVIS, with JPEGImages, Annotations and ImageSets")
    parser.add_argument("--masks", required=True, type=Path, help="folder of the masks to score")
    parser.add_argument("--subset", default="val", help="list of videos: a file of ImageSets/2017, without .txt")
    parser.add_argument("--out", type=Path, help="folder of the tables; without it nothing is written")
    args = parser.parse_args()
    objects: dict[str, dict[str, float]] = {}
    for name in davis.list_videos(args.data_path, args.subset):
        video = davis.open_video(args.data_path, name)
        if len(video.frames) > 2:  # the first and the last frame are not scored
            objects |= davis.score_video(video, args.masks / name).objects()
        else:
            print(f"left out: {name} has {len(video.frames)} frames; the first and the last are not scored")
    if not objects:
        raise utils.InputError(f"--data_path {args.data_path}: no video has objects in frames that are scored")
    metrics.print_scores(objects)
    if args.out:
        for table in metrics.save_tables(args.out, args.subset, objects):
            print(f"wrote {table}")


if __name__ == "__main__":
    run_entry_point(main)
