"""Configuration of an upload to the hub."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PushConfig:
    """The upload of a finished run to the Hugging Face hub."""

    run_dir: str
    """Folder of a finished run of tools/train.py."""
    repo: str
    """Repository on the hub: owner/name. Created if it does not exist."""
    license: str
    """License of the weights, as named on the hub: apache-2.0, cc-by-nc-4.0 ... Data and initial weights may restrict
    the choice."""
    datasets: list[str] = field(default_factory=list)
    """Training data sets by their names on the hub, the evaluated one first: ylecun/mnist ..."""
    weights: Literal["last", "ema"] = "last"
    """last: weights after the last epoch. ema: their exponential moving average."""
    private: bool = False
    """Make the repository private. An existing public repository is refused."""
    output: str | None = None
    """Only write the files to this new folder; null: push them to the hub."""

    def __post_init__(self):
        if not self.license.strip():
            raise ValueError("license must not be empty; it tells others how they may use the weights")
