"""Configuration of an upload to the hub."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PushConfig:
    """The upload of a finished run to the Hugging Face hub."""

    run_dir: str
    """Folder of a finished run of tools/train.py."""
    repo: str
    """Repository on the hub, owner/name; made if it is not there."""
    license: str
    """Of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0 ... Images and first weights have a say."""
    datasets: list[str] = field(default_factory=list)
    """Names on the hub of the data sets that it was trained on, the one evaluated on first: ylecun/mnist ..."""
    weights: Literal["last", "ema"] = "last"
    """last: those after the last epoch. ema: their moving average."""
    private: bool = False
    """Nobody else sees the repository. One that is there and public is refused."""
    output: str | None = None
    """Only write the files, to this new folder; null: push them."""

    def __post_init__(self):
        if not self.license.strip():
            raise ValueError("license must not be empty; who publishes weights says how others may use them")
