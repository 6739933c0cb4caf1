"""Write MNIST-5k, the quick start's data set, as an image folder tree: 4,000 digits to train on, 1,000 held out.

python tools/prepare_mnist.py data/mnist5k
"""

import argparse
import os
import sys

from vim.data import DataError, write_mnist5k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=os.path.expanduser, help="folder to write")
    root = parser.parse_args().root
    try:
        written = write_mnist5k(root)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"MNIST-5k: {'written to' if written else 'already in'} {root}")


if __name__ == "__main__":
    main()
