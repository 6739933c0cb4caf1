"""Text in and out of a language model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .mamba_lm import MambaLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(source: str) -> "Tokenizer":
    """From a file tokenizer.json, or a repository on the Hugging Face hub that has one.

    Raises: ModuleNotFoundError that says what to install. ValueError for a file that is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'vim-mamba[lm]'") from error
    path = Path(source)
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, "tokenizer.json"))
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

    Raises: ValueError as there.
    """
    from tokenizers.decoders import DecodeStream

    eos = tokenizer.token_to_id(END_OF_TEXT)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    decoders, ended = [DecodeStream() for _ in prompts], [False] * len(prompts)
    for tokens in model.stream(
        ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos, generator=generator
    ):
        pieces = []
        for i, token in enumerate(tokens.tolist()):
            ended[i] |= token == eos
            pieces.append("" if ended[i] else decoders[i].step(tokenizer, token) or "")
        yield pieces
