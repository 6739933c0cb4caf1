"""Convert the boxes in a CSV file (image_path, xmin, ymin, xmax, ymax, label) to annotations in COCO format.

python tools/boxes_to_coco.py boxes.csv photographs/ annotations.json
"""

import argparse
import os

from vim.console import plain_errors
from vim.detection import boxes_to_coco


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boxes", type=os.path.expanduser, help="CSV file")
    parser.add_argument("images", type=os.path.expanduser, help="folder of the images; image_path is relative to it")
    parser.add_argument("output", type=os.path.expanduser, help="JSON file to write")
    arguments = parser.parse_args()
    with plain_errors():
        content = boxes_to_coco(arguments.boxes, arguments.images, arguments.output)
    counts = ", ".join(f"{len(content[name])} {name}" for name in ("images", "annotations", "categories"))
    print(f"{arguments.output}: {counts}")


if __name__ == "__main__":
    main()
