"""Write synthetic photographs with as many pixels as ImageNet's, to measure loading.

python tools/prepare_jpegs.py data/jpegs --classes 1000 --images 4096
"""

import argparse
import os

from vim.console import plain_errors
from vim.data.synthetic import write_jpegs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=os.path.expanduser, help="folder to write; must be new")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes")
    parser.add_argument("--images", type=int, default=4096, help="images in train; val has as many")
    args = parser.parse_args()
    with plain_errors():
        write_jpegs(args.root, args.classes, args.images)
    print(f"{args.root} written")


if __name__ == "__main__":
    main()
