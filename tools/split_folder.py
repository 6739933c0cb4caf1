"""Divide one split of an image folder tree into new splits, with the same share of each class in each.

python tools/split_folder.py data/mnist5k --split train --parts fit=0.8 choose=0.2
"""

import argparse
import os

from vim.console import plain_errors
from vim.data.names import plain_name
from vim.data.splits import split_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=os.path.expanduser, help="folder of the data set")
    parser.add_argument("--split", default="train", help="split to divide; it stays as it is")
    parser.add_argument("--parts", nargs="+", type=_part, required=True, metavar="NAME=SHARE", help="the new splits")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the division")
    args = parser.parse_args()
    with plain_errors():
        counts = split_folder(args.root, args.split, dict(args.parts), args.seed)
    print(", ".join(f"{plain_name(args.root)}/{plain_name(name)}: {count} images" for name, count in counts.items()))


def _part(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"want NAME=SHARE, for example val=0.2, got {text!r}") from None


if __name__ == "__main__":
    main()
