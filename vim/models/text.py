"""Text in and out of a language model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .lm_checkpoint import from_hub
from .mamba_lm import MambaLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
AUTHORS_TOKENIZER = "EleutherAI/gpt-neox-20b"


def load_tokenizer(source: str | Path) -> "Tokenizer":
    """From a file tokenizer.json, a folder that has one, or such a repository on the Hugging Face hub.

    Raises: ModuleNotFoundError that says what to install. FileNotFoundError. ValueError for a file that is no
        tokenizer.
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
        raise FileNotFoundError(f"there is no {name} in {source}; give a file {name}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(f"{path} is no tokenizer: {error}") from error


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
    """Yield what each new token adds to the text of each prompt: "" while a character is incomplete, and after its end.

    Args: as of `MambaLM.stream`. Sequences end with the tokenizer's end of text, if it has one.

    Raises: ValueError as there, and for a prompt or a token that the tokenizer has no words for.
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
                raise ValueError(f"the tokenizer has no token {token} that the model says; take that of the model")
            pieces.append("" if ended[i] else decoders[i].step(tokenizer, token) or "")
        yield pieces


def encode(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """Raises: ValueError for text that the tokenizer has no tokens for."""
    try:
        ids = tokenizer.encode(prompt).ids
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(f"the tokenizer does not know all of the prompt {prompt!r}: {error}") from error
    if not ids:
        raise ValueError(f"the tokenizer makes no tokens of the prompt {prompt!r}; give another")
    return ids
