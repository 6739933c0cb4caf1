"""Train a detector on data in COCO format, with any timm model as backbone.

python tools/train_detection.py --config configs/detection_trees.yaml --model.name deit_tiny_patch16_224
python tools/train_detection.py --config runs/trees/config.yaml --resume
accelerate launch tools/train_detection.py --config configs/detection_coco_vim_tiny.yaml
"""

import vim  # noqa: F401  (registers the models)
from vim.detection import Detection, DetectionTrainConfig
from vim.training import training_tool

if __name__ == "__main__":
    training_tool(DetectionTrainConfig, Detection, __doc__)
