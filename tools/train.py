"""Train an image classifier, any of timm's.

python tools/train.py --config configs/quickstart.yaml --optim.lr 1e-3
python tools/train.py --config runs/quickstart/config.yaml --resume
accelerate launch tools/train.py --config configs/vim_small_in1k.yaml
"""

import vim  # noqa: F401  (registers the vim_* models)
from vim.training import ConfigParser, TrainConfig, plain_errors, train


def main() -> None:
    parser = ConfigParser(TrainConfig, __doc__)
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    config, arguments = parser.parse_config()
    with plain_errors():
        train(config, resume=arguments.resume)


if __name__ == "__main__":
    main()
