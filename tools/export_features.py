"""Export the features of images from any timm model, in shards: a row holds path, label, index and features.

python tools/export_features.py --model runs/quickstart --images data/mnist5k/train  # writes runs/features_train
python tools/export_features.py --model vim_small --images data/imagenet/val --pools [token,avg] --dtype fp16
python tools/export_features.py --model vim_small --images shards/ --blocks [-4,-3,-2,-1] --precision bf16
accelerate launch tools/export_features.py --model vim_small --images data/imagenet/train

Read them back: vim.features.load("runs/features_train").
"""

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.data.names import plain_name
from vim.features import FeaturesConfig, export_features


def main() -> None:
    config, _ = ConfigParser(FeaturesConfig, __doc__).parse_config()
    with plain_errors():
        done = export_features(config)
    print(
        f"{done['rows']} images in {done['shards']} shards in {plain_name(config.output)}; "
        f"{done['made_now']} shards made now in {done['seconds']:.0f} s, {done['images_per_second']:.0f} images/s"
    )


if __name__ == "__main__":
    main()
