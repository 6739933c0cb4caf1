"""Image folders, augmentation and loaders. timm reads and transforms; this package fixes order and randomness."""

from .config import AugmentConfig, DataConfig, EvalDataConfig
from .errors import DataError
from .folder import ImageFolder, check_same_classes
from .loaders import EvalImages, TrainImages, eval_loader, train_loader
from .mnist import write_mnist5k
from .randomness import derive_seed
from .sampler import KeyedSampler, SampleKey
from .sources import ImageEntry, ImageSource
from .transforms import Transform, eval_transform, train_transform

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DataError",
    "EvalDataConfig",
    "EvalImages",
    "ImageEntry",
    "ImageFolder",
    "ImageSource",
    "KeyedSampler",
    "SampleKey",
    "TrainImages",
    "Transform",
    "check_same_classes",
    "derive_seed",
    "eval_loader",
    "eval_transform",
    "train_loader",
    "train_transform",
    "write_mnist5k",
]
