"""Write ELPV (photographs of functional and defective solar cells) as an image folder tree.

pip install elpv-dataset
python tools/prepare_elpv.py data/elpv
python tools/split_folder.py data/elpv --split all --parts train=0.6 val=0.2 test=0.2
"""

import argparse
import os

from vim.console import plain_errors
from vim.data.elpv import EDGE, write_elpv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=os.path.expanduser, help="folder to write; must be new")
    parser.add_argument("--size", type=int, default=EDGE, help="edge of the images, in pixels")
    args = parser.parse_args()
    with plain_errors():
        write_elpv(args.root, args.size)
    print(f"{args.root} written")


if __name__ == "__main__":
    main()
