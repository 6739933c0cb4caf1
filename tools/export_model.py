"""Export a model to files that run without this package, and check them on real images.

python tools/export_model.py --model runs/quickstart --images data/mnist5k/val --output runs/export
python tools/export_model.py --model vim_tiny --formats [pt2,onnx,aoti,aoti_cuda] --images data/imagenet/val
python tools/export_model.py --model vim_small --kwargs.img_size 384 --kwargs.num_classes 0 --images photographs/

model.pt2 needs torch alone: torch.export.load("model.pt2").module()(images). export.json describes its input.
"""

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.export import ExportConfig, export_model


def main() -> None:
    config, _ = ConfigParser(ExportConfig, __doc__).parse_config()
    with plain_errors():
        export_model(config)


if __name__ == "__main__":
    main()
