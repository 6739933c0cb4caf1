"""Images, augmentation and loaders. timm has the transforms; this package fixes order and randomness."""

from .config import AugmentConfig, DataConfig, EvalDataConfig
from .errors import DataError
from .fetch_ahead import FetchAhead
from .loaders import EvalImages, TrainImages, eval_loader, train_loader
from .mnist import write_mnist5k
from .places import open_images, open_split
from .randomness import derive_seed
from .sampler import KeyedSampler, SampleKey
from .sources import ImageSource, check_same_classes, image_names, spread
from .transforms import Transform, eval_transform, train_transform

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DataError",
    "EvalDataConfig",
    "EvalImages",
    "FetchAhead",
    "ImageSource",
    "KeyedSampler",
    "SampleKey",
    "TrainImages",
    "Transform",
    "check_same_classes",
    "derive_seed",
    "eval_loader",
    "eval_transform",
    "image_names",
    "open_images",
    "open_split",
    "spread",
    "train_loader",
    "train_transform",
    "write_mnist5k",
]
