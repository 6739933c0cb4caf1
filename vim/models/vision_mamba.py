"""Vision Mamba (Vim): a plain backbone of bidirectional Mamba blocks, as timm models.

Source: Zhu et al. 2024, arXiv 2401.09417; checked against the authors' code.
In shapes: B batch, P patches, T class tokens or registers, L = P + T, D embed_dim.
"""

import math
from functools import partial
from typing import Any, Literal, get_args

import timm.models
import torch
from einops import rearrange
from timm.layers import (
    DropPath,
    get_device_dtype,
    global_pool_nlc,
    lecun_normal_,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from vim.layers import S4ND, RMSNorm, recompute_all_but_scans
from vim.layers.checks import check_choice

from .checkpoint_filter import before_loading, checkpoint_filter_fn, filter_released
from .default_cfgs import default_cfgs
from .feature_maps import FeatureMaps
from .mixers import Mixer, create_mixer
from .patch_embed import Grid, PatchEmbed, Size
from .position_table import GRID
from .token_layout import ClassToken, Layout, ScanOrder, TokenLayout, check_register_option

__all__ = ["VisionMamba", "checkpoint_filter_fn", "default_cfgs"]  # timm adds the entry points

torch.fx.wrap("rearrange")  # FX keeps the call as a leaf; inside, einops asks for the type of the tensor

GlobalPool = Literal["", "token", "avg", "max", "avgmax"]
# timm's record of a model's size, for save_for_hf. The module is private: other versions may not have it.
_SIZE_RECORD = getattr(timm.models, "_input", None)


class Block(nn.Module):
    """x + drop_path(mixer(norm(x))), (B, L, D) -> (B, L, D).

    Under autocast the mixer returns low precision; the residual stream stays in fp32.

    Args:
        mixer: takes (B, L, D); an S4ND takes (B, height, width, D).
        order: name of the scan order in which the mixer reads the tokens.
    """

    def __init__(self, dim: int, mixer: nn.Module, order: str, drop_path: float, *, device=None, dtype=None):
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mixer = mixer
        self.on_grid = isinstance(mixer, S4ND)  # asked here, because the mixer may be wrapped later
        self.order = order
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.grad_checkpointing = False

    def _mix(self, x: Tensor, layout: Layout | None) -> Tensor:
        x = self.norm(x)
        if layout is None:
            return self.mixer(x)
        if self.on_grid:
            y = self.mixer(rearrange(x, "b (h w) d -> b h w d", h=layout.grid[0], w=layout.grid[1]))
            return rearrange(y, "b h w d -> b (h w) d")
        order = layout.orders.get(self.order)  # none for "raster"
        return self.mixer(x) if order is None else self.mixer(x[:, order[0]])[:, order[1]]

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """layout: None mixes the tokens in the order that they have."""
        mix = partial(self._mix, layout=layout)
        recompute = self.grad_checkpointing and self.training
        return x + self.drop_path(recompute_all_but_scans(mix, x) if recompute else mix(x))


class VisionMamba(FeatureMaps):
    """Vision Mamba classifier and backbone, with timm's interface of a plain model.

    Args:
        img_size: height and width of the images in pixels. `set_input_size` changes it; with `dynamic_img_size` it may
            differ from call to call.
        patch_size: edge of a patch in pixels. patch_stride: pixels between patches, patch_size if None.
        in_chans: image channels. num_classes: classes of the head; 0 for no head.
        embed_dim, depth: width and number of blocks.
        d_state, d_conv, expand: 16, 4 and 2 if None, see `BiMamba`; only for mixers that have them.
        mixer: the layer that mixes the tokens, see `create_mixer`. Vim has "bimamba". "s4nd" works on the grid of the
            patches and takes no class token.
        scan_order: order of the patches in the sequence, see `patch_order`. Vim has "raster". "cross" alternates
            between rows and columns, block by block.
        class_token: place of the class tokens in the sequence: "middle" (the paper's), "first", "both" (one at each
            end, averaged by token pooling), "registers" (evenly spread, concatenated by token pooling) or "none".
        num_registers: only for class_token "registers", 12 if None. register_dim: channels to which each register is
            projected for the head; None keeps embed_dim.
        global_pool: "token", "avg", "max" or "avgmax" over the patches, or "" for none.
        dynamic_img_size: take images of any size and resample the position table at every call.
        drop_rate: dropout before the head. drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        weight_init: "skip" leaves tables and head uninitialised, for a model that will load its weights.

    Raises: ValueError for options that do not exist or do not go together.
    Source: registers Wang et al. 2024, arXiv 2405.14858 (Mamba-R).
    """

    # Gradient checkpointing here draws no random numbers, so a CUDA graph can record it.
    graph_safe_checkpointing = True

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        patch_stride: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: int | None = None,
        mixer: Mixer = "bimamba",
        scan_order: ScanOrder = "raster",
        class_token: ClassToken = "middle",
        num_registers: int | None = None,
        register_dim: int | None = None,
        global_pool: GlobalPool = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "skip"] = "",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_choice("weight_init", weight_init, ("", "skip"))
        self.token_layout = TokenLayout(class_token, num_registers, scan_order, depth)
        check_register_option("register_dim", register_dim, class_token)
        if mixer == "s4nd" and (class_token, scan_order) != ("none", "raster"):
            raise ValueError(
                f"mixer 's4nd' works on the grid of the patches and needs class_token 'none' and scan_order 'raster', "
                f"got {class_token!r} and {scan_order!r}"
            )
        dd = {"device": device, "dtype": dtype}
        self.pretrained_cfg: dict[str, Any] = {}  # set by timm's factory, as are the arguments
        self.pretrained_model_args: dict[str, Any] = {}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.embed_dim = embed_dim
        self.class_token: str = class_token
        prefix = self.num_prefix_tokens = self.token_layout.num_tokens
        self.register_dim = register_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        tokens = prefix + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, prefix, embed_dim, **dd)) if prefix else None
        # The class entries come first in the table, wherever the tokens stand in the sequence.
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, create_mixer(mixer, embed_dim, tokens, **sizes, **dd), order, rate, **dd)
                for order, rate in zip(self.token_layout.block_orders, rates, strict=True)
            )
        )
        self._keep_grid()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
            for i in range(depth)
        ]
        self.norm = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self._set_pool(global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.register_load_state_dict_pre_hook(before_loading)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

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
        if self.global_pool == "token" and self.class_token == "registers":
            x = self.neck(x[:, : self.num_prefix_tokens]).flatten(1)
        elif self.global_pool == "token":
            x = x[:, : self.num_prefix_tokens].mean(1)
        else:
            x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens in sequence order (B, L, D), class tokens and positions added."""
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = self._resampled_table(self._grid(images), self.patch_embed.grid_size)
        patches = self.patch_embed(images) + pos_embed[:, self.num_prefix_tokens :]
        if self.cls_token is None:
            return patches
        class_tokens = self.cls_token + pos_embed[:, : self.num_prefix_tokens]
        return self.token_layout.insert(patches, class_tokens.expand(patches.shape[0], -1, -1))

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
        """Initialise as the authors do.

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
            if name in ("pos_embed", "cls_token", "head.weight", "neck.0.weight"):
                trunc_normal_(p, std=0.02)
            elif name == "patch_embed.proj.weight":
                lecun_normal_(p)
            elif name in ("patch_embed.proj.bias", "head.bias"):
                nn.init.zeros_(p)
            elif name.endswith("mixer.out_proj.weight"):
                p.div_(math.sqrt(len(self.blocks)))  # keeps the residual stream's scale independent of depth

    def no_weight_decay(self) -> set[str]:
        """Names and patterns of the parameters without weight decay, as the authors intended."""
        ssm = {"*.A_log", "*.D", "*.dt_proj.bias", "*.dt_bias", "*.mixer.kernel.*"}
        return {"pos_embed", "cls_token", "*norm.weight", *ssm}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep of each block only its input and the outputs of its scans; recompute the rest."""
        self.grad_checkpointing = enable
        for module in self.blocks.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head for `num_classes` (0: none), with another pooling if one is given."""
        dd = get_device_dtype(self)
        if global_pool is not None and global_pool != self.global_pool:
            self._set_pool(global_pool, **dd)
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _set_pool(self, global_pool: str, *, device=None, dtype=None) -> None:
        """Set global_pool, head_hidden_size and the neck; only registers have a neck."""
        check_choice("global_pool", global_pool, get_args(GlobalPool))
        if global_pool == "token" and self.num_prefix_tokens == 0:
            raise ValueError("global_pool='token' needs a class token, got class_token='none'; use 'avg' or 'max'")
        self.global_pool, self.head_hidden_size = global_pool, self.embed_dim
        self.neck: nn.Module = nn.Identity()
        if global_pool != "token" or self.class_token != "registers":
            return
        width = self.embed_dim if self.register_dim is None else self.register_dim
        self.head_hidden_size = self.num_prefix_tokens * width
        if self.register_dim is not None:
            dd = {"device": device, "dtype": dtype}
            self.neck = nn.Sequential(
                nn.Linear(self.embed_dim, width, bias=False, **dd),
                nn.Flatten(1),
                nn.RMSNorm(self.head_hidden_size, eps=1e-5, **dd),
            )

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
        return resample_abs_pos_embed(self.pos_embed, grid, old_grid, num_prefix_tokens=self.num_prefix_tokens)

    def _keep_grid(self) -> None:
        """Keep the grid of the position table, and the scan orders on it.

        The grid goes into the state dict unless it is square: the length of a table does not tell 4 x 4 from 8 x 2.
        """
        grid, device = self.patch_embed.grid_size, self.pos_embed.device
        self.register_buffer(GRID, None if grid[0] == grid[1] else torch.tensor(grid, device=device))
        self.token_layout.keep_orders(grid, device)


def _create(variant: str, pretrained: bool, **kwargs) -> VisionMamba:
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=filter_released,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **VARIANTS[variant] | kwargs,
    )


_PIXELS = {"img_size": 28, "patch_size": 1, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 4}
# Arguments of each variant that differ from VisionMamba's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "vim_nano": {"embed_dim": 64, "depth": 4},  # for tests and the quick start
    "vim_tiny": {"embed_dim": 192},
    "vim_tiny_stride8": {"embed_dim": 192, "patch_stride": 8},
    "vim_small": {"embed_dim": 384},
    "vim_small_stride8": {"embed_dim": 384, "patch_stride": 8},
    "vim_base": {"embed_dim": 768},
    "vim_small_registers": {"embed_dim": 384, "class_token": "registers", "register_dim": 192},
    "s4nd_tiny": {"embed_dim": 192, "mixer": "s4nd", "d_state": 64, "class_token": "none", "global_pool": "avg"},
    # A sequence of pixels, row by row; `mixer` selects another layer.
    "vim_pixels": _PIXELS | {"class_token": "none", "global_pool": "avg"},
}


@register_model
def vim_nano(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_nano", pretrained, **kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny", pretrained, **kwargs)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny_stride8", pretrained, **kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small", pretrained, **kwargs)


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small_stride8", pretrained, **kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_base", pretrained, **kwargs)


@register_model
def vim_small_registers(pretrained: bool = False, **kwargs) -> VisionMamba:
    if kwargs.get("class_token", "registers") != "registers":
        kwargs.setdefault("register_dim", None)
    return _create("vim_small_registers", pretrained, **kwargs)


@register_model
def s4nd_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("s4nd_tiny", pretrained, **kwargs)


@register_model
def vim_pixels(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_pixels", pretrained, **kwargs)
