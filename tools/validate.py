"""Evaluate an image classifier, any timm model, on one split of a data set, at one or several image sizes.

python tools/validate.py --model runs/quickstart --data.root data/mnist5k
python tools/validate.py --model vim_tiny --data.root data/imagenet
python tools/validate.py --model vim_tiny --checkpoint vim_t_midclstok_76p1acc.pth --data.root data/imagenet
python tools/validate.py --model vim_tiny --data.root data/imagenet --img_sizes "[224, 288, 384]" --crop_pcts "[0.9, 1]"
python tools/validate.py --model vim_tiny --data.root data --data.val_split imagenet-a --labels imagenet-a
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.training import ValidateConfig, validate


def main() -> None:
    config, _ = ConfigParser(ValidateConfig, __doc__).parse_config()
    with plain_errors():
        results = validate(config)
    table = Table("model", "pixels", "crop", "images", "top-1 %", "top-5 %", "loss", title=results["split"])
    for row in results.get("rows", [results]):
        height, width = row["preprocessing"]["input_size"][1:]
        crop = f"{row['preprocessing']['crop_pct']:g}"
        numbers = (f"{row[key]:.{digits}f}" for key, digits in (("images", 0), ("top1", 2), ("top5", 2), ("loss", 4)))
        table.add_row(config.model, f"{height} x {width}", crop, *numbers)
    plain_console().print(table)
    print(f"written to {config.output}")


if __name__ == "__main__":
    main()
