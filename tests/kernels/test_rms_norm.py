"""The `torch` backend of `rms_norm` against its formula in fp64; triton_checks.py checks the kernels."""

import pytest
import torch
import torch.nn.functional as F

from vim_kernels import rms_norm


def by_formula(x, weight, gate=None, *, eps, groups=1):
    x, weight = x.double(), weight.double()
    blocks = (x if gate is None else x * F.silu(gate.double())).unflatten(-1, (groups, -1))
    return (blocks / (blocks.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("gated", "groups"), [(False, 1), (False, 4), (True, 1), (True, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float64])
def test_rounds_once(eps, gated, groups, dtype, out):
    x, weight, gate = (random(3, 5, 12, dtype=dtype, seed=i) for i in range(3))
    given = x, weight[0, 0], gate if gated else None
    y = rms_norm(*given[:2], eps, gate=given[2], groups=groups, dtype=out)
    assert y.dtype == (out or dtype)
    want = by_formula(*given, eps=eps, groups=groups)
    allowed = max(torch.finfo(y.dtype).eps, 1e-6) * want.abs() + 1e-7
    assert ((y - want).abs() <= allowed).all()


@pytest.mark.parametrize("wide", ["x", "weight", "gate"])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_tensor_in_fp64_widens_all(wide, groups, relative_error):
    """The gradient of the fp64 tensor is right to fp64 precision."""
    given = {"x": random(2, 3, 8), "weight": random(8, seed=1), "gate": random(2, 3, 8, seed=2)}
    leaves = {name: (t.double() if name == wide else t).requires_grad_() for name, t in given.items()}
    dy = random(2, 3, 8, seed=3)
    y = rms_norm(**leaves, groups=groups)
    got = [y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y))]
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    want = by_formula(**exact, eps=1e-5, groups=groups)
    want = [want, *torch.autograd.grad(want, list(exact.values()), dy.double())]
    for found, right, leaf in zip(got, want, [leaves["x"], *leaves.values()], strict=True):
        assert found.dtype == leaf.dtype
        assert relative_error(found, right) < (1e-13 if found.dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x must have a dimension"),
        ({"weight": torch.ones(1)}, r"weight must be \(channels,\) = \(8,\), got \(1,\)"),
        ({"gate": torch.ones(8)}, r"gate must be the shape of x = \(2, 3, 8\), got \(8,\)"),
        ({"weight": torch.ones(8, device="meta")}, "weight must be on the device of x, cpu, got meta"),
        ({"groups": 3}, "groups must divide the 8 channels of x, got 3"),
        ({"groups": 0}, "groups must divide the 8 channels of x, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.ones(2, 3, 8), "weight": torch.ones(8)} | change)
