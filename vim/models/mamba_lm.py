"""MambaLM: a Mamba language model, which loads the checkpoints of state-spaces/mamba.

Source: Gu & Dao 2023, arXiv 2312.00752. In shapes: B batch, L length, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vim.files import whole_file, write_json
from vim.layers import LayerNorm, MambaBlock, MambaCache, RMSNorm
from vim.layers.precision import at_least_fp32

from .lm_checkpoint import arguments_of, checkpoint_folder, native_weights, official_name, read_json, read_weights


class MambaLM(nn.Module):
    """A causal language model: token ids (B, L) -> logits (B, L, V).

    Args:
        vocab_size: tokens V. d_model: channels. depth: blocks. d_state, d_conv, expand, dt_rank, bias,
            conv_bias: see `Mamba`.
        rms_norm: RMS norms; False: LayerNorms with biases. norm_eps: epsilon of the norms.
        residual_in_fp32: keep the residual stream in fp32 at least; False: in the dtype of the weights.
        tie_embeddings: the head shares the weights of the embedding.
        vocab_multiple: round the rows of the embedding up to a multiple of this; it affects only speed.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 768,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        vocab_multiple: int = 8,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.vocab_size, self.residual_in_fp32 = vocab_size, residual_in_fp32
        rank = {} if dt_rank is None else {"dt_rank": dt_rank}
        biases = {"bias": bias, "conv_bias": conv_bias}
        self.config = {  # under the authors' names
            "d_model": d_model,
            "n_layer": depth,
            "vocab_size": vocab_size,
            "ssm_cfg": {"d_state": d_state, "d_conv": d_conv, "expand": expand, **rank, **biases},
            "rms_norm": rms_norm,
            "residual_in_fp32": residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": vocab_multiple,
            "tie_embeddings": tie_embeddings,
        }
        if norm_eps != 1e-5:  # the authors' code has only 1e-5, and refuses the option
            self.config["norm_epsilon"] = norm_eps
        rows = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.embedding = nn.Embedding(rows, d_model, **dd)
        options = {"norm_eps": norm_eps, "rms_norm": rms_norm, **biases, **dd}
        blocks = (MambaBlock(d_model, d_state, d_conv, expand, dt_rank, **options) for _ in range(depth))
        self.blocks = cast("Sequence[MambaBlock]", nn.ModuleList(blocks))
        norm = RMSNorm if rms_norm else LayerNorm
        self.norm: RMSNorm | LayerNorm = norm(d_model, eps=norm_eps, **dd)
        self.head = nn.Linear(d_model, rows, bias=False, **dd)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the authors do: embeddings of std 0.02, output projections divided by sqrt(depth), their and
        the input projections' biases 0.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))
            for projection in (block.mixer.in_proj, block.mixer.out_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    def no_weight_decay(self) -> set[str]:
        """Names and patterns of the parameters without weight decay."""
        return {"*.A_log", "*.D", "*.dt_proj.bias", "*norm.weight", "*norm.bias"}

    def allocate_cache(self, batch_size: int) -> list[MambaCache]:
        """A cache for the start of a sequence. Its size does not depend on the length."""
        return [block.mixer.allocate_cache(batch_size) for block in self.blocks]

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return at_least_fp32(x) if self.residual_in_fp32 else x  # the residual stream

    def forward_features(
        self,
        ids: Tensor,
        cache: list[MambaCache] | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, L) -> normalised hidden states (B, L, d_model).

        Args:
            cache: continues the sequence and is updated in place. Calls with parts of a sequence equal one call.
            mask: (B, L) of bool, False for padding, at any place. Outputs and cache are as if the padding were not
                there. Outputs at the padding are meaningless.
            seq_idx: (B, L), for several sequences packed into a row: the sequence of each token. Each is treated as if
                it were alone. Not with a mask.

        Raises: ValueError for a mask of another shape or dtype, or together with seq_idx.
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
        """Token ids (B, L) -> logits (B, L, V) of the next tokens; for the arguments see `forward_features`."""
        return self.head(self.forward_features(ids, cache, mask, seq_idx))[..., : self.vocab_size]

    def step(self, ids: Tensor, cache: list[MambaCache]) -> Tensor:
        """One more token of each sequence, ids (B,) -> logits (B, V) of the next one."""
        x = self._embed(ids)
        for block, one in zip(self.blocks, cache, strict=True):
            x = block.step(x, one)
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
        """Generate tokens (B, at most max_new_tokens) after each prompt; see `stream`."""
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
        """Yield the next token of each sequence, (B,), as soon as it is generated.

        Time and memory per token do not grow with the length. On a GPU, one CUDA graph replays all steps but the first.

        Args:
            prompts: token ids (B, L), or B sequences of different lengths.
            max_new_tokens: limit per sequence.
            temperature: divides the logits before sampling; 0 takes the most likely token.
            top_k: sample among the k most likely tokens. top_p: among the fewest tokens whose probabilities reach p.
            eos: the token that ends a sequence. An ended sequence repeats it while others still run.
            generator: source of random numbers, on the model's device.

        Raises: ValueError for an empty prompt, tokens outside the vocabulary, invalid options and NaN logits.
        """
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        ids, mask = pad_left(prompts, self.embedding.weight.device)
        low, high = (value.item() for value in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            wrong, known = low if low < 0 else high, f"the model knows 0 .. {self.vocab_size - 1}"
            raise ValueError(f"prompts hold the token {wrong}, but {known}; use the model's own tokenizer")
        cache = self.allocate_cache(len(ids))
        logits = self.head(self.forward_features(ids, cache, mask)[:, -1])[..., : self.vocab_size]
        if logits.isnan().any():
            raise ValueError(f"logits are NaN: weights are NaN, or {logits.dtype} overflows; try float32")
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
        """`step` on this cache; on a GPU as a CUDA graph, which saves the kernel launches."""
        if not ids.is_cuda:
            return lambda token: self.step(token, cache)
        static, kept = ids.clone(), [[part.clone() for part in one] for one in cache]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # warm-up: compile and autotune the kernels
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
        """Load a model from a folder or a repository on the Hugging Face hub.

        Takes checkpoints of state-spaces/mamba (such as state-spaces/mamba-130m) and of transformers (MambaForCausalLM,
        MambaModel): config.json, and model.safetensors or pytorch_model.bin, whole or in shards. Special tokens in
        config.json are ignored; pass `eos` to `stream`.

        Args: dtype: of the weights, torch's default if None.

        Raises: ValueError for a configuration other than Mamba's first version, for weights that do not fit it and for
            damaged files. OSError for missing files.
        """
        folder = checkpoint_folder(source)
        arguments = arguments_of(read_json(folder / "config.json"))
        shapes = cls(**arguments, device="meta").state_dict()
        weights = native_weights(read_weights(folder), shapes, arguments["tie_embeddings"])
        model = cls(**arguments, device=device, dtype=dtype)
        model.load_state_dict(weights)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors under the authors' names, for their code and `from_pretrained`."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        weights = {official_name(name): value.contiguous() for name, value in self.state_dict().items()}
        if self.config["tie_embeddings"]:
            del weights["lm_head.weight"]  # shares memory with the embedding, which safetensors refuses
        write_json(self.config, folder / "config.json")
        with whole_file(folder / "model.safetensors") as unfinished:
            save_file(weights, unfinished, {"format": "pt"})


def pad_left(prompts: Tensor | Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad prompts on the left to ids (B, L), with a mask (B, L) of the tokens; the mask is None without padding.

    Raises: ValueError for no prompts, an empty prompt, or ids that are not whole numbers.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.numel() == 0:
            raise ValueError(f"prompts must be (batch, length) and not empty, got {tuple(prompts.shape)}")
        return prompts.to(device), None
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"each prompt must have a token, got lengths {lengths}; begin with the end-of-text token")
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), None
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = torch.as_tensor(prompt)
        if tokens.is_floating_point():
            raise ValueError(f"prompts must hold whole numbers, got {tokens.dtype}")
        row[len(row) - len(prompt) :] = tokens
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        mask = mask.to(device)
    return ids.to(device), mask


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises: ValueError for invalid options of `sample`."""
    if not 0 <= temperature < math.inf:
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
    """Sample one token per row of logits (B, V); for the arguments see `MambaLM.stream`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        ordered, places = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all more likely tokens; 0 for the first
        logits = logits.masked_fill((before >= top_p).gather(-1, places.argsort(-1)), -math.inf)
    # The argmax of logits plus Gumbel noise is a sample of their softmax. It needs no synchronisation with the GPU.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)
