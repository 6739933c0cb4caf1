"""What the families share: patches, position table, blocks, norm, head, and timm's interface of a plain model.

In shapes: B batch, P patches, T class tokens or registers, L = P + T, D embed_dim.
"""

import math
from typing import Any, Literal, TypeVar, get_args

import timm.models
import torch
from timm.layers import get_device_dtype, global_pool_nlc, lecun_normal_, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from vim.layers.checks import check_choice

from .block import ResidualBlock
from .checkpoint_filter import before_loading, filter_released
from .feature_maps import FeatureMaps
from .patch_embed import Grid, PatchEmbed, Size
from .position_table import GRID
from .token_layout import Layout, TokenLayout

GlobalPool = Literal["", "token", "avg", "max", "avgmax"]
WeightInit = Literal["", "skip"]
# timm's record of a model's size, for save_for_hf. The module is private: other versions may not have it.
_SIZE_RECORD = getattr(timm.models, "_input", None)
Family = TypeVar("Family", bound="PlainBackbone")


class PlainBackbone(FeatureMaps):
    """Base class of the families. A family creates its stem here, then its blocks, then its head:

        super().__init__(img_size, ..., TokenLayout("middle"), dynamic_img_size=dynamic_img_size, **dd)
        self.blocks = nn.Sequential(...)  # each takes and returns the sequence, block(x, layout=layout)
        self._add_head(nn.RMSNorm(embed_dim), num_classes, global_pool, drop_rate, weight_init, **dd)

    Args:
        token_layout: where the class tokens stand.
        dynamic_img_size: take images of any size and resample the position table at every call.
        table_tokens: class entries of the position table; None for one per class token.
    """

    # Gradient checkpointing here draws no random numbers, so a CUDA graph can record it.
    graph_safe_checkpointing = True

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        patch_stride: Size | None,
        in_chans: int,
        embed_dim: int,
        token_layout: TokenLayout,
        *,
        dynamic_img_size: bool,
        table_tokens: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pretrained_cfg: dict[str, Any] = {}  # set by timm's factory, as are the arguments
        self.pretrained_model_args: dict[str, Any] = {}
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.token_layout = token_layout
        self.class_token: str = token_layout.class_token
        prefix = self.num_prefix_tokens = token_layout.num_tokens
        self.table_tokens = prefix if table_tokens is None else table_tokens
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        self.cls_token = nn.Parameter(torch.empty(1, prefix, embed_dim, **dd)) if prefix else None
        # The class entries come first in the table, wherever the tokens stand in the sequence.
        entries = self.table_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, entries, embed_dim, **dd))
        self._keep_grid()

    def _add_head(
        self,
        norm: nn.Module,
        num_classes: int,
        global_pool: GlobalPool,
        drop_rate: float,
        weight_init: WeightInit,
        *,
        device=None,
        dtype=None,
    ) -> None:
        """Add the last norm and the head, and initialise all weights.

        Args: weight_init: "skip" leaves tables and head uninitialised, for a model that will load its weights.
        """
        check_choice("weight_init", weight_init, get_args(WeightInit))
        dd = {"device": device, "dtype": dtype}
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_embed.feat_ratio()}
            for i in range(len(self.blocks))
        ]
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self._set_pool(global_pool, **dd)
        self._set_head(num_classes, **dd)
        self.register_load_state_dict_pre_hook(before_loading)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of the authors' code, with its keys in any order.

        Raises: ValueError for one of another model.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, T + P, D), class tokens first."""
        layout = self._layout(x)
        x = self._embed(x)
        for block in self.blocks:
            x = block(x, layout=layout)
        return self.prefix_first(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T + P, D) -> logits (B, num_classes), or with pre_logits the pooled features."""
        x = self.head_drop(self._pool(x))
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor) -> Tensor:
        """Tokens (B, T + P, D) -> (B, head_hidden_size), or all tokens without pooling."""
        if self.global_pool == "token":
            return x[:, : self.num_prefix_tokens].mean(1)
        return global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)

    def _embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens in sequence order (B, L, D), class tokens and positions added."""
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = self._resampled_table(self._grid(images), self.patch_embed.grid_size)
        patches = self.patch_embed(images) + pos_embed[:, self.table_tokens :]
        if self.cls_token is None:
            return patches
        class_tokens = self.cls_token + self._class_positions(pos_embed)
        return self.token_layout.insert(patches, class_tokens.expand(patches.shape[0], -1, -1))

    def _class_positions(self, pos_embed: Tensor) -> Tensor:
        """The positions (1, T, D) of the class tokens."""
        return pos_embed[:, : self.table_tokens]

    def prefix_first(self, x: Tensor) -> Tensor:
        """Tokens in sequence order (B, L, D) -> class tokens first, as timm's models return them."""
        return self.token_layout.prefix_first(x)

    def _layout(self, images: Tensor) -> Layout:
        grid = self._grid(images)
        return self.token_layout.of(grid, images.device) if self.dynamic_img_size else self.token_layout.kept(grid)

    def _grid(self, images: Tensor) -> Grid:
        return self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as Vim's authors do, in every family.

        Args:
            mode: only "".
            needs_reset: also run the initialiser of every layer, as needed after `to_empty()`.
        """
        if mode:
            raise ValueError(f"mode must be '', got {mode!r}")
        if needs_reset:
            # Children first: SelectiveSSM sets its dt_proj after the Linear has set itself.
            self.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
            self._keep_grid()
        for name, p in self.named_parameters():
            if name in ("pos_embed", "pos_embed_cls", "cls_token", "head.weight", "neck.weight"):
                trunc_normal_(p, std=0.02)
            elif name == "patch_embed.proj.weight":
                lecun_normal_(p)
            elif name in ("patch_embed.proj.bias", "head.bias") or (".mlp." in name and name.endswith(".bias")):
                nn.init.zeros_(p)
            elif name.endswith("mixer.out_proj.weight"):
                p.div_(math.sqrt(len(self.blocks)))  # keeps the residual stream's scale independent of depth

    def no_weight_decay(self) -> set[str]:
        """Names and patterns of the parameters without weight decay, as the authors intended."""
        ssm = {"*.A_log", "*.D", "*.dt_proj.bias", "*.dt_bias", "*.mixer.kernel.*"}
        return {"pos_embed", "pos_embed_cls", "cls_token", "*norm*.weight", *ssm}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep of each block only its input and the outputs of its scans; recompute the rest."""
        self.grad_checkpointing = enable
        for module in self.blocks.modules():
            if isinstance(module, ResidualBlock):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head for `num_classes` (0: none), with another pooling if one is given."""
        dd = get_device_dtype(self)
        if global_pool is not None and global_pool != self.global_pool:
            self._set_pool(global_pool, **dd)
        self._set_head(num_classes, **dd)
        self.head.train(self.training)

    def _set_head(self, num_classes: int, *, device=None, dtype=None) -> None:
        self.num_classes = num_classes
        # In timm, num_features is also the width of what a model without classes returns.
        self.num_features = self.embed_dim if num_classes > 0 else self.head_hidden_size
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=device, dtype=dtype)

    def _set_pool(self, global_pool: str, *, device=None, dtype=None) -> None:
        """Set global_pool and head_hidden_size."""
        check_choice("global_pool", global_pool, get_args(GlobalPool))
        if global_pool == "token" and self.num_prefix_tokens == 0:
            raise ValueError("global_pool='token' needs a class token, got class_token='none'; use 'avg' or 'max'")
        self.global_pool, self.head_hidden_size = global_pool, self.embed_dim

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image or patch size and resample the position table to the new grid."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.patch_embed.grid_size != old_grid:
            table = self._resampled_table(self.patch_embed.grid_size, old_grid)
            self.pos_embed = nn.Parameter(table.detach(), requires_grad=self.pos_embed.requires_grad)
            self._keep_grid()
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        if _SIZE_RECORD is not None:
            _SIZE_RECORD.update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _resampled_table(self, grid: Grid, old_grid: Grid) -> Tensor:
        return resample_abs_pos_embed(self.pos_embed, grid, old_grid, num_prefix_tokens=self.table_tokens)

    def _keep_grid(self) -> None:
        """Keep the grid of the position table, and the scan orders on it.

        The grid goes into the state dict unless it is square: the length of a table does not tell 4 x 4 from 8 x 2.
        """
        grid, device = self.patch_embed.grid_size, self.pos_embed.device
        self.register_buffer(GRID, None if grid[0] == grid[1] else torch.tensor(grid, device=device))
        self.token_layout.keep_orders(grid, device)


def create(family: type[Family], variant: str, pretrained: bool, arguments: dict[str, Any]) -> Family:
    """Build a variant as timm does, with the weights of its pretrained cfg if asked for."""
    return build_model_with_cfg(
        family,
        variant,
        pretrained,
        pretrained_filter_fn=filter_released,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **arguments,
    )
