"""Edge cases of the Triton kernels that need a GPU: more parts than one loop takes, mixed precision, autocast.

Shapes are those of test_triton_gpu.py where they can be, so that little is compiled.
"""

import pytest
import torch
from test_fakes import assert_as_promised
from triton_checks import conv_excess, norm_excess, scan_excess

from vim_kernels import long_conv

pytestmark = pytest.mark.gpu

CASES = {
    "norm: 2,315 tiles of rows": (norm_excess, {"shape": (37_035, 96)}),
    "norm: a gate in bf16": (norm_excess, {"shape": (77, 96), "groups": 4, "gated": torch.bfloat16, "limit": 8e-3}),
    "convolution: 70 parts of the filter's gradient": (conv_excess, {"batch": 70, "dtype": torch.float32}),
    "scan: 40 parts of A's gradient": (scan_excess, {"batch": 40, "dtype": torch.float32}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case):
    check, options = CASES[case]
    found = check(**{"limit": 1e-4, **options}, device="cuda")
    assert max(found.values()) <= 1, found


def test_norm_is_as_its_fake_promises():
    x, weight = torch.randn(7, 11, 96, device="cuda"), torch.randn(96, device="cuda")
    gate = torch.randn(7, 11, 200, device="cuda", dtype=torch.bfloat16)[..., :96]
    y = assert_as_promised(torch.ops.vim_kernels.rms_norm, x, weight, gate, 1e-5, 4, torch.float32)
    assert_as_promised(torch.ops.vim_kernels.rms_norm_backward, torch.ones_like(y), x, weight, gate, 1e-5, 4)


@pytest.mark.parametrize("method", ["fft", "matrix"])
def test_backward_of_a_long_convolution_in_autocast(method):
    leaves = [torch.randn(*shape, device="cuda").requires_grad_() for shape in ((2, 9, 3), (3, 9))]
    y = long_conv(*leaves, method=method)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with torch.autocast("cuda", torch.bfloat16):
        found = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
