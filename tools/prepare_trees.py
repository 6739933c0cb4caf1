"""Write aerial photographs with tree boxes, from the deepforest package, as a data set in COCO format.

pip install --no-deps deepforest
python tools/prepare_trees.py data/trees
"""

import argparse
import os

from vim.console import plain_errors
from vim.detection import CocoData, write_trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=os.path.expanduser, help="folder to write")
    root = parser.parse_args().root
    with plain_errors():
        written = write_trees(root)
        for split in ("train", "val"):
            print(f"{split}: {CocoData(f'{root}/{split}.json', f'{root}/{split}').describe()}")
    print(f"{root} {'written' if written else 'is there already'}")


if __name__ == "__main__":
    main()
