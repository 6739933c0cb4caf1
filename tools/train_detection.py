"""Train a detector on data in COCO's format, on the feature maps of any timm model.

python tools/train_detection.py --config configs/detection_trees.yaml --model.name deit_tiny_patch16_224
python tools/train_detection.py --config runs/trees/config.yaml --resume
accelerate launch tools/train_detection.py --config configs/detection_coco_vim_tiny.yaml
"""

import vim  # noqa: F401  (registers the vim_* models)
from vim.detection import Detection, DetectionTrainConfig
from vim.training import ConfigParser, plain_errors, train


def main() -> None:
    parser = ConfigParser(DetectionTrainConfig, __doc__)
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    config, arguments = parser.parse_config()
    with plain_errors():
        train(config, resume=arguments.resume, task=Detection)


if __name__ == "__main__":
    main()
