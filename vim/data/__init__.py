"""Images, augmentation and loaders. timm transforms; this package fixes order and randomness."""

from .config import AugmentConfig, DataConfig, EvalDataConfig
from .errors import DataError
from .fetch_ahead import FetchAhead
from .folder import ImageFolder
from .labelled_images import LabelledImages, check_same_classes
from .loaders import EvalImages, TrainImages, eval_loader, train_loader
from .mnist import write_mnist5k
from .open_images import open_images
from .randomness import derive_seed
from .sampler import KeyedSampler, SampleKey
from .sources import ImageSource
from .tar_shards import ImageEntry
from .transforms import Transform, eval_transform, train_transform

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DataError",
    "EvalDataConfig",
    "EvalImages",
    "FetchAhead",
    "ImageEntry",
    "ImageFolder",
    "ImageSource",
    "KeyedSampler",
    "LabelledImages",
    "SampleKey",
    "TrainImages",
    "Transform",
    "check_same_classes",
    "derive_seed",
    "eval_loader",
    "eval_transform",
    "open_images",
    "train_loader",
    "train_transform",
    "write_mnist5k",
]
