"""A block of Vim, Mamba-R or VideoMamba runs in one call on a CPU without gradients, unless a module must be called."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import vim.layers.bimamba
from vim.layers import BiMamba, Mamba
from vim.models.block import Block
from vim_kernels.backends import unavailable

pytestmark = pytest.mark.skipif(unavailable("cpu") is not None, reason="needs a C compiler")


@pytest.fixture
def calls(monkeypatch) -> list:
    """The calls of the kernel."""
    seen, kernel = [], vim.layers.bimamba.bimamba_block
    monkeypatch.setattr(vim.layers.bimamba, "bimamba_block", lambda *a, **k: (seen.append(a), kernel(*a, **k))[1])
    return seen


def block_of(mixer: nn.Module | None = None) -> Block:
    torch.manual_seed(0)
    block = Block(16, mixer or BiMamba(16, scale=0.7), 0.1, dtype=torch.float64).to(torch.float64).eval()
    nn.init.uniform_(block.norm.weight, 0.5, 2)
    return block


def tokens() -> torch.Tensor:
    return torch.randn(2, 19, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vim_tiny", "mambar_tiny", "videomamba_tiny"])
def test_a_model_gives_the_same(name, calls):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, depth=3, num_classes=5).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = model(images)
    assert not calls
    with torch.no_grad():
        found = model(images)
    assert len(calls) == 3
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_hooks_fire_on_every_module(calls):
    block, x = block_of(), tokens()
    want = block(x)
    assert len(calls) == 1
    for name, module in block.named_modules():
        if name in ("", "mixer.forward_ssm", "mixer.backward_ssm"):  # the block is called; the other two never are
            continue
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)
        handle.remove()
        assert seen, name
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("place", ["norm", "mixer.in_proj", "mixer.backward_ssm.dt_proj", "mixer"])
def test_another_forward_is_called(place, calls):
    block = block_of()
    module = block.get_submodule(place)
    module.forward = lambda x, forward=module.forward: 1.5 * forward(x)
    block(tokens())
    assert not calls


@torch.no_grad()
def test_other_mixers_norms_and_paths_are_called(calls):
    x = tokens()
    own = block_of(type("Own", (BiMamba,), {})(16))
    layer_norm = block_of()
    layer_norm.norm = nn.LayerNorm(16, dtype=torch.float64)
    for block in (block_of(Mamba(16)), own, layer_norm):
        block(x)
    assert not calls


def test_training_drops_paths(calls):
    block, x = block_of().train(), tokens()
    block.drop_path = DropPath(1.0)
    with torch.no_grad():
        assert torch.equal(block(x), x)
    assert not calls


@torch.no_grad()
def test_scan_orders_are_kept(calls):
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny", img_size=32, depth=2, num_classes=5, scan_order="cross").eval()
    images = torch.randn(1, 3, 32, 32)
    found = model(images)
    assert len(calls) == 1
    with torch.enable_grad():
        torch.testing.assert_close(found, model(images).detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exported_program_keeps_the_operators(calls):
    block, x = block_of(), tokens()
    program = torch.export.export(block, (x,))
    assert "vim_kernels.selective_scan" in str(program.graph)
    assert not calls
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-12, atol=1e-12)
