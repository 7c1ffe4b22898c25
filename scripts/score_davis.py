"""J&F of masks made by anything, in the layout <masks>/<video>/<frame>.png, against the annotations of DAVIS 2017.

    python -m scripts.score_davis --data_path data/DAVIS --masks results/osvos
Prints the scores and writes nothing, unless --out names a folder for the two tables of the DAVIS tool.
"""

import argparse
from pathlib import Path

import distributed
import utils
from evaluation.video import davis, metrics


def main() -> None:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="folder of DAVIS, with JPEGImages, Annotations and ImageSets")
    parser.add_argument("--masks", required=True, type=Path)
    parser.add_argument("--subset", default="val", help="which list of ImageSets/2017")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    objects: dict[str, dict[str, float]] = {}
    for name in davis.list_videos(args.data_path, args.subset):
        objects |= davis.score_video(davis.open_video(args.data_path, name), args.masks / name).objects()
    if not objects:
        raise utils.InputError(f"--data_path {args.data_path}: no video has objects")
    metrics.print_scores(objects)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for table in metrics.write_csv(args.out, args.subset, objects):
            print(f"wrote {table}")


if __name__ == "__main__":
    distributed.run_entry_point(main)
