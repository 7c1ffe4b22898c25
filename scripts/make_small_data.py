"""Write small image folders for trying things out: <out>/{train,val}/<class>/*.png, ready for --data_path.

python scripts/make_small_data.py digits --out data/digits
python scripts/make_small_data.py fashion-mnist --out data/fashion --source data/torchvision --download
python scripts/make_small_data.py fashion-mnist --out data/fashion --source /usr/share/datasets/fashion-mnist \
    --train 10000 --val 2000    # from Debian's package dataset-fashion-mnist, a balanced share of the images
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any directory

from datasets import write_digits, write_fashion_mnist  # noqa: E402
from utils import run_entry_point  # noqa: E402


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="data", required=True)
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 handwritten digits, 8x8; no download")
    digits.add_argument("--out", required=True, help="folder to write")
    fashion = commands.add_parser("fashion-mnist", help="Fashion-MNIST, 28x28, 60,000 and 10,000 images")
    fashion.add_argument("--out", required=True, help="folder to write")
    fashion.add_argument("--source", required=True, help="folder of the idx files, or torchvision's folder around them")
    fashion.add_argument("--download", action="store_true", help="fetch the files to --source first (network)")
    fashion.add_argument("--train", type=int, help="training images in all, balanced over classes; default all")
    fashion.add_argument("--val", type=int, help="test images in all, balanced over classes; default all")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.data == "digits":
        write_digits(args.out)
    else:
        write_fashion_mnist(args.out, args.source, args.download, args.train, args.val)


if __name__ == "__main__":
    run_entry_point(main)
