"""Text as input and output of a language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from .lm_checkpoint import from_hub
from .mamba_lm import MambaLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
AUTHORS_TOKENIZER = "EleutherAI/gpt-neox-20b"


@dataclass
class GenerateConfig:
    """Text from a language model."""

    prompts: list[str]
    """Prompts, continued as one batch."""
    model: str = "state-spaces/mamba-130m"
    """Folder with config.json and weights, or a Hugging Face hub repository."""
    tokenizer: str | None = None
    """tokenizer.json, or a folder or hub repository with one; null: the model's own, else EleutherAI/gpt-neox-20b."""
    max_new_tokens: int = 100
    """Maximum number of new tokens per prompt."""
    temperature: float = 0.0
    """Sampling temperature: logits are divided by it; 0 decodes greedily."""
    top_k: int | None = None
    """Sample from the k most probable tokens; null: from all."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose total probability is at least this, 0..1; null: from all."""
    seed: int = 0
    """Random seed of the sampling."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations; the states of the scan stay in fp32."""
    device: str | None = None
    """cpu, cuda ...; null: the GPU if there is one."""

    def __post_init__(self):
        if not self.prompts or not all(self.prompts):
            raise ValueError(f"prompts must be one text or more, none of them empty, got {self.prompts}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for all tokens, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or null for all tokens, got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {self.seed}")


def load_tokenizer(source: str | Path) -> "Tokenizer":
    """Load a tokenizer from a file tokenizer.json, a folder with one, or a repository on the Hugging Face hub.

    Raises: ModuleNotFoundError with the command that installs tokenizers. FileNotFoundError. ValueError for a file that
        is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'vim-mamba[lm]'") from error
    path, name = Path(source).expanduser(), "tokenizer.json"
    if not path.is_file():
        folder = path if path.is_dir() else from_hub(str(source), [name], f"a file {name}, or a folder with one")
        path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {source}; give the path of a {name}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def stream_text(
    model: MambaLM,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[str]]:
    """Yield the text that each new token adds to each prompt.

    It is "" while a character is incomplete, and after the end of a sequence.

    Args: see `MambaLM.stream`. A sequence ends with the tokenizer's end-of-text token, if it has one.

    Raises: ValueError as `MambaLM.stream`, and for a prompt or a token that the tokenizer does not know.
    """
    from tokenizers.decoders import DecodeStream

    eos = tokenizer.token_to_id(END_OF_TEXT)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    decoders, ended = [DecodeStream() for _ in prompts], [False] * len(prompts)
    for tokens in model.stream(
        ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos, generator=generator
    ):
        pieces = []
        for i, token in enumerate(tokens.tolist()):
            ended[i] |= token == eos
            if not ended[i] and tokenizer.id_to_token(token) is None:
                raise ValueError(f"the tokenizer has no token {token}, which the model generated; use the model's own")
            pieces.append("" if ended[i] else decoders[i].step(tokenizer, token) or "")
        yield pieces


def encode(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """Token ids of a prompt.

    Raises: ValueError for text that the tokenizer does not know, or that gives no tokens.
    """
    try:
        ids = tokenizer.encode(prompt).ids
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"the tokenizer cannot encode the prompt {prompt!r}: {error}") from error
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give a longer one")
    return ids
