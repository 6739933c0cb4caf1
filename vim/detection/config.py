"""The configurations of detection; every field is read, and explained in `--help`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vim.console.free_on_resume import FREE_ON_RESUME
from vim.data.config import BadImages, check_loading
from vim.timm_models.config import ModelConfig
from vim.timm_models.precision import Precision
from vim.training.config import RunConfig

SIZE_STEP = 64  # pixels between the cells of the pyramid's top level


Heads = Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "fcos"]


@dataclass
class DetectorConfig(ModelConfig):
    """The detector. name, pretrained, checkpoint and kwargs are those of its backbone, any timm model."""

    detector: Heads = "cascade_mask_rcnn"
    """Heads: torchvision's Faster R-CNN, Mask R-CNN or FCOS, or the three-stage cascade, with masks or without."""
    img_size: int = 1024
    """Edge of the square that images are scaled to fit in and padded to, in pixels; a multiple of 64."""
    channels: int = 256
    """Of each map of the pyramid and of the heads' convolutions; a box head's fully connected layer has four times."""
    regions: int = 512
    """Regions of an image that its box heads train on."""
    score_threshold: float = 0.05
    """Least score of a box that is reported."""
    nms_threshold: float = 0.5
    """Of two boxes of a class that overlap by more (intersection over union), the better one stays."""
    max_boxes: int = 100
    """Most boxes that are reported for an image; COCO's average precision counts 100."""

    def __post_init__(self):
        super().__post_init__()
        if self.img_size < SIZE_STEP or self.img_size % SIZE_STEP:
            raise ValueError(f"model.img_size must be a multiple of {SIZE_STEP} pixels, got {self.img_size}")
        if "img_size" in self.kwargs:
            raise ValueError("model.kwargs.img_size would be the backbone's alone; set model.img_size")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("channels", "regions", "max_boxes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.detector == "fcos" and self.channels % 32:  # torchvision's heads have 32 groups
            raise ValueError(f"model.channels must be a multiple of 32 for fcos, got {self.channels}")
        if self.detector == "fcos" and self.channels == 32 and self.img_size == SIZE_STEP:
            # torch refuses to normalise a single number, and of more images makes a constant of each.
            raise ValueError(
                "model.channels must be at least 64 for fcos at img_size 64, whose top map is one cell: a group of one "
                "channel would be a single number; got 32, take 64 or a larger img_size"
            )

    @property
    def masks(self) -> bool:
        return "mask" in self.detector


@dataclass
class DetectionEvalDataConfig:
    """Data in COCO's format."""

    root: str = field(default="data/coco", metadata=FREE_ON_RESUME)
    """Folder of the data set."""
    val_annotations: str = "annotations/instances_val2017.json"
    """Annotations to evaluate on, below root."""
    val_images: str = "val2017"
    """Their images, a folder below root."""
    batch_size: int = field(default=8, metadata=FREE_ON_RESUME)  # the total batch is checked with the checkpoint
    """Images per process and step."""
    num_workers: int = field(default=4, metadata=FREE_ON_RESUME)
    """Processes that load images, for each training process; 0: it loads itself. Results do not depend on it."""

    def __post_init__(self):
        check_loading(self.batch_size, self.num_workers)


@dataclass
class DetectionDataConfig(DetectionEvalDataConfig):
    """Data in COCO's format."""

    train_annotations: str = "annotations/instances_train2017.json"
    """Annotations to train on, below root."""
    train_images: str = "train2017"
    """Their images, a folder below root."""
    passes: int = 1
    """Times that an epoch passes over the training images, each time with other augmentation; small sets want many."""
    bad_images: BadImages = field(default="raise", metadata=FREE_ON_RESUME)
    """Training images that cannot be read: raise stops at the first; skip goes on without, counts and lists them."""

    def __post_init__(self):
        super().__post_init__()
        if self.passes < 1:
            raise ValueError(f"data.passes must be at least 1, got {self.passes}")


@dataclass
class JitterConfig:
    """Random changes of the training images, with their boxes and masks."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: range of the size, as a factor of the one that just fits; what then stands out is cut off."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip; for pictures from above."""
    color_jitter: float = 0.0
    """Random brightness, contrast and saturation by up to this factor."""
    erasing: float = 0.0
    """Probability of a rectangle in one random colour; boxes that it hides by more than half go."""

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"augment.scale must be (low, high) with 0 < low <= high, got {(low, high)}")
        for name in ("hflip", "vflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        if self.color_jitter < 0:
            raise ValueError(f"augment.color_jitter must be 0 or more, got {self.color_jitter}")


@dataclass
class DetectionTrainConfig(RunConfig):
    """The run."""

    TOOL: ClassVar[str] = "tools/train_detection.py"

    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    augment: JitterConfig = field(default_factory=JitterConfig)


@dataclass
class DetectionValidateConfig:
    """The evaluation."""

    model: str = "runs/detection"
    """Run folder of a detector."""
    checkpoint: str | None = None
    """File of weights, for example runs/<name>/checkpoints/best.pt; null for the folder's."""
    data: DetectionEvalDataConfig = field(default_factory=DetectionEvalDataConfig)
    precision: Precision = "fp32"
    """Of the forward pass."""
    output: str = "runs/detection_results"
    """Folder for results.json, predictions.json (COCO's result format) and detections.png."""
    sheet: int = 8
    """Images in detections.png, evenly spread; 0 for no picture."""

    def __post_init__(self):
        if self.sheet < 0:
            raise ValueError(f"sheet must be 0 or more, got {self.sheet}")
