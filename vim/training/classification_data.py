"""The data of a classification run: splits, classes and loaders. They need no model."""

from typing import Any

from torch.utils.data import DataLoader

from vim.data import (
    AugmentConfig,
    DataConfig,
    EvalImages,
    FetchAhead,
    KeyedSampler,
    TrainImages,
    check_same_classes,
    eval_loader,
    eval_transform,
    open_split,
    train_loader,
    train_transform,
)

from .data_record import names_within, record_data


class ClassificationData:
    """The training and the validation split.

    classes: names in label order, the same in both.

    Raises: DataError for splits that cannot be used, or have different classes.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        # One window is read while the next is fetched.
        self.train = open_split(config.root, config.train_split, 2 * config.window, config.cache_gib)
        self.val = open_split(config.root, config.val_split, cache_gib=config.cache_gib)
        check_same_classes(self.train, self.val)
        self.classes = self.train.classes

    def train_batches(
        self, augment: AugmentConfig, data_config: dict[str, Any], seed: int, images_per_update: int
    ) -> DataLoader:
        """Loader of augmented training images, in the order of the seed.

        Args:
            data_config: as `resolve_input` returns it.
            images_per_update: over all processes and accumulated steps.

        Raises: DataError if the split has fewer images than an update.
        """
        config, train, channels = self.config, self.train, data_config["input_size"][0]
        lengths, ahead = (train.shards.lengths, FetchAhead(train.shards.fetch)) if train.shards else (None, None)
        sampler = KeyedSampler(len(train), seed, augment.repeats, images_per_update, lengths, config.window, ahead)
        smaller = {
            size: train_transform(augment, data_config | {"input_size": (channels, size, size)})
            for size, _ in config.progressive
        }
        early = [smaller[size] for size in config.early_sizes]
        transform = train_transform(augment, data_config)
        images = TrainImages(train, transform, seed, channels, config.bad_images, early)
        return train_loader(images, sampler, config.batch_size, config.num_workers)

    def val_batches(self, data_config: dict[str, Any]) -> DataLoader:
        """Loader of the validation images, in their order."""
        config = self.config
        images = EvalImages(self.val, eval_transform(data_config), data_config["input_size"][0], config.bad_images)
        return eval_loader(images, config.batch_size, config.num_workers)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        splits = (self.config.train_split, self.train), (self.config.val_split, self.val)
        return record_data(self.classes, {split: names_within(images.path, images) for split, images in splits})
