"""A synthetic data set in COCO's format: coloured rectangles on noise."""

import json

import numpy as np
from PIL import Image

COLOURS = {"red": (230, 40, 40), "blue": (40, 60, 230)}


def write_boxes(root, split, images, seed=0, sizes=((64, 64), (48, 80), (90, 50)), boxes=(1, 3)):
    """Write root/<split>/*.png and root/<split>.json: images of several sizes, with polygons, every fourth empty.

    Categories have the ids 3 (red), 7 (blue) and 9 (green, without objects). Returns the content of the JSON file.
    """
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in ((3, "red"), (7, "blue"), (9, "green"))],
    }
    for number in range(images):
        width, height = sizes[number % len(sizes)]
        pixels = rng.integers(90, 140, (height, width, 3), dtype=np.uint8)
        image_id, name = 10 + number, f"{number:03}.png"
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for _ in range(0 if number % 4 == 3 else rng.integers(*boxes, endpoint=True)):
            w, h = rng.integers(16, 30, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            colour = rng.integers(2)
            pixels[y : y + h, x : x + w] = list(COLOURS.values())[colour]
            x, y, w, h = (int(v) for v in (x, y, w, h))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": (3, 7)[colour],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        Image.fromarray(pixels).save(root / split / name)
    (root / f"{split}.json").write_text(json.dumps(content))
    return content
