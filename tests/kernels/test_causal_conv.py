"""The causal convolution on every backend of this machine, against torch's own conv1d in fp64."""

import pytest
import torch
import torch.nn.functional as F

from vim_kernels import available_backends, bidirectional_causal_conv1d, causal_conv1d

ALL = [name for name in available_backends() if name != "triton"]


def conv_inputs(batch=2, length=37, channels=24, width=4, *, absent=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    tensors = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items() if name not in absent}


def by_torch(x, weight, bias=None, initial_state=None, *, activation=None, reverse=False):
    """The same by F.conv1d: channel-first, padded on the left."""
    x = x.flip(1) if reverse else x
    past = torch.zeros_like(x[:, :1]).expand(-1, weight.shape[1] - 1, -1) if initial_state is None else initial_state
    padded = torch.cat([past, x], 1)
    y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    y = F.silu(y) if activation == "silu" else y
    final_state = padded[:, padded.shape[1] - weight.shape[1] + 1 :]
    return (y.flip(1) if reverse else y), final_state


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"length": 1},
        {"length": 2, "channels": 1},
        {"batch": 1, "length": 65, "channels": 130, "width": 3},
        {"width": 1, "channels": 5},
        {"absent": ("initial_state",)},
        {"absent": ("bias", "initial_state"), "width": 7},
    ],
    ids=str,
)
def test_equals_conv1d(backend, reverse, activation, shape, relative_error):
    inputs = conv_inputs(**shape)
    options = {"activation": activation, "reverse": reverse}

    def outputs_and_gradients(function, dtype=torch.float64, **more):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
        outputs = function(**leaves, **options, **more)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for t in outputs
        )
        return [*outputs, *torch.autograd.grad(loss, leaves.values())]

    want = outputs_and_gradients(by_torch)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = outputs_and_gradients(causal_conv1d, dtype, return_final_state=True, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < limit, dtype


@pytest.mark.parametrize("backend", ALL)
def test_low_precision_and_strides(backend, relative_error):
    """x as the first half of in_proj's output, under autocast: bf16 with fp32 weights."""
    inputs = {name: t.detach() for name, t in conv_inputs(dtype=torch.float32, absent=("initial_state",)).items()}
    xz = torch.cat([inputs["x"], inputs["x"] + 1], -1).bfloat16().requires_grad_()
    x = xz.chunk(2, -1)[0]
    want, _ = by_torch(x.double(), inputs["weight"].double(), inputs["bias"].double(), activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        got = causal_conv1d(x, inputs["weight"], inputs["bias"], activation="silu", backend=backend)
        state = torch.zeros(2, 3, 24)
        _, final = causal_conv1d(x, inputs["weight"], initial_state=state, return_final_state=True, backend=backend)
    assert got.dtype == final.dtype == torch.bfloat16
    assert torch.equal(final, x[:, -3:])
    assert relative_error(got, want) < 2**-8
    (a,), (b,) = (torch.autograd.grad(y.sum(), xz) for y in (got, want))
    assert relative_error(a, b) < 2**-7


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}], ids=str)
def test_empty(backend, shape):
    inputs = conv_inputs(**shape)
    y, state = causal_conv1d(**inputs, return_final_state=True, backend=backend)
    assert y.shape == inputs["x"].shape
    assert torch.equal(state, inputs["initial_state"])
    gradients = torch.autograd.grad(y.sum() + state.sum(), inputs.values(), allow_unused=True, materialize_grads=True)
    assert all(g.shape == t.shape for g, t in zip(gradients, inputs.values(), strict=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reverse", [False, True])
def test_whole_equals_split(backend, reverse, relative_error):
    inputs = conv_inputs(length=20)
    x = inputs.pop("x")
    state = inputs.pop("initial_state")
    options = {**inputs, "activation": "silu", "reverse": reverse, "return_final_state": True, "backend": backend}
    whole, last = causal_conv1d(x, initial_state=state, **options)
    parts = []
    spans = [(0, 2), (2, 3), (3, 20)]
    for start, stop in [(20 - b, 20 - a) for a, b in spans] if reverse else spans:
        y, state = causal_conv1d(x[:, start:stop], initial_state=state, **options)
        parts.append(y)
    assert relative_error(torch.cat(parts[::-1] if reverse else parts, 1), whole) < 1e-14
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", [name for name in ALL if name != "reference"])
def test_gradcheck_and_opcheck(backend):
    """One direction with an initial state, and two; lists of tensors are flattened for gradcheck."""
    x, weight, bias, state = conv_inputs(1, 6, 3).values()
    _, other_weight, other_bias, _ = conv_inputs(1, 6, 3, seed=1).values()
    op = torch.ops.vim_kernels.causal_conv1d
    assert torch.autograd.gradcheck(
        lambda *t: op(t[0], [t[1]], [t[2]], t[3], None, True, [True], backend)[0], (x, weight, bias, state)
    )
    assert torch.autograd.gradcheck(
        lambda *t: tuple(op(t[0], [*t[1:3]], [*t[3:]], None, None, True, [False, True], backend)),
        (x, weight, other_weight, bias, other_bias),
    )
    torch.library.opcheck(op, (x, [weight], [bias], state, None, True, [True], backend))
    torch.library.opcheck(op, (x, [weight, other_weight], [], None, None, False, [False, True], backend))


@pytest.mark.parametrize("backend", ALL)
def test_both_directions_at_once(backend, relative_error):
    """Equals one call per direction. The gradient of x is the sum of both, also if one output is unused."""
    x, *first = conv_inputs(length=9, absent=("initial_state",)).values()
    _, *second = conv_inputs(length=9, absent=("initial_state",), seed=1).values()
    pairs = list(zip(first, second, strict=True))
    got = bidirectional_causal_conv1d(x, *pairs, activation="silu", backend=backend)
    want = [
        causal_conv1d(x, *f, activation="silu", reverse=i == 1, backend=backend) for i, f in enumerate((first, second))
    ]
    leaves = [x, *first, *second]
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-14
    for used in ((0, 1), (0,), (1,)):
        losses = [sum((outputs[i] ** 2).sum() for i in used) for outputs in (got, want)]
        found, expected = (
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for loss in losses
        )
        for g, w in zip(found, expected, strict=True):
            assert relative_error(g, w) < 1e-13 if w.any() else not g.any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("wide", range(5))
def test_one_tensor_in_fp64_widens_all(backend, pair, wide, relative_error):
    """Gradients of fp64 tensors, and y if x is fp64, are right to fp64 precision."""
    x, weight, bias, state = conv_inputs(length=9, dtype=torch.float32).values()
    leaves = [x, weight, bias, *((weight * 2, bias * 2) if pair else (state,))]
    leaves = [t.detach().requires_grad_() for t in leaves][:5]
    wide = min(wide, len(leaves) - 1)
    leaves[wide] = leaves[wide].detach().double().requires_grad_()

    def outputs(leaves, backend):
        options = {"activation": "silu", "backend": backend}
        if pair:
            y = torch.stack(bidirectional_causal_conv1d(leaves[0], leaves[1::2], leaves[2::2], **options))
        else:
            y = causal_conv1d(*leaves[:3], initial_state=leaves[3], **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    want = outputs([t.detach().double().requires_grad_() for t in leaves], "reference")
    for got, right, leaf in zip(outputs(leaves, backend), want, [x if wide else leaves[0], *leaves], strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, right) < (1e-13 if got.dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("pair", [("weight", None), ("bias", None), ("weight", "tensor")])
def test_bad_pairs_are_named(pair):
    inputs = conv_inputs(dtype=torch.float32, absent=("initial_state",))
    x, pairs = inputs.pop("x"), {name: (t, t) for name, t in inputs.items()}
    name, second = pair
    pairs[name] = inputs[name] if second else (inputs[name], None)
    with pytest.raises(ValueError, match=rf"{name} must be a pair of tensors \(forward, reverse\), got"):
        bidirectional_causal_conv1d(x, **pairs)


@pytest.mark.parametrize("backend", ALL)
def test_filters_of_two_widths_are_refused(backend):
    x, weight = torch.zeros(2, 9, 24), torch.zeros(24, 4)
    with pytest.raises(ValueError, match=r"weight\[1\] must be the shape of weight\[0\] = \(24, 4\), got \(24, 3\)"):
        bidirectional_causal_conv1d(x, (weight, weight[:, 1:]), backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation must be None or 'silu', got 'relu'"),
        ({"x": torch.zeros(2, 24)}, ValueError, r"x must be \(batch, length, channels\), got \(2, 24\)"),
        ({"weight": torch.zeros(24, 1, 4)}, ValueError, r"weight must be \(channels, width\) .* got \(24, 1, 4\)"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias must be \(channels,\) = \(24,\), got \(23,\)"),
        ({"initial_state": torch.zeros(2, 4, 24)}, ValueError, "initial_state must be"),
        ({"weight": torch.zeros(24, 4, dtype=torch.int32)}, TypeError, "weight must have a dtype"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**conv_inputs(dtype=torch.float32) | change)
