"""Compute named features of a batch of images, for any timm model."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vim.console.errors import ConfigError
from vim.timm_models.timm_model import TimmModel


class FeatureExtractor(nn.Module):
    """Images (B, C, H, W) -> {column: (B, D), or (B, P, D) for maps of P patches}.

    Args:
        pools: some of token, avg, map.
        blocks: read the normalised tokens of these blocks; None: the model's final features.
        l2: scale the vectors to length 1.

    Columns are named <pool>, or block<i>.<pool> with blocks.

    Raises: ConfigError if the model has no class token or no such block.
    """

    def __init__(self, model: TimmModel, pools: Sequence[str], blocks: Sequence[int] | None = None, l2: bool = False):
        super().__init__()
        self.model, self.pools, self.l2 = model.eval(), tuple(pools), l2
        self.prefix: int = getattr(model, "num_prefix_tokens", 0)
        registers = getattr(model, "reg_token", None)  # timm counts registers as prefix tokens
        self.class_tokens = self.prefix - (registers.shape[1] if isinstance(registers, Tensor) else 0)
        if "token" in pools and not self.class_tokens:
            raise ConfigError(f"{type(model).__name__} has no class token; take pools avg or map")
        self.blocks = None
        if blocks is not None:
            count = len(model.feature_info)
            if wrong := [b for b in blocks if not -count <= b < count]:
                raise ConfigError(f"{type(model).__name__} has blocks 0 to {count - 1}, got {wrong[0]}")
            self.blocks = sorted({b % count for b in blocks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.blocks is None:
            tokens = self.model.forward_features(images)
            if tokens.dim() == 4:  # a feature map, NCHW or NHWC
                channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
                tokens = tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)
            return self._pooled("", tokens[:, : self.prefix], tokens[:, self.prefix :])
        with_prefix = {"return_prefix_tokens": True} if self.prefix else {}
        found = self.model.forward_intermediates(
            images, indices=self.blocks, norm=True, intermediates_only=True, **with_prefix
        )
        columns: dict[str, Tensor] = {}
        for block, maps in zip(self.blocks, found, strict=True):
            maps, prefix = maps if self.prefix else (maps, None)
            patches = maps.flatten(2).transpose(1, 2)
            columns |= self._pooled(f"block{block}.", patches[:, :0] if prefix is None else prefix, patches)
        return columns

    def _pooled(self, name: str, prefix: Tensor, patches: Tensor) -> dict[str, Tensor]:
        taken = {
            # Of two class tokens, what token pooling reads; of Mamba-R's registers, which its head joins, the mean.
            "token": lambda: prefix[:, : self.class_tokens].mean(1),
            "avg": lambda: patches.mean(1),
            "map": lambda: patches,
        }
        columns = {name + pool: taken[pool]().float() for pool in self.pools}
        return {k: nn.functional.normalize(v, dim=-1) for k, v in columns.items()} if self.l2 else columns


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
