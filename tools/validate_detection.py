"""Evaluate a trained detector on data in COCO format.

python tools/validate_detection.py --model runs/trees --data.root data/trees \\
    --data.val_annotations val.json --data.val_images val
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.detection import METRICS, DetectionValidateConfig, validate


def main() -> None:
    config, _ = ConfigParser(DetectionValidateConfig, __doc__).parse_config()
    with plain_errors():
        results = validate(config)
    kinds = {"boxes": ""} | ({"masks": "mask_"} if "mask_AP" in results else {})
    table = Table("", *kinds, title=f"{results['annotations']}, {results['images']} images")
    for name in METRICS:  # a row each: twelve columns would not fit a terminal
        table.add_row(name, *(f"{results[prefix + name]:.3f}" for prefix in kinds.values()))
    plain_console().print(table)
    print(f"written to {config.output}")


if __name__ == "__main__":
    main()
