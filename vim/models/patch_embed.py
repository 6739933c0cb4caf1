"""The patch embedding: from an image to a sequence of patches."""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import _assert, get_device_dtype, resample_patch_embed, to_2tuple
from torch import Tensor, nn

from vim.layers.plain import is_plain

Size = int | tuple[int, int]
Grid = tuple[int, int]  # rows and columns of patches

torch.fx.wrap("rearrange")  # FX keeps the call as a leaf; inside, einops asks for the type of the tensor


class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> patches (B, P, D), row by row. Patches may overlap.

    The grid is ((H - patch) // stride + 1) x ((W - patch) // stride + 1). Pixels that fill no patch are ignored.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        patch_stride: Size | None,
        in_chans: int,
        embed_dim: int,
        *,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self._set_sizes(img_size, patch_size, patch_size if patch_stride is None else patch_stride)
        self.strict_img_size = strict_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_stride, device=device, dtype=dtype)

    def _set_sizes(self, img_size: Size, patch_size: Size, patch_stride: Size) -> None:
        """Check all sizes, then set all of them."""
        image, patch, stride = to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(patch_stride)
        if min(patch) < 1 or min(stride) < 1:
            raise ValueError(f"patch_size and patch_stride must be positive, got {patch} and {stride}")
        if any(i < p for i, p in zip(image, patch, strict=True)):
            raise ValueError(f"img_size {image} must be at least the patch_size {patch}")
        self.img_size, self.patch_size, self.patch_stride = image, patch, stride

    @property
    def grid_size(self) -> Grid:
        return self.dynamic_feat_size(self.img_size)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Pixels between neighbouring tokens."""
        return max(self.patch_stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> Grid:
        """The grid of an image of `img_size`."""
        return self.grid_of(img_size, self.patch_size)

    def grid_of(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> Grid:
        """The grid with patches of another size. Without overlap the stride follows the patch size."""
        stride = patch_size if self.patch_stride == self.patch_size else self.patch_stride
        (h, w), (p_h, p_w), (s_h, s_w) = img_size, patch_size, stride
        return (h - p_h) // s_h + 1, (w - p_w) // s_w + 1

    @torch.no_grad()
    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, or resample the filters to another patch size.

        Without overlap the stride follows the patch size.
        """
        old, old_patch, side_by_side = self.proj, self.patch_size, self.patch_stride == self.patch_size
        patch = old_patch if patch_size is None else to_2tuple(patch_size)
        if patch != old_patch and not is_plain(old):
            raise ValueError(
                "patch_size cannot change while patch_embed.proj is wrapped or has hooks; change it before adding them"
            )
        stride = patch if side_by_side else self.patch_stride
        self._set_sizes(self.img_size if img_size is None else img_size, patch, stride)
        if patch == old_patch:
            return
        dd = get_device_dtype(self)
        proj = nn.Conv2d(old.in_channels, old.out_channels, self.patch_size, self.patch_stride, **dd)
        proj.load_state_dict({"weight": resample_patch_embed(old.weight, list(patch)), "bias": old.bias})
        for name, parameter in proj.named_parameters():
            parameter.requires_grad_(getattr(old, name).requires_grad)
        self.proj = proj.train(old.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size:
            h, w = self.img_size
            _assert(x.shape[-2] == h, f"input height must be img_size's {h}, got {x.shape[-2]}; see set_input_size")
            _assert(x.shape[-1] == w, f"input width must be img_size's {w}, got {x.shape[-1]}; see set_input_size")
        if self.patch_stride != self.patch_size or not is_plain(self.proj):
            return self.proj(x).flatten(2).transpose(1, 2)
        # Without overlap the embedding is one matrix product. cuDNN's convolution takes ten times as long in low
        # precision, because it does not use tensor cores.
        (p_h, p_w), (rows, columns) = self.patch_size, self.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = x[..., : rows * p_h, : columns * p_w]
        x = rearrange(x, "b c (rows p_h) (columns p_w) -> b (rows columns) (c p_h p_w)", p_h=p_h, p_w=p_w)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
