"""J&F of masks made by anything, in the layout <masks>/<video>/<frame>.png, against the annotations of DAVIS 2017.

    python scripts/score_davis.py --data_path data/DAVIS --masks results/osvos
Prints the scores and writes nothing, unless --out names a folder for the two tables of the DAVIS tool.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import davis
import jf
import utils


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
    jf.print_scores(objects)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for table in jf.write_csv(args.out, args.subset, objects):
            print(f"wrote {table}")


if __name__ == "__main__":
    utils.run_entry_point(main)
