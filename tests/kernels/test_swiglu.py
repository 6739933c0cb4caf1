"""`swiglu` against its formula in fp64, with gradients; on a GPU its kernels."""

import pytest
import torch
import torch.nn.functional as F
from test_fakes import assert_as_promised
from triton_checks import swiglu_excess

from vim_kernels import biased_swiglu, swiglu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("gate_dtype", "dtype"), [*DTYPES, (torch.float64, torch.float32), (torch.float64,) * 2])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1_500, 3), (1,), (0, 4)])
def test_equals_the_formula(shape, gate_dtype, dtype, device, relative_error):
    """Rounded once; strided inputs, and values whose sigmoid is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    wide = [10 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) for _ in range(3)]
    if wide[0].numel():
        wide[0].view(-1)[:2] = torch.tensor([60_000.0, -60_000.0])
    kinds = gate_dtype, dtype, dtype
    gate, x, dy = (t.to(device, kind)[..., ::2] for t, kind in zip(wide, kinds, strict=True))
    leaves = [t.detach().requires_grad_() for t in (gate, x)]
    y = swiglu(*leaves)
    assert y.dtype == dtype
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = F.silu(exact[0]) * exact[1]
    want = [want.detach(), *torch.autograd.grad(want, exact, dy.double())]
    slope = (dy.double() * x.double()).abs()  # terms of the gate's gradient, which nearly cancel where it is small
    for found, right, given, size in zip(got, want, (x, gate, x), (want[0].abs(), slope, want[2].abs()), strict=True):
        assert found.dtype == given.dtype
        rounding = 1e-14 if gate_dtype == torch.float64 else 1e-6
        allowed = torch.finfo(found.dtype).eps * right.abs() + rounding * size + 1e-7
        assert ((found - right).abs() <= allowed)[right.abs() < 6e4].all()


@pytest.mark.parametrize("on", [("cpu", "torch"), pytest.param(("cuda", "triton"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1_500, 24), (1,), (7, 1280)], ids=str)
def test_halves_with_biases(shape, dtype, limit, on):
    found = swiglu_excess(shape, dtype=dtype, device=on[0], backend=on[1], limit=limit)
    assert max(found.values()) <= 1, found


@pytest.mark.gpu
def test_is_as_its_fake_promises():
    gate, x = (torch.randn(7, 11, 40, device="cuda", dtype=torch.bfloat16)[..., :20] for _ in range(2))
    y = assert_as_promised(torch.ops.vim_kernels.swiglu, gate, x)
    assert_as_promised(torch.ops.vim_kernels.swiglu_backward, torch.ones_like(y), gate, x)
    bias = torch.randn(40, device="cuda")
    both = torch.cat((gate, x), 2)
    y = assert_as_promised(torch.ops.vim_kernels.biased_swiglu, both, bias)
    assert_as_promised(torch.ops.vim_kernels.biased_swiglu_backward, torch.ones_like(y), both, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.ones(4)}, r"gate must be the shape of x = \(2, 4\), got \(4,\)"),
        ({"gate": torch.ones(2, 4, device="meta")}, "gate must be on the device of x, cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu(**{"gate": torch.ones(2, 4), "x": torch.ones(2, 4)} | change)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 5), r"x must have an even number of channels, got \(2, 5\)"),
        (torch.ones(2, 6), r"bias must be \(2 \* channels,\) = \(6,\), got \(4,\)"),
    ],
)
def test_bad_halves_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        biased_swiglu(x, torch.ones(4))


@pytest.mark.parametrize("walks", [False, True])
def test_many_rows_fit_into_a_grid(walks):
    """CUDA allows 65,535 programs in the second dimension: one image of 224 pixels has 197 rows."""
    triton_swiglu = pytest.importorskip("vim_kernels.triton_kernels.swiglu", exc_type=ImportError)
    grid, _ = triton_swiglu._launch(torch.empty(1024 * 6085, 4096, device="meta"), walks=walks)
    assert grid[0] < 2**31
    assert grid[1] < 2**16
