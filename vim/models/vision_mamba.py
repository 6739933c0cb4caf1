"""Vision Mamba (Vim): a plain backbone of bidirectional Mamba blocks, as timm models.

Zhu et al. 2024, arXiv 2401.09417; checked against the authors' code. In shape comments: B batch, L tokens, P patches,
T prefix tokens, D embed_dim.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    get_device_dtype,
    global_pool_nlc,
    lecun_normal_,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vim.layers import S4ND, RMSNorm, recompute_all_but_scans

from . import official
from .mixers import Mixer, create_mixer
from .patch_embed import PatchEmbed, Size
from .position_table import GRID, check_table, fit_table, patches_of
from .scan_order import SCAN_ORDERS, ScanOrder, order_of_block, token_order

try:
    # Records the new size for save_for_hf; older versions of timm keep no such record.
    from timm.models._input import update_model_input_size as _update_model_input_size
except ImportError:
    _update_model_input_size = None  # type: ignore[assignment]

GLOBAL_POOLS = ("", "token", "avg", "max", "avgmax")
CLASS_TOKENS = ("middle", "first", "both", "registers", "none")


class Layout(NamedTuple):
    """Where tokens come from: the grid of the patches, and by the name of a scan order where its tokens stand in the
    sequence, and back, as indices (L,)."""

    grid: tuple[int, int]
    orders: dict[str, tuple[Tensor, Tensor] | None]


class Block(nn.Module):
    """x + drop_path(mixer(norm(x))), (B, L, D) -> (B, L, D).

    Under autocast the mixer returns low precision and the residual stream stays in fp32.

    Args:
        mixer: of (B, L, D), or of (B, height, width, D) if it is an S4ND.
        order: name of the scan order in which the mixer gets the tokens.
    """

    def __init__(self, dim: int, mixer: nn.Module, order: str, drop_path: float, *, device=None, dtype=None):
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mixer = mixer
        self.on_grid = isinstance(mixer, S4ND)  # also once it is wrapped
        self.order = order
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.grad_checkpointing = False

    def _mix(self, x: Tensor, layout: Layout | None) -> Tensor:
        x = self.norm(x)
        if layout is None:
            return self.mixer(x)
        if self.on_grid:
            return self.mixer(x.unflatten(1, layout.grid)).flatten(1, 2)
        order = layout.orders[self.order]
        return self.mixer(x) if order is None else self.mixer(x[:, order[0]])[:, order[1]]

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """layout: None where tokens are mixed as they stand."""
        mix = partial(self._mix, layout=layout)
        recompute = self.grad_checkpointing and self.training
        return x + self.drop_path(recompute_all_but_scans(mix, x) if recompute else mix(x))


class VisionMamba(nn.Module):
    """Vision Mamba classifier and backbone, with timm's interface of a plain model.

    Args:
        img_size: height and width of the images in pixels; other sizes through `set_input_size`, or at every call
            with `dynamic_img_size`.
        patch_size: edge of a patch in pixels. patch_stride: pixels between patches, patch_size if None.
        in_chans: image channels. num_classes: classes of the head; 0 for no head.
        embed_dim, depth: width and number of blocks.
        d_state, d_conv, expand: 16, 4 and 2 if None, see `BiMamba`; only for mixers that have them.
        mixer: what mixes the tokens, see `create_mixer`; "bimamba" is Vim's. "s4nd" works on the grid of the patches,
            and takes no class token.
        scan_order: how patches become a sequence, see `patch_order`; "raster" is Vim's. "cross" goes along rows and
            along columns in turn, block by block.
        class_token: where class tokens stand in the sequence: "middle" (the paper's), "first", "both" (one at each
            end, averaged by token pooling), "registers" (spread evenly, one behind the other by token pooling), or
            "none".
        num_registers: of class_token "registers" alone, 12 if None. register_dim: channels that each of them is
            projected to for the head; None for all of them.
        global_pool: "token", "avg", "max" or "avgmax" over the patches, or "" for none.
        dynamic_img_size: take images of any size, resampling the position table at every call.
        drop_rate: dropout before the head. drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        weight_init: "skip" leaves the tables and the head uninitialised, for a model that will load its weights.

    Source: registers Wang et al. 2024, arXiv 2405.14858 (Mamba-R).
    """

    # A CUDA graph can hold its checkpointing, which draws no random numbers.
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
        class_token: Literal["middle", "first", "both", "registers", "none"] = "middle",
        num_registers: int | None = None,
        register_dim: int | None = None,
        global_pool: Literal["", "token", "avg", "max", "avgmax"] = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "skip"] = "",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if class_token not in CLASS_TOKENS:
            raise ValueError(f"class_token must be one of {CLASS_TOKENS}, got {class_token!r}")
        for option, value in {"num_registers": num_registers, "register_dim": register_dim}.items():
            if value is not None and class_token != "registers":
                raise ValueError(f"{option} is of class_token 'registers' alone, got {value} with {class_token!r}")
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if scan_order not in SCAN_ORDERS:
            raise ValueError(f"scan_order must be one of {SCAN_ORDERS}, got {scan_order!r}")
        if mixer == "s4nd" and (class_token, scan_order) != ("none", "raster"):
            raise ValueError(
                f"mixer 's4nd' works on the grid of the patches: it wants class_token 'none' and scan_order 'raster', "
                f"got {class_token!r} and {scan_order!r}"
            )
        if weight_init not in ("", "skip"):
            raise ValueError(f"weight_init must be '' or 'skip', got {weight_init!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.embed_dim = embed_dim
        self.class_token = class_token
        registers = 12 if num_registers is None else num_registers
        prefixes = {"middle": 1, "first": 1, "both": 2, "registers": registers, "none": 0}
        self.num_prefix_tokens = prefixes[class_token]
        self.register_dim = register_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        prefix = self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, prefix, embed_dim, **dd)) if prefix else None
        # The class entries come first in the table, wherever the tokens stand in the sequence.
        self.pos_embed = nn.Parameter(torch.empty(1, prefix + self.patch_embed.num_patches, embed_dim, **dd))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        tokens = prefix + self.patch_embed.num_patches
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    create_mixer(mixer, embed_dim, tokens, d_state=d_state, d_conv=d_conv, expand=expand, **dd),
                    order_of_block(scan_order, i),
                    rate,
                    **dd,
                )
                for i, rate in enumerate(rates)
            )
        )
        self.scan_orders: list[str] = sorted({order_of_block(scan_order, i) for i in range(depth)} - {"raster"})
        self._keep_grid()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
            for i in range(depth)
        ]
        self.norm: nn.Module = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self._set_pool(global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.register_load_state_dict_pre_hook(_before_loading)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as the authors do.

        Args:
            mode: there is only one, "".
            needs_reset: also run every layer's own initialiser, as after `to_empty()`.
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
        """Names and patterns of the parameters to spare from weight decay, as the authors meant to."""
        ssm = {"*.A_log", "*.D", "*.dt_proj.bias", "*.dt_bias", "*.mixer.kernel.*"}
        return {"pos_embed", "cls_token", "*norm.weight", *ssm}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep of each block its input and its scans' outputs in training, and recompute the rest in the backward."""
        self.grad_checkpointing = enable
        for block in self.blocks:
            block.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given."""
        dd = get_device_dtype(self)
        if global_pool is not None and global_pool != self.global_pool:
            self._set_pool(global_pool, **dd)
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _set_pool(self, global_pool: str, *, device=None, dtype=None) -> None:
        """Set global_pool, head_hidden_size and the neck, which registers alone have."""
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"global_pool must be one of {GLOBAL_POOLS}, got {global_pool!r}")
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
        if _update_model_input_size is not None:
            _update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _resampled_table(self, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        return resample_abs_pos_embed(self.pos_embed, grid, old_grid, num_prefix_tokens=self.num_prefix_tokens)

    def _embed(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> tokens in sequence order (B, L, D), class tokens and positions added."""
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            pos_embed = self._resampled_table(grid, self.patch_embed.grid_size)
        x = self.patch_embed(x) + pos_embed[:, self.num_prefix_tokens :]
        if self.cls_token is None:
            return x
        cls = (self.cls_token + pos_embed[:, : self.num_prefix_tokens]).expand(x.shape[0], -1, -1)
        pieces, done = [], 0
        for i, place in enumerate(self._prefix_places(x.shape[1])):
            pieces += [x[:, done : place - i], cls[:, i : i + 1]]
            done = place - i
        return torch.cat([*pieces, x[:, done:]], 1)

    def _prefix_places(self, num_patches: int) -> tuple[int, ...]:
        """Where the class tokens stand in the sequence with `num_patches` patches."""
        if self.class_token == "registers":  # as many patches between them as at the ends
            n = self.num_prefix_tokens
            return tuple((i + 1) * num_patches // (n + 1) + i for i in range(n))
        places = {"middle": (num_patches // 2,), "first": (0,), "both": (0, num_patches + 1), "none": ()}
        return places[self.class_token]

    def prefix_first(self, x: Tensor) -> Tensor:
        """Tokens in sequence order -> class tokens in front, as timm's models return them."""
        if self.class_token in ("first", "none"):
            return x
        places = self._prefix_places(x.shape[1] - self.num_prefix_tokens)
        prefix = [x[:, place : place + 1] for place in places]
        starts, ends = (0, *(place + 1 for place in places)), (*places, x.shape[1])
        return torch.cat([*prefix, *(x[:, start:end] for start, end in zip(starts, ends, strict=True))], 1)

    def _keep_grid(self) -> None:
        """Note the grid of an image of the usual size, and where its tokens stand in the sequence.

        The order is not part of the state dict. The grid is, unless it is a square: the length of the position table
        does not tell 4 x 4 patches from 8 x 2.
        """
        grid = self.patch_embed.grid_size
        noted = None if grid[0] == grid[1] else torch.tensor(grid, device=self.pos_embed.device)
        self.register_buffer(GRID, noted)
        for name in self.scan_orders:
            for buffer, indices in zip(("to", "from"), self._order(name, grid), strict=True):
                self.register_buffer(f"_{buffer}_{name}", indices.to(self.pos_embed.device), persistent=False)

    def _order(self, name: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return token_order(name, grid, self._prefix_places(grid[0] * grid[1]))

    def _layout(self, images: Tensor) -> Layout:
        grid = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        orders: dict[str, tuple[Tensor, Tensor] | None] = {"raster": None}
        for name in self.scan_orders:
            if self.dynamic_img_size:
                to, back = self._order(name, grid)
                orders[name] = to.to(images.device), back.to(images.device)
            else:
                orders[name] = getattr(self, f"_to_{name}"), getattr(self, f"_from_{name}")
        return Layout(grid, orders)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ):
        """Features of chosen blocks.

        Args:
            x: (B, in_chans, H, W). indices: the last n blocks for an int n, those blocks for a list, all if None.
            return_prefix_tokens: each intermediate becomes (patches, class tokens (B, T, D)).
            norm: apply the final norm to the intermediates.
            stop_early: do not run the blocks behind the last one taken.
            output_fmt: "NCHW" for maps (B, D, grid height, grid width), "NLC" for (B, P, D).
            intermediates_only: leave out the final features.

        Returns: (final features as `forward_features` gives them, list of intermediates), or the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        layout = self._layout(x)
        x = self._embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x, layout=layout)
            if i in taken:
                tokens = self.prefix_first(self.norm(x) if norm else x)
                prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    patches = patches.unflatten(1, layout.grid).permute(0, 3, 1, 2)
                intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.prefix_first(self.norm(x)), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen intermediates do not need; returns their indices."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """`forward_intermediates` by the name and arguments that DINO's tools call."""
        output_fmt: Literal["NCHW", "NLC"] = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> normalised tokens (B, T + P, D), class tokens first."""
        layout = self._layout(x)
        x = self._embed(x)
        for block in self.blocks:
            x = block(x, layout=layout)
        return self.prefix_first(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T + P, D) -> logits (B, num_classes), or with pre_logits the pooled features (B, D)."""
        if self.global_pool == "token" and self.class_token == "registers":
            x = self.neck(x[:, : self.num_prefix_tokens]).flatten(1)
        elif self.global_pool == "token":
            x = x[:, : self.num_prefix_tokens].mean(1)
        else:
            x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict, model: VisionMamba, img_size: Size | None = None) -> dict[str, Tensor]:
    """A checkpoint for `model`: unwrapped, under native names, its tables resampled to the model's sizes.

    Takes official training states and state dicts, and native ones, with or without a head, with keys in any order.
    A model without class token leaves out the checkpoint's, and its place in the table; an official table's single
    class entry is then taken to be in the middle, as in all released files.

    Args:
        img_size: of the images that the position table of the checkpoint is for. Needed where they are not square and
            the checkpoint does not say it, because it is from another library, or older than its `pos_embed_grid`.

    Raises: ValueError for a checkpoint with other class tokens, or a position table whose grid cannot be told.
    Source: names and layout of hustvl/Vim; `vim.models.official` holds the table.
    """
    weights = _native(state_dict, model)
    return fit_table(weights, model, None if img_size is None else _table_grid(weights, model, to_2tuple(img_size)))


def _native(state_dict: dict, model: VisionMamba) -> dict[str, Tensor]:
    """The weights of a checkpoint under native names."""
    is_training_state = any(isinstance(state_dict.get(key), dict) for key in ("model", "model_ema", "state_dict"))
    if is_training_state:
        state_dict = official.select_weights(state_dict, model)
    if official.is_official(state_dict):
        if not is_training_state:
            state_dict = official.reselect_weights(state_dict, model)
        state_dict = official.to_native(state_dict, model.class_token)
    return dict(state_dict)


def _table_grid(weights: dict[str, Tensor], model: VisionMamba, img_size: tuple[int, int]) -> tuple[int, int]:
    """The grid of images of `img_size` by the checkpoint's patches."""
    filters = weights.get("patch_embed.proj.weight")
    patch_size = model.patch_embed.patch_size if filters is None else (filters.shape[-2], filters.shape[-1])
    return model.patch_embed.grid_of(img_size, patch_size)


def _filter_released(state_dict: dict, model: VisionMamba) -> dict[str, Tensor]:
    """`checkpoint_filter_fn` for weights of whose model timm knows the configuration, from their folder or the hub."""
    weights, grid = _native(state_dict, model), None
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    arguments: dict[str, Any] = getattr(model, "pretrained_model_args", {})  # type: ignore[assignment]
    # A file that is given in place of the weights of a folder has nothing to do with the folder's configuration.
    if cfg.get("source") in ("local-dir", "hf-hub") or not arguments:
        size = arguments.get("img_size") or cfg["input_size"][-2:]
        grid = _table_grid(weights, model, to_2tuple(size))
        # The weights know better; configurations may name the size of another model.
        if GRID in weights or patches_of(weights) != grid[0] * grid[1]:
            grid = None
    return fit_table(weights, model, grid)


def _before_loading(model: VisionMamba, state_dict: dict, prefix: str, *_) -> None:
    """Load-state-dict hook, whichever way the weights come in: official ones become native ones in place, and a
    position table of another grid is refused, also one that has as many patches."""
    mine = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if official.is_official(mine):
        for key in mine:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in checkpoint_filter_fn(mine, model).items()})
    else:
        check_table(mine, model)


def _create(variant: str, pretrained: bool, **kwargs) -> VisionMamba:
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=_filter_released,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(repo: str = "", file: str = "", **changes) -> dict:
    # Crop, mean and std are those of the authors' evaluation transform, not of their model configuration (which says
    # 0.9, 0.5 and 0.5). The hub's pages give two contradictory licences for the weights, so none is stated here.
    return {
        "hf_hub_id": repo or None,
        "hf_hub_filename": file or None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
    } | changes


default_cfgs = generate_default_cfgs(
    {
        "vim_nano.untrained": _cfg(),
        "vim_tiny.hustvl_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small.hustvl_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base.hustvl_in1k": _cfg("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
        "vim_small_registers.untrained": _cfg(paper_ids="arXiv:2405.14858"),
        "s4nd_tiny.untrained": _cfg(paper_ids="arXiv:2210.06583"),
        "vim_pixels.untrained": _cfg(input_size=(1, 28, 28), num_classes=10, crop_pct=1.0, mean=(0.5,), std=(0.5,)),
    }
)

# What sets a variant apart; keyword arguments of timm.create_model override it.
VARIANTS: dict[str, dict[str, Any]] = {
    "vim_nano": {"embed_dim": 64, "depth": 4},  # for tests and the quick start
    "vim_tiny": {"embed_dim": 192},
    "vim_tiny_stride8": {"embed_dim": 192, "patch_stride": 8},
    "vim_small": {"embed_dim": 384},
    "vim_small_stride8": {"embed_dim": 384, "patch_stride": 8},
    "vim_base": {"embed_dim": 768},
    "vim_small_registers": {"embed_dim": 384, "class_token": "registers", "register_dim": 192},
    "s4nd_tiny": {"embed_dim": 192, "mixer": "s4nd", "d_state": 64, "class_token": "none", "global_pool": "avg"},
    # A sequence of pixels, row by row; for another mixer, set it.
    "vim_pixels": {
        "img_size": 28,
        "patch_size": 1,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 4,
        "class_token": "none",
        "global_pool": "avg",
    },
}


@register_model
def vim_nano(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_nano", pretrained, **VARIANTS["vim_nano"] | kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny", pretrained, **VARIANTS["vim_tiny"] | kwargs)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny_stride8", pretrained, **VARIANTS["vim_tiny_stride8"] | kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small", pretrained, **VARIANTS["vim_small"] | kwargs)


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small_stride8", pretrained, **VARIANTS["vim_small_stride8"] | kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_base", pretrained, **VARIANTS["vim_base"] | kwargs)


@register_model
def vim_small_registers(pretrained: bool = False, **kwargs) -> VisionMamba:
    options = dict(VARIANTS["vim_small_registers"])
    if kwargs.get("class_token", "registers") != "registers":
        del options["register_dim"]
    return _create("vim_small_registers", pretrained, **options | kwargs)


@register_model
def s4nd_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("s4nd_tiny", pretrained, **VARIANTS["s4nd_tiny"] | kwargs)


@register_model
def vim_pixels(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_pixels", pretrained, **VARIANTS["vim_pixels"] | kwargs)
