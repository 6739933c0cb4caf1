"""`pre_norm`, `add_branch` and `add_and_norm` against formulas in fp64, with gradients; on a GPU their kernels."""

import pytest
import torch
from triton_checks import residual_excess

from vim_kernels import add_and_norm, add_branch, pre_norm

BACKENDS = [("cpu", "torch"), pytest.param(("cuda", "triton"), marks=pytest.mark.gpu)]
CASES = {
    "pre_norm": (pre_norm, {}),
    "the mean in front": (pre_norm, {"heading": True}),
    "the mean in front, reversed": (pre_norm, {"heading": True, "reverse": True}),
    "one token": (pre_norm, {"shape": (2, 1, 20), "heading": True, "reverse": True}),
    "fp64": (pre_norm, {"dtype": torch.float64, "heading": True, "limit": 1e-12}),
    "only the norm is used": (pre_norm, {"heading": True, "unused": ["stream"]}),
    "only the stream is used": (pre_norm, {"unused": ["y"]}),
    "add_branch": (add_branch, {}),
    "a bias": (add_branch, {"bias": True}),
    "without the mean": (add_branch, {"heading": True, "reverse": True, "bias": True}),
    "add_and_norm": (add_and_norm, {}),
    "add_and_norm, without the mean": (add_and_norm, {"heading": True}),
    "add_and_norm, reversed": (add_and_norm, {"heading": True, "reverse": True}),
    "add_and_norm, only the stream is used": (add_and_norm, {"unused": ["y"], "heading": True}),
    "add_and_norm, only the norm is used": (add_and_norm, {"unused": ["stream"]}),
    "a scale": (add_branch, {"scale": True, "bias": True}),
    "add_and_norm, a scale": (add_and_norm, {"scale": True, "heading": True, "reverse": True}),
    "a branch in fp64": (add_and_norm, {"branch_dtype": torch.float64, "out": torch.float32}),
}


@pytest.mark.parametrize("on", BACKENDS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, on):
    function, options = CASES[case]
    found = residual_excess(function, **options, device=on[0], backend=on[1])
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("on", BACKENDS, ids=str)
@pytest.mark.parametrize("function", [pre_norm, add_branch, add_and_norm], ids=lambda f: f.__name__)
def test_the_stream_keeps_its_precision(function, on):
    """Branch and norm are in bf16. The stream and its gradient are in fp32."""
    low = {"branch_dtype": torch.bfloat16, "out": torch.bfloat16, "heading": True, "reverse": True}
    found = residual_excess(function, (3, 70, 192), **low, device=on[0], backend=on[1], limit=1)
    exact = 1e-5 if on[1] == "triton" else 6e-3  # torch's norm passes a gradient on in bf16
    assert found["stream"] <= 1e-5
    assert found["d_x"] <= exact
    assert max(found.values()) <= 8e-3, found


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 197, 96), (1, 12_345, 96), (2, 3, 5000), (3000, 2, 96)], ids=str)
def test_many_and_wide_rows(shape):
    """More rows or sequences than programs, and rows of several warps. The same bits at every call."""
    for function in (pre_norm, add_and_norm):
        found = [residual_excess(function, shape, heading=True, reverse=True, device="cuda") for _ in range(2)]
        assert max(found[0].values()) <= 1, found
        assert found[0] == found[1]


X = torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pre_norm(X[0], X[0, 0]), r"x must be \(batch, length, channels\), got \(3, 8\)"),
        (lambda: pre_norm(X, X[0]), r"weight must be \(channels,\) = \(8,\), got \(3, 8\)"),
        (lambda: add_branch(X, X[:1]), r"branch must be the shape of x = \(2, 3, 8\), got \(1, 3, 8\)"),
        (lambda: add_branch(X, X, heading=True), r"branch must be \(batch, length \+ 1, channels\) = \(2, 4, 8\), got"),
        (lambda: add_branch(X, X, X[0]), r"bias must be \(channels,\) = \(8,\), got \(3, 8\)"),
        (lambda: add_branch(X, X, scale=X[0, 0]), r"scale must be \(batch,\) = \(2,\), got \(8,\)"),
        (lambda: add_branch(X, X, reverse=True), "reverse must be False without a heading, got True"),
        (lambda: add_and_norm(X, X.to("meta"), X[0, 0]), "branch must be on the device of x, cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
