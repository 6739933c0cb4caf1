"""MambaLM: the 1-D sequence core as a language model.

Gu & Dao 2023, arXiv 2312.00752; loads the checkpoints of state-spaces/mamba. In shapes: B batch, L length, V tokens.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vim.files import whole_file, write_json
from vim.layers import MambaBlock, MambaCache, RMSNorm
from vim.layers.precision import at_least_fp32

# Official name -> ours; transformers has embeddings for embedding.
OFFICIAL = (
    (r"backbone\.embeddings?\.(.*)", r"embedding.\1"),
    (r"backbone\.norm_f\.(.*)", r"norm.\1"),
    (r"backbone\.layers\.(\d+)\.norm\.(.*)", r"blocks.\1.norm.\2"),
    (r"backbone\.layers\.(\d+)\.mixer\.(in_proj|out_proj)\.(.*)", r"blocks.\1.mixer.\2.\3"),
    (r"backbone\.layers\.(\d+)\.mixer\.(.*)", r"blocks.\1.mixer.ssm.\2"),
    (r"lm_head\.(.*)", r"head.\1"),
)
# What the authors' configurations must say for a model of this kind, where they say it.
EXPECTED = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}


class MambaLM(nn.Module):
    """A causal language model: token ids (B, L) -> logits (B, L, V).

    Args:
        vocab_size: tokens V. d_model: channels. depth: blocks. d_state, d_conv, expand: see `Mamba`.
        tie_embeddings: the head's weights are the embedding's.
        vocab_multiple: the embedding has room for a multiple of so many tokens; nothing but speed depends on it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 768,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        tie_embeddings: bool = True,
        vocab_multiple: int = 8,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        self.config = {  # with the authors' names
            "d_model": d_model,
            "n_layer": depth,
            "vocab_size": vocab_size,
            "ssm_cfg": {"d_state": d_state, "d_conv": d_conv, "expand": expand},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": vocab_multiple,
            "tie_embeddings": tie_embeddings,
        }
        rows = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.embedding = nn.Embedding(rows, d_model, **dd)
        self.blocks = nn.ModuleList(MambaBlock(d_model, d_state, d_conv, expand, **dd) for _ in range(depth))
        self.norm = RMSNorm(d_model, eps=1e-5, **dd)
        self.head = nn.Linear(d_model, rows, bias=False, **dd)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the authors do: embeddings of deviation 0.02, output projections divided by the root of the depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))  # type: ignore[union-attr, operator]

    def no_weight_decay(self) -> set[str]:
        """Names and patterns of the parameters to spare from weight decay."""
        return {"*.A_log", "*.D", "*.dt_proj.bias", "*norm.weight"}

    def allocate_cache(self, batch_size: int) -> list[MambaCache]:
        """A cache that has seen nothing; its size does not depend on how much it will see."""
        return [block.mixer.allocate_cache(batch_size) for block in self.blocks]  # type: ignore[union-attr, operator]

    def _embed(self, ids: Tensor) -> Tensor:
        return at_least_fp32(self.embedding(ids))  # the residual stream

    def forward_features(
        self,
        ids: Tensor,
        cache: list[MambaCache] | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states (B, L, d_model) of token ids (B, L).

        Args:
            cache: read, and updated in place: calls with parts of a sequence are one call with the whole.
            mask: (B, L), False where there is no token, in front of a sequence: such places change no state. Their own
                outputs mean nothing.
            seq_idx: (B, L), which of several sequences packed into a row a token belongs to: each is as if alone.
        """
        x = self._embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], mask, seq_idx)
        return self.norm(x)

    def forward(
        self,
        ids: Tensor,
        cache: list[MambaCache] | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of the tokens that follow ids (B, L); arguments as of `forward_features`."""
        return self.head(self.forward_features(ids, cache, mask, seq_idx))[..., : self.vocab_size]

    def step(self, ids: Tensor, cache: list[MambaCache]) -> Tensor:
        """Logits (B, V) of what follows one more token of each sequence, ids (B,)."""
        x = self._embed(ids)
        for block, one in zip(self.blocks, cache, strict=True):
            x = block.step(x, one)  # type: ignore[operator]
        return self.head(self.norm(x))[..., : self.vocab_size]

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New tokens (B, at most max_new_tokens) that follow each prompt, see `stream`."""
        stream = self.stream(
            prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos, generator=generator
        )
        return torch.stack(list(stream), 1)

    @torch.inference_mode()
    def stream(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of each sequence, (B,), as soon as it is there. Time and memory of a token do not grow
        with what came before. On a GPU all steps but the first are one CUDA graph.

        Args:
            prompts: token ids (B, L), or B sequences of different lengths.
            max_new_tokens: at most.
            temperature: logits are divided by it before sampling; 0 takes the likeliest token.
            top_k: sample among so many likeliest tokens. top_p: among the fewest that have this probability together.
            eos: a token that ends its sequence, which goes on with it while others still run.
            generator: of random numbers, on the model's device.

        Raises: ValueError for an empty prompt or options that mean nothing.
        """
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        ids, mask = pad_left(prompts, self.embedding.weight.device)
        cache = self.allocate_cache(len(ids))
        logits = self.head(self.forward_features(ids, cache, mask)[:, -1])[..., : self.vocab_size]
        step: Callable[[Tensor], Tensor] | None = None
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for left in reversed(range(max_new_tokens)):
            token = sample(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended = ended | (token == eos)
            yield token
            if left == 0 or (eos is not None and ended.all()):
                return
            step = self._stepper(token, cache) if step is None else step
            logits = step(token)

    def _stepper(self, ids: Tensor, cache: list[MambaCache]) -> Callable[[Tensor], Tensor]:
        """`step` on this cache; on a GPU as a CUDA graph, without its launches one by one."""
        if not ids.is_cuda:
            return lambda token: self.step(token, cache)
        static, kept = ids.clone(), [[part.clone() for part in one] for one in cache]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and chosen
                self.step(static, cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(static, cache)
        for one, before in zip(cache, kept, strict=True):
            for part, value in zip(one, before, strict=True):
                part.copy_(value)

        def replay(token: Tensor) -> Tensor:
            static.copy_(token)
            graph.replay()
            return logits

        return replay

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device=None, dtype=None) -> "MambaLM":
        """A model from a folder or a repository on the Hugging Face hub, with config.json and model.safetensors or
        pytorch_model.bin, as state-spaces/mamba publishes them (state-spaces/mamba-130m).

        Raises: ValueError for a configuration that is not one of Mamba's first version. FileNotFoundError.
        """
        folder = Path(source)
        files = ("config.json", "model.safetensors", "pytorch_model.bin")
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(source), allow_patterns=list(files)))
        config = json.loads((folder / files[0]).read_text())
        model = cls(**arguments_of(config), device=device, dtype=dtype)
        if (folder / files[1]).exists():
            weights = load_file(folder / files[1])
        else:
            weights = torch.load(folder / files[2], map_location="cpu", weights_only=True)
        weights = {native_name(name): value for name, value in weights.items()}
        if model.head.weight is model.embedding.weight:
            weights.setdefault("head.weight", weights["embedding.weight"])
        model.load_state_dict(weights)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors with the authors' names, for their code and `from_pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {official_name(name): value.contiguous() for name, value in self.state_dict().items()}
        if self.config["tie_embeddings"]:
            del weights["lm_head.weight"]  # the same memory, which the format does not hold twice
        write_json(self.config, folder / "config.json")
        with whole_file(folder / "model.safetensors") as unfinished:
            save_file(weights, unfinished, {"format": "pt"})


def arguments_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of MambaLM for the content of a config.json, the authors' or that of transformers.

    Raises: ValueError for a model that MambaLM is not.
    """
    if "hidden_size" in config:  # transformers
        if config.get("model_type") != "mamba" or config.get("use_bias") or not config.get("use_conv_bias", True):
            raise ValueError(f"config.json is of a {config.get('model_type')!r}, or of a Mamba with other biases")
        return {
            "vocab_size": config["vocab_size"],
            "d_model": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel"],
            "expand": config["expand"],
            "tie_embeddings": config.get("tie_word_embeddings", True),
            "vocab_multiple": 1,
        }
    for key, want in EXPECTED.items():
        if config.get(key, want) != want:
            raise ValueError(f"config.json has {key} = {config[key]!r}; only {want!r} is Mamba's first version")
    ssm = dict(config.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"config.json has the layer {config['ssm_cfg']['layer']!r}; only 'Mamba1' is known")
    known = {key: ssm.pop(key) for key in ("d_state", "d_conv", "expand") if key in ssm}
    if ssm:
        raise ValueError(f"config.json has options of ssm_cfg that are not known: {', '.join(ssm)}")
    return known | {
        "vocab_size": config["vocab_size"],
        "d_model": config["d_model"],
        "depth": config["n_layer"],
        "tie_embeddings": config.get("tie_embeddings", True),
        "vocab_multiple": config.get("pad_vocab_size_multiple", 8),
    }


def native_name(name: str) -> str:
    """Our name of a weight of a checkpoint; ours stay."""
    for pattern, ours in OFFICIAL:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


def official_name(name: str) -> str:
    """The authors' name of a weight."""
    for ours, theirs in (
        (r"blocks\.(\d+)\.mixer\.(?:ssm\.)?", r"backbone.layers.\1.mixer."),
        (r"blocks\.", "backbone.layers."),
        (r"embedding\.", "backbone.embedding."),
        (r"norm\.", "backbone.norm_f."),
        (r"head\.", "lm_head."),
    ):
        if match := re.match(ours, name):
            return match.expand(theirs) + name[match.end() :]
    return name


def pad_left(prompts: Tensor | Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, L) and which of them are tokens, (B, L); None where all are.

    Raises: ValueError for no prompt, or an empty one.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.numel() == 0:
            raise ValueError(f"prompts must be (batch, length) with tokens in them, got {tuple(prompts.shape)}")
        return prompts.to(device), None
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"prompts must have a token each, got lengths {lengths}; start one with the end-of-text token")
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), None
    for row, prompt in zip(ids, prompts, strict=True):
        row[len(row) - len(prompt) :] = torch.as_tensor(prompt)
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        mask = mask.to(device)
    return ids.to(device), mask


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises: ValueError for options of `sample` that mean nothing."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token of each row of logits (B, V); arguments as of `MambaLM.stream`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        ordered, places = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # of the likelier ones; the first has none
        logits = logits.masked_fill((before >= top_p).gather(-1, places.argsort(-1)), -math.inf)
    # The largest of the logits with Gumbel noise, which is a sample of their softmax without a synchronisation.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)
