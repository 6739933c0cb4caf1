"""Continue texts with a Mamba language model, token by token.

python tools/generate.py --prompts '["Mamba is a"]' --temperature 0.7 --top_p 0.9
"""

import sys
import time

import torch

from vim.console import ConfigParser, plain_errors
from vim.console.errors import ConfigError
from vim.models.lm_checkpoint import checkpoint_folder
from vim.models.mamba_lm import MambaLM
from vim.models.text import AUTHORS_TOKENIZER, GenerateConfig, load_tokenizer, stream_text
from vim.timm_models.precision import DTYPES


def main() -> None:
    config, _ = ConfigParser(GenerateConfig, __doc__).parse_config()
    with plain_errors():
        try:
            generate(config, start_generator(config))
        except (ValueError, OSError, ModuleNotFoundError) as error:  # bad files, prompts or tokens
            raise ConfigError(str(error)) from error


def start_generator(config: GenerateConfig) -> torch.Generator:
    """Random numbers on the requested device. Raises: ConfigError for a device that is not there."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.Generator(device).manual_seed(config.seed)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"device {device!r} is not there; choose one of {', '.join(there)}") from error


def generate(config: GenerateConfig, generator: torch.Generator) -> None:
    folder = checkpoint_folder(config.model)
    own = folder if (folder / "tokenizer.json").exists() else AUTHORS_TOKENIZER
    tokenizer = load_tokenizer(config.tokenizer or own)
    model = MambaLM.from_pretrained(folder, device=generator.device, dtype=DTYPES[config.precision])
    texts, start = [""] * len(config.prompts), time.perf_counter()
    steps = 0
    for pieces in stream_text(
        model,
        tokenizer,
        config.prompts,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
    ):
        if len(pieces) == 1:  # printed at once
            print(pieces[0] if steps else config.prompts[0] + pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        steps += 1
    if len(texts) == 1:
        print()
    else:
        for prompt, text in zip(config.prompts, texts, strict=True):
            print(prompt + text, end="\n---\n")
    seconds = time.perf_counter() - start
    print(f"{steps} tokens after each prompt in {seconds:.1f} s: {steps / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
