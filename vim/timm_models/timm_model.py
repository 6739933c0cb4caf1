"""The interface of timm's models, for annotations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class LoadedWeights:
    """The weights that a model was created with: `loaded` of its `total` tensors come from `source`.

    changes: what was adapted, for example "new: head 10 -> 2". new_head: the classifier has random weights.
    """

    source: str
    loaded: int = 0
    total: int = 0
    changes: list[str] = field(default_factory=list)
    new_head: bool = False

    def __str__(self) -> str:
        counts = [f"{self.loaded} of {self.total} tensors"] if self.total else []
        return f"{self.source} ({'; '.join(counts + self.changes)})" if counts or self.changes else self.source


class TimmModel(nn.Module):
    """Attributes of timm models that the tools use. timm has no such class: no model is an instance of it."""

    pretrained_cfg: dict[str, Any]
    num_classes: int
    feature_info: Any  # a list with an entry a block; FeatureInfo with features_only
    forward_features: Callable[[Tensor], Tensor]
    loaded_weights: LoadedWeights | None  # set by create_model; None: random weights

    # Only some models have these: check with hasattr, or catch AttributeError.
    forward_intermediates: Callable[..., Any]
    set_input_size: Callable[..., None]
    set_distilled_training: Callable[[bool], None]
