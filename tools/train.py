"""Train an image classifier: any timm model.

python tools/train.py --config configs/quickstart.yaml --optim.lr 1e-3
python tools/train.py --config runs/quickstart/config.yaml --resume
python tools/train.py --config configs/vim_small_in1k.yaml --steps 20
accelerate launch tools/train.py --config configs/vim_small_in1k.yaml
"""

import vim  # noqa: F401  (registers the models)
from vim.training import Classification, TrainConfig, training_tool

if __name__ == "__main__":
    training_tool(TrainConfig, Classification, __doc__)
