"""`long_conv` against the sum that defines it."""

import pytest
import torch
from triton_checks import long_conv_excess

from vim_kernels import long_conv
from vim_kernels.torch_long_conv import fft_points


@pytest.fixture(params=["fft", "matrix"])
def method(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def run(u, kernel, ahead, method):
    return long_conv(u, kernel, ahead=ahead, method=method)


@pytest.mark.parametrize(
    ("shape", "lags", "ahead"),
    [
        ((2, 9, 3), 9, 0),
        ((2, 9, 3), 17, 8),
        ((3, 70, 65), 20, 3),
        ((1, 1, 2), 1, 0),
        ((2, 5, 3, 2, 4), 8, 4),
        ((1, 1100, 4), 1100, 0),
    ],
)
def test_sums(shape, lags, ahead, method, device):
    found = long_conv_excess(run, method, shape, lags, ahead, device=device)
    assert max(found.values()) <= 1, found
    found = long_conv_excess(run, method, shape, lags, ahead, dtype=torch.float32, device=device, limit=2e-5)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, method, device):
    """Outputs are rounded once, and so is the kernel of a matrix; sums over steps and batch are not rounded."""
    eps = torch.finfo(dtype).eps
    found = long_conv_excess(run, method, (8, 256, 8), 511, 255, dtype=dtype, device=device, limit=eps)
    assert max(found["y"], found["u"]) <= 1, found
    assert found["kernel"] <= 0.5, found


def test_autocast_and_frozen_inputs(method, device):
    u, kernel = torch.randn(2, 9, 3, device=device), torch.randn(3, 9, device=device)
    y = long_conv(u, kernel, method=method)
    with torch.autocast(device, torch.bfloat16):
        assert long_conv(u, kernel, method=method).equal(y)
    for learned, frozen in ((u, kernel), (kernel, u)):
        learned.requires_grad_()
        long_conv(u, kernel, method=method).sum().backward()
        assert learned.grad.isfinite().all()
        assert frozen.grad is None
        learned.requires_grad_(False).grad = None


@pytest.mark.parametrize("wide", ["u", "kernel"])
def test_fp64_in_one_of_both(wide, device, relative_error):
    """The gradient of the fp64 tensor is right to fp64 precision."""
    given = {"u": torch.randn(2, 9, 3, device=device), "kernel": torch.randn(3, 12, device=device)}
    leaves = {name: (t.double() if name == wide else t).requires_grad_() for name, t in given.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    dy = torch.randn(2, 9, 3, device=device)
    got, want = (
        torch.autograd.grad(long_conv(**t, ahead=3), list(t.values()), dy.to(t["u"].dtype)) for t in (leaves, exact)
    )
    for found, right, leaf in zip(got, want, leaves.values(), strict=True):
        assert found.dtype == leaf.dtype
        assert relative_error(found, right) < (1e-13 if leaf.dtype == torch.float64 else 1e-7)


def test_nothing(method, device):
    kernel = torch.randn(3, 9, device=device)
    assert long_conv(torch.zeros(0, 9, 3, device=device), kernel, method=method).shape == (0, 9, 3)
    assert long_conv(torch.zeros(2, 0, 3, device=device), kernel, method=method).shape == (2, 0, 3)


def test_bad_arguments(method, device):
    u, kernel = torch.zeros(2, 9, 3, device=device), torch.zeros(3, 9, device=device)
    with pytest.raises(ValueError, match=r"u must be \(batch, length, ..., channels\), got \(9, 3\)"):
        long_conv(u[0], kernel, method=method)
    with pytest.raises(ValueError, match=r"kernel must be \(3 channels, lags\), got \(2, 9\)"):
        long_conv(u, kernel[:2], method=method)
    with pytest.raises(ValueError, match="ahead must be from 0 to 8 for a length of 9, got 9"):
        long_conv(u, kernel, ahead=9, method=method)
    with pytest.raises(ValueError, match="kernel must have 5 to 13 lags, got 4"):
        long_conv(u, kernel[:, :4], ahead=4, method=method)
    with pytest.raises(ValueError, match="kernel must have 1 to 9 lags, got 10"):
        long_conv(u, torch.zeros(3, 10, device=device), method=method)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'scan'"):
        long_conv(u, kernel, method="scan")
    with pytest.raises(TypeError, match="kernel must be a tensor"):
        long_conv(u, [1.0], method=method)


def test_fft_points():
    for length in (1, 2, 7, 197, 785, 1093, 65537):
        points = fft_points(length)
        assert 2 * length - 1 <= points < 1.1 * 2 * length + 16
        assert points % 16 == 0
        assert 60**20 % points == 0  # no prime factors but 2, 3 and 5
