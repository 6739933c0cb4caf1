"""Exported programs of ATen operators against the specification in fp64."""

import pytest
import torch
from scan_inputs import pair_inputs, scan_inputs
from ssd_inputs import inputs as ssd_inputs
from ssd_inputs import recurrence
from torch import nn
from torch.testing import assert_close

from vim_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan
from vim_kernels.decompositions import decompositions


class Call(nn.Module):
    """A function of keyword arguments as a module."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, inputs):
        return self.function(**inputs, **self.options)


def exported(function, inputs, *, loop, **options):
    with torch.no_grad():
        program = torch.export.export(Call(function, **options), (inputs,))
        program = program.run_decompositions(decompositions(loop=loop))
    assert "vim_kernels" not in str(program.graph)
    if not loop:
        assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    return program.module()(inputs)


def detached(inputs):
    return {k: tuple(t.detach() for t in v) if isinstance(v, tuple) else v.detach() for k, v in inputs.items()}


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"groups": 3}, {"reverse": True}),
        ({"length": 1, "batch": 1}, {}),
        ({"length": 2, "absent": ("D", "z", "dt_bias", "initial_state")}, {"dt_softplus": False}),
        ({"length": 65, "d_state": 1, "d_inner": 2}, {"reverse": True}),
    ],
    ids=str,
)
def test_scan(loop, shape, options):
    inputs = detached(scan_inputs(**shape))
    if not options.get("dt_softplus", True):
        inputs["dt"] = inputs["dt"].abs()
    options = options | {"return_last_state": True}
    found = exported(selective_scan, inputs, loop=loop, **options)
    expected = selective_scan(**inputs, **options, backend="reference")
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"), [({}, {}), ({"groups": 2, "length": 1}, {"scale": 1.0, "dt_softplus": False})], ids=str
)
def test_two_directions(loop, shape, options):
    inputs = detached(pair_inputs(**shape))
    expected = bidirectional_selective_scan(**inputs, **options, backend="reference")
    found = exported(bidirectional_selective_scan, inputs, loop=loop, **options)
    assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("loop", [False, True])
def test_low_precision_is_rounded_once(loop):
    """Outputs keep the operators' dtypes: the rest of the program was traced with them."""
    inputs = detached(scan_inputs(length=5, dtype=torch.bfloat16))
    found = exported(selective_scan, inputs, loop=loop, return_last_state=True)
    expected = selective_scan(**inputs, return_last_state=True, backend="reference")
    assert_close(found, expected, atol=0, rtol=1e-2)
    inputs = {"x": inputs["u"], "weight": torch.randn(24, 4), "bias": torch.randn(24)}
    expected = causal_conv1d(**inputs, backend="reference")
    assert_close(exported(causal_conv1d, inputs, loop=loop), expected, atol=0, rtol=1e-2)


def test_small_and_large_steps_keep_their_relative_precision():
    """In fp32 log(1 + exp(dt)) has an absolute error of 1e-7, which leaves three digits of a step of 1e-4."""
    length = 64
    dt = torch.linspace(-16, 60, length)[None, :, None]
    ones = {"u": torch.ones_like(dt), "A": -torch.full((1, 1), 1e4), "B": torch.ones_like(dt), "C": torch.ones_like(dt)}
    inputs = {"dt": dt, **ones}  # such a decay forgets the past: y is the step itself
    y = exported(selective_scan, inputs, loop=False)
    expected = selective_scan(**{k: t.double() for k, t in inputs.items()}, backend="reference")
    assert_close(y.double(), expected, atol=0, rtol=5e-6)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("length", [1, 37])
def test_packed_sequences(loop, length):
    """Chunks of 4 steps: some without a cut, some with one, one with a cut at its first step, one with two cuts."""
    seq_idx = torch.zeros(2, length, dtype=torch.int64)
    seq_idx[0, 8:] = 1
    seq_idx[0, 21:23] = 2
    seq_idx[1, 36:] = 1
    packed = {"seq_idx": seq_idx}
    inputs = detached(scan_inputs(length=length, groups=3)) | packed
    for reverse in (False, True):
        options = {"reverse": reverse, "return_last_state": True}
        found = exported(selective_scan, inputs, loop=loop, **options)
        for f, e in zip(found, selective_scan(**inputs, **options, backend="reference"), strict=True):
            assert_close(f, e, atol=1e-11, rtol=1e-11)
    inputs = detached(pair_inputs(length=length)) | packed
    expected = bidirectional_selective_scan(**inputs, backend="reference")
    assert_close(exported(bidirectional_selective_scan, inputs, loop=loop), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 0, 0, 0, 0, 2, 2], [0] * 9])], ids=["", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_convolution(reverse, seq_idx):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 9, 6), "weight": (6, 4), "bias": (6,), "initial_state": (2, 3, 6)}
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    packed = {} if seq_idx is None else {"seq_idx": seq_idx}
    inputs |= packed
    options = {"reverse": reverse, "activation": "silu", "return_final_state": True}
    found = exported(causal_conv1d, inputs, loop=False, **options)
    for f, e in zip(found, causal_conv1d(**inputs, **options, backend="reference"), strict=True):
        assert_close(f, e)
    pair = {"x": inputs["x"], "weight": (inputs["weight"], -inputs["weight"])} | packed
    for given in (pair, pair | {"bias": (inputs["bias"], 2 * inputs["bias"])}):
        for f, e in zip(
            exported(bidirectional_causal_conv1d, given, loop=False),
            bidirectional_causal_conv1d(**given, backend="reference"),
            strict=True,
        ):
            assert_close(f, e)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_duality(reverse, last):
    inputs = detached(ssd_inputs(37))

    def operator(**given):
        return torch.ops.vim_kernels.ssd(*given.values(), True, reverse, 16, "cpu", last)

    y, state = exported(operator, inputs, loop=False)
    expected, last_state = recurrence(**inputs, reverse=reverse)
    assert_close(y, expected, atol=1e-11, rtol=1e-11)
    assert_close(state, last_state if last else last_state.new_empty(0), atol=1e-11, rtol=1e-11)


def test_a_scan_exported_for_training_is_refused():
    inputs = scan_inputs(length=3)
    program = torch.export.export(Call(selective_scan), (inputs,))
    with pytest.raises(RuntimeError, match="under torch"):
        program.run_decompositions(decompositions())
