"""The scan on every backend of this machine, against the fp64 reference, golden numbers and mathematical properties."""

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import pair_inputs, scan_inputs
from torch.utils.checkpoint import checkpoint

from vim_kernels import available_backends, backends, bidirectional_selective_scan, selective_scan

BACKENDS = [name for name in available_backends() if name in ("torch", "cpu")]
ALL = [*BACKENDS, "reference"]

# Odd lengths, lengths around the checkpoint interval of 32, channels and states off powers of two.
SHAPES = [
    {},
    {"length": 1},
    {"batch": 1, "length": 32, "d_inner": 5},
    {"length": 33, "d_inner": 1, "d_state": 1},
    {"length": 65, "d_inner": 130, "d_state": 3},
    {"length": 70, "d_state": 17},
    {"groups": 2, "length": 34},
    {"groups": 3, "d_inner": 33, "d_state": 5},
    {"absent": ("z",)},
    {"absent": ("D", "dt_bias", "initial_state")},
    {"absent": ("D", "z", "dt_bias", "initial_state"), "length": 64},
]


def outputs_and_gradients(inputs: dict, *, of=("y", "last_state"), **options) -> dict[str, torch.Tensor]:
    """y, last_state and the gradient of every input, for a loss with random weights for the outputs `of`."""
    y, state = selective_scan(**inputs, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    used = [t for name, t in (("y", y), ("last_state", state)) if name in of]
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in used)
    gradients = torch.autograd.grad(loss, inputs.values(), allow_unused=True, materialize_grads=True)
    return {"y": y, "last_state": state, **dict(zip(inputs, gradients, strict=True))}


def as_leaves(inputs: dict, **to) -> dict:
    return {name: t.detach().to(**to).requires_grad_() for name, t in inputs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_reference(backend, shape, reverse, relative_error):
    inputs = scan_inputs(**shape)
    want = outputs_and_gradients(inputs, reverse=reverse, backend="reference")
    got = outputs_and_gradients(inputs, reverse=reverse, backend=backend)
    for name, t in got.items():
        assert relative_error(t, want[name]) < 1e-12, name
    got = outputs_and_gradients(as_leaves(inputs, dtype=torch.float32), reverse=reverse, backend=backend)
    for name, t in got.items():
        assert t.dtype == torch.float32
        # A gradient far below 1 is a small difference of large terms here, so its error is absolute.
        assert relative_error(t, want[name]) * min(want[name].abs().max(), 1) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("of", ["y", "last_state"])
def test_gradients_of_one_output(backend, reverse, of, relative_error):
    inputs = scan_inputs(length=34, d_state=3)
    want, got = (
        outputs_and_gradients(inputs, of=(of,), reverse=reverse, backend=name) for name in ("reference", backend)
    )
    for name, t in got.items():
        assert relative_error(t, want[name]) < 1e-12 if want[name].any() else not t.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_without_softplus(backend, relative_error):
    inputs = scan_inputs(length=34, d_state=3)
    with torch.no_grad():
        inputs["dt"].abs_()
        inputs["dt_bias"].abs_()
    options = {"dt_softplus": False, "reverse": True}
    want, got = (outputs_and_gradients(inputs, **options, backend=name) for name in ("reference", backend))
    for name, t in got.items():
        assert relative_error(t, want[name]) < 1e-12, name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_softplus_keeps_its_relative_precision(backend, dtype, limit):
    """From steps far below 1 to those whose exponential overflows. One step of ones gives y = softplus(dt)."""
    dt = torch.cat([torch.linspace(-40, 40, 101), torch.tensor([1e3, -1e3])]).to(dtype)[None, None].requires_grad_()
    one = torch.ones(1, 1, 1, dtype=dtype)
    y = selective_scan(torch.ones_like(dt), dt, -torch.ones(103, 1, dtype=dtype), one, one, backend=backend)
    exact = dt.detach().double()
    torch.testing.assert_close(y.double(), F.softplus(exact), rtol=limit, atol=1e-37)
    (slope,) = torch.autograd.grad(y.sum(), dt)
    # The slope of the identity above 20 is 1, and exp(-20) is 2e-9.
    torch.testing.assert_close(slope.double(), exact.sigmoid(), rtol=max(limit, 2.1e-9), atol=1e-37)


PAIRS = [
    ({}, {}),
    ({"absent": ("z",)}, {"scale": 1.5}),
    ({"absent": ("D", "dt_bias")}, {"scale": 1.0, "dt_softplus": False}),
    ({"groups": 3, "d_state": 9}, {"scale": -3.0}),
]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("shape", "options"), PAIRS, ids=str)
def test_bidirectional_equals_two_reference_scans(backend, shape, options, relative_error):
    inputs = pair_inputs(length=45, **shape)
    softplus = options.get("dt_softplus", True)
    if not softplus:
        inputs["dt"] = tuple(t.detach().abs().requires_grad_() for t in inputs["dt"])
    z = inputs.get("z")
    pairs = {name: pair for name, pair in inputs.items() if name != "z"}
    halves = [
        selective_scan(
            **{name: pair[i] for name, pair in pairs.items()},
            dt_softplus=softplus,
            reverse=i == 1,
            backend="reference",
        )
        for i in range(2)
    ]
    want = options.get("scale", 0.5) * (halves[0] + halves[1]) * (1 if z is None else F.silu(z))
    got = bidirectional_selective_scan(**inputs, **options, backend=backend)
    assert relative_error(got, want) < 1e-12
    leaves = [*(t for pair in pairs.values() for t in pair), *([] if z is None else [z])]
    weight = torch.randn(want.shape, dtype=want.dtype)
    for g, w in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)), strict=True):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("wide", ["u", "dt", "A", "B", "C", "D", "dt_bias", "z"])
@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
def test_one_tensor_in_fp64_widens_both_directions(backend, direction, wide, others, relative_error):
    """Gradients of fp64 tensors, and y if u[0] is fp64, are right to fp64 precision."""
    inputs = pair_inputs(length=45, d_inner=9, d_state=5, dtype=others)
    leaves = {(name, i): t for name, pair in inputs.items() for i, t in enumerate(pair if name != "z" else [pair])}
    key = wide, 0 if wide == "z" else direction
    leaves[key] = leaves[key].detach().double().requires_grad_()

    def outputs(leaves, backend):
        pairs = {name: (leaves[name, 0], leaves[name, 1]) for name in inputs if name != "z"}
        y = bidirectional_selective_scan(**pairs, z=leaves["z", 0], backend=backend)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y)
        return {"y": y} | dict(zip(leaves, torch.autograd.grad((y * weight).sum(), leaves.values()), strict=True))

    want = outputs(as_leaves(leaves, dtype=torch.float64), "reference")
    for name, t in outputs(leaves, backend).items():
        assert t.dtype == (leaves["u", 0] if name == "y" else leaves[name]).dtype
        # The gradient of z uses the ungated sum, which is kept in u's dtype.
        dtypes = (t.dtype, leaves["u", 0].dtype) if name == ("z", 0) else (t.dtype,)
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        assert relative_error(t, want[name]) < (eps if eps > 1e-10 else 1e-12), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_the_eager_error(backend, dtype, relative_error):
    inputs = scan_inputs(length=50, dtype=dtype)
    want = outputs_and_gradients(as_leaves(inputs, dtype=torch.float64), backend="reference")
    eager = outputs_and_gradients(as_leaves(inputs), backend="reference")
    got = outputs_and_gradients(inputs, backend=backend)
    for name in want:
        assert got[name].dtype == eager[name].dtype
        # Eager autograd rounds a result once; the gradient of z also uses the ungated sum, kept in low precision.
        budget = 2.5 * relative_error(eager[name], want[name]) + 1e-5
        assert relative_error(got[name], want[name]) <= budget, name


@pytest.mark.parametrize("backend", ALL)
def test_golden_scan(backend, golden, relative_error):
    t = golden("g4_selective_scan")
    sequences = ("u", "delta", "B", "C", "z")
    inputs = {
        {"delta": "dt", "delta_bias": "dt_bias"}.get(k, k): (t[k].transpose(1, 2) if k in sequences else t[k])
        for k in (*sequences, "A", "D", "delta_bias")
    }
    inputs = as_leaves(inputs)
    y, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert relative_error(y, t["output_f64"].transpose(1, 2)) < 1e-5
    assert relative_error(state, t["last_state_f64"]) < 1e-5
    loss = (y * t["loss_weight"].transpose(1, 2)).sum()
    for prefix, total in (("grad_f64.", loss), ("grad_with_state_f64.", loss + (state * t["last_state_weight"]).sum())):
        gradients = torch.autograd.grad(total, inputs.values(), retain_graph=True)
        for name, got in zip(inputs, gradients, strict=True):
            official = {"dt": "delta", "dt_bias": "delta_bias"}.get(name, name)
            want = t[prefix + official]
            assert relative_error(got, want.transpose(1, 2) if official in sequences else want) < 1e-5, name


def load_ssm_scan(tensors: dict, *, complex_steps: bool) -> tuple[dict, dict]:
    """Inputs of a ssm_scan_* fixture (official layout: length last) and the gradients it wants."""

    def convert(prefix):
        out = {}
        for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
            if f"{prefix}{name}.real" in tensors:
                value = torch.complex(tensors[f"{prefix}{name}.real"], tensors[f"{prefix}{name}.imag"])
            elif f"{prefix}{name}" in tensors:
                value = tensors[f"{prefix}{name}"]
            else:
                continue
            if name in "BC" and complex_steps and prefix == "in.":  # re and im interleaved along the length
                value = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
            if value.dim() == 4:
                value = value.permute(0, 3, 1, 2)
            elif value.dim() == 3:
                value = value.transpose(1, 2)
            out[{"delta": "dt", "delta_bias": "dt_bias"}.get(name, name)] = value
        return out

    return convert("in."), convert("grad.")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["real", "groups", "fixedBC", "complex"])
def test_golden_forms(backend, name, golden, relative_error):
    t = golden(f"ssm_scan_{name}")
    inputs, gradients = load_ssm_scan(t, complex_steps=name == "complex")
    inputs = as_leaves(inputs)
    options = {"dt_softplus": name != "fixedBC", "return_last_state": True, "backend": backend}
    if name in ("fixedBC", "complex") and backend != "reference":
        with pytest.raises(ValueError, match=r"only backend='reference' takes|only with backend='reference'"):
            selective_scan(**inputs, **options)
        return
    y, state = selective_scan(**inputs, **options)
    assert relative_error(y, t["out.y"].transpose(1, 2)) < 1e-5
    if name == "complex":
        want_state = torch.complex(t["out.last_state.real"], t["out.last_state.imag"])
    else:
        want_state = t["out.last_state"]
    assert relative_error(state, want_state) < 1e-5
    got = torch.autograd.grad((y * t["in.cotangent"].transpose(1, 2)).sum(), inputs.values())
    for key, g in zip(inputs, got, strict=True):
        want = gradients[key]
        if name == "complex" and key in "BC":
            # The fixture differentiates by the interleaved real numbers: the parts of our complex gradient.
            g = torch.view_as_real(g.transpose(1, 2)).flatten(-2).transpose(1, 2)
        assert relative_error(g, want) < 1e-4, key


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("absent", [(), ("D", "z", "dt_bias", "initial_state")], ids=["all", "none"])
def test_gradcheck(backend, absent):
    inputs = scan_inputs(1, 35, 3, 2, absent=absent)
    names = list(inputs)

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_equals_split_and_reverse_equals_flip(backend, relative_error):
    inputs = scan_inputs(length=53)
    whole, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    sequences = {name for name, t in inputs.items() if t.dim() >= 3 and name != "initial_state"}
    state, parts = inputs.pop("initial_state"), []
    for start, stop in ((0, 20), (20, 21), (21, 53)):
        part = {name: t[:, start:stop] if name in sequences else t for name, t in inputs.items()}
        y, state = selective_scan(**part, initial_state=state, return_last_state=True, backend=backend)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-12
    assert relative_error(state, last) < 1e-12

    flipped = {name: t.flip(1) if name in sequences else t for name, t in inputs.items()}
    forward = selective_scan(**inputs, backend=backend)
    backward = selective_scan(**flipped, reverse=True, backend=backend)
    assert relative_error(backward.flip(1), forward) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality(backend):
    inputs = scan_inputs(length=40)
    later = {name: t.detach().clone() if t.dim() >= 3 and name != "initial_state" else t for name, t in inputs.items()}
    for name in ("u", "dt", "B", "C", "z"):
        later[name][:, 25:] += 1
    a, b = (selective_scan(**kwargs, backend=backend) for kwargs in (inputs, later))
    assert torch.equal(a[:, :25], b[:, :25])
    assert not torch.equal(a[:, 25:], b[:, 25:])
    a, b = (selective_scan(**kwargs, reverse=True, backend=backend) for kwargs in (inputs, later))
    assert not torch.equal(a[:, :25], b[:, :25])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}], ids=str)
def test_empty(backend, shape):
    inputs = scan_inputs(**shape)
    got = outputs_and_gradients(inputs, backend=backend)
    assert got["y"].shape == inputs["u"].shape
    assert torch.equal(got["last_state"], inputs["initial_state"])
    assert all(got[name].shape == t.shape for name, t in inputs.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, relative_error):
    """Slices of wider tensors, as from in_proj and x_proj; expanded and transposed tensors."""
    inputs = {name: t.detach() for name, t in scan_inputs(length=40).items()}
    want = selective_scan(**inputs, backend=backend)
    xz = torch.cat([inputs["u"], inputs["z"]], -1)
    u, z = xz.chunk(2, -1)
    dt, B, C = torch.cat([inputs["dt"], inputs["B"], inputs["C"]], -1).split([24, 16, 16], -1)
    inputs["A"] = inputs["A"].t().contiguous().t()
    inputs["initial_state"] = inputs["initial_state"].transpose(0, 1).contiguous().transpose(0, 1)
    got = selective_scan(**inputs | {"u": u, "z": z, "dt": dt, "B": B, "C": C}, backend=backend)
    assert relative_error(got, want) < 1e-14
    lengthwise = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "dt", "z")}
    assert relative_error(selective_scan(**inputs | lengthwise, backend=backend), want) < 1e-14
    one = inputs["B"][:1].expand(2, -1, -1)
    expanded = selective_scan(**inputs | {"B": one}, backend=backend)
    assert relative_error(expanded, selective_scan(**inputs | {"B": one.contiguous()}, backend=backend)) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend, relative_error):
    inputs = scan_inputs(length=66, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"][:, ::3] = 100.0  # softplus is linear, the state forgets everything
        inputs["dt"][:, 1::3] = -100.0  # an identity step
        inputs["u"][:, ::5] *= 1e4
        inputs["z"][:, ::2] *= 100
    want = outputs_and_gradients(as_leaves(inputs, dtype=torch.float64), backend="reference")
    got = outputs_and_gradients(inputs, backend=backend)
    for name, t in got.items():
        assert torch.isfinite(t).all(), name
        assert relative_error(t, want[name]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Schema, fake kernel, autograd registration and AOT dispatch of the operator."""
    inputs = scan_inputs(length=34, dtype=torch.float32, groups=1)
    z = inputs.pop("z")
    columns = [[inputs[n]] for n in ("u", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")]
    args = (*columns, z, None, [False], True, 1.0, True, backend)
    torch.library.opcheck(torch.ops.vim_kernels.selective_scan, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend, relative_error):
    inputs = scan_inputs(length=33, dtype=torch.float32)
    options = {"backend": backend, "return_last_state": True}
    eager = selective_scan(**inputs, **options)
    compiled = torch.compile(lambda kwargs: selective_scan(**kwargs, **options), fullgraph=True, backend="aot_eager")
    traced = compiled(inputs)
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)
    leaves = list(inputs.values())
    grads = (torch.autograd.grad(y.square().sum() + s.sum(), leaves) for y, s in (eager, traced))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-6


def test_exports_with_a_dynamic_batch():
    class Scan(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return selective_scan(u, dt, A, B, C)

    names = ("u", "dt", "A", "B", "C")
    example, other = (tuple(scan_inputs(batch=b, dtype=torch.float32)[n].detach() for n in names) for b in (2, 5))
    batch = torch.export.Dim("batch")
    shapes = {name: None if name == "A" else {0: batch} for name in names}
    program = torch.export.export(Scan(), example, dynamic_shapes=shapes)
    assert torch.equal(program.module()(*other), selective_scan(*other))


def test_runs_on_meta():
    inputs = {name: t.to("meta") for name, t in scan_inputs(dtype=torch.bfloat16).items()}
    y, state = selective_scan(**inputs, return_last_state=True)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, inputs["u"].shape)
    assert (state.dtype, state.shape) == (torch.float32, inputs["initial_state"].shape)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_takes_mixed_dtypes_under_autocast(backend, relative_error):
    """Autocast must not touch the operator or its backward: A in bf16 would be wrong by percents."""
    inputs = scan_inputs(length=50, dtype=torch.bfloat16)
    inputs["u"] = inputs["u"].detach().float().requires_grad_()
    want = outputs_and_gradients(as_leaves(inputs, dtype=torch.float64), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(inputs, backend=backend)
    assert got["y"].dtype == torch.float32
    for name in ("y", "last_state", "u", "A", "D"):
        assert relative_error(got[name], want[name]) < 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    inputs = scan_inputs(length=40)
    names = list(inputs)

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), backend=backend)

    def gradients(y):
        for t in inputs.values():
            t.grad = None
        y.sum().backward()
        return [t.grad for t in inputs.values()]

    plain = gradients(scan(*inputs.values()))
    recomputed = gradients(checkpoint(scan, *inputs.values(), use_reentrant=reentrant))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


WRONG = [
    ({"u": torch.zeros(2, 37)}, ValueError, r"u must be \(batch, length, d_inner\), got \(2, 37\)"),
    ({"dt": torch.zeros(2, 37, 23)}, ValueError, r"dt must be the shape of u, .* \(2, 37, 24\), got \(2, 37, 23\)"),
    ({"A": torch.zeros(23, 16)}, ValueError, r"A must be \(d_inner, d_state\) with d_inner = 24, got \(23, 16\)"),
    ({"A": torch.zeros(24, 16, dtype=torch.bfloat16)}, TypeError, "A must be fp32 or fp64 .* got torch.bfloat16"),
    ({"A": torch.zeros(24, 16, dtype=torch.complex64)}, ValueError, "A is complex: .* got backend='auto'"),
    ({"u": torch.zeros(2, 37, 24, dtype=torch.complex64)}, ValueError, "u is complex: only A, B, C"),
    ({"z": torch.zeros(2, 37, 24, dtype=torch.complex64)}, ValueError, "z is complex: only A, B, C"),
    (
        {"A": torch.zeros(24, 0), "B": torch.zeros(2, 37, 0)},
        ValueError,
        "A must have at least one state a channel, got",
    ),
    ({"B": torch.zeros(2, 37, 15)}, ValueError, r"B must be \(batch, length, d_state\) = \(2, 37, 16\), got"),
    ({"B": torch.zeros(2, 37, 5, 16)}, ValueError, r"B must have groups that divide d_inner = 24 evenly, got"),
    ({"C": torch.zeros(2, 37, 2, 16)}, ValueError, r"C must have the shape of B, \(2, 37, 16\), got \(2, 37, 2, 16\)"),
    ({"B": torch.zeros(24, 16)}, ValueError, "B is constant in time"),
    ({"D": torch.zeros(23)}, ValueError, r"D must be \(d_inner,\) = \(24,\), got \(23,\)"),
    ({"dt_bias": torch.zeros(24, 1)}, ValueError, "dt_bias must be"),
    ({"z": torch.zeros(2, 37, 48)}, ValueError, "z must be the shape of u"),
    ({"z": torch.zeros(2, 37, 24, dtype=torch.int64)}, TypeError, "z must have a dtype of .* got torch.int64"),
    ({"D": torch.zeros(24, device="meta")}, ValueError, "D must be on the device of u, cpu, got meta"),
    ({"initial_state": torch.zeros(2, 24, 15)}, ValueError, "initial_state must be"),
    ({"D": [1.0] * 24}, TypeError, "D must be a tensor, got list"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .*'triton'.*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[m[:24] for *_, m in WRONG])
def test_bad_arguments_are_named(change, error, message):
    inputs = scan_inputs(dtype=torch.float32)
    with pytest.raises(error, match=message):
        selective_scan(**inputs | change)


def test_bad_pairs_are_named():
    inputs = pair_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"B must be a pair of tensors \(forward, reverse\), got a tensor of shape"):
        bidirectional_selective_scan(**inputs | {"B": inputs["B"][0]})
    with pytest.raises(ValueError, match="D must be a pair of tensors"):
        bidirectional_selective_scan(**inputs | {"D": (inputs["D"][0], None)})
    with pytest.raises(ValueError, match=r"C\[1\] must be"):
        bidirectional_selective_scan(**inputs | {"C": (inputs["C"][0], inputs["C"][1][:1])})


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"length": 36}, r"u\[1\] must have the shape of u\[0\], \(2, 37, 24\), got \(2, 36, 24\)"),
        ({"d_state": 8}, r"A\[1\] must have the shape of A\[0\], \(24, 16\), got \(24, 8\)"),
        ({"groups": 2}, r"B\[1\] must have the shape of B\[0\], \(2, 37, 1, 16\), got \(2, 37, 2, 16\)"),
    ],
)
def test_directions_of_other_sizes_are_refused(backend, second, message):
    """A kernel gets one length, one d_state and one number of groups."""
    first, other = (pair_inputs(**shape, absent=("z",), dtype=torch.float32) for shape in ({}, second))
    with pytest.raises(ValueError, match=message):
        bidirectional_selective_scan(**{n: (first[n][0], other[n][1]) for n in first}, backend=backend)


def test_auto_takes_the_fastest_and_logs_it(caplog):
    backends._fastest.cache_clear()
    inputs = scan_inputs(length=70, dtype=torch.float32)
    with caplog.at_level("INFO", "vim_kernels"):
        found, _ = (selective_scan(**inputs) for _ in range(2))
    fastest = BACKENDS[0]
    assert torch.equal(found, selective_scan(**inputs, backend=fastest))
    assert fastest == "torch" or not torch.equal(found, selective_scan(**inputs, backend="torch"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"backend {fastest!r} for tensors on cpu"
    ]


def test_devices_without_kernels_of_their_own_take_torchs():
    for device in ("mps", "xpu", "meta"):
        assert backends.resolve("auto", torch.device(device)) == "torch"


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")
def test_the_cpu_backend_takes_tensors_of_the_cpu():
    inputs = {name: t.to("meta") for name, t in scan_inputs(dtype=torch.float32).items()}
    with pytest.raises(RuntimeError, match="backend 'cpu' takes CPU tensors, got tensors on meta; use backend='auto'"):
        selective_scan(**inputs, backend="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: there is no GPU"):
        selective_scan(**scan_inputs(dtype=torch.float32), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_close_to_one_do_not_drift(backend):
    """A state decays through 4,096 steps as exactly as fp32 allows."""
    length, rates = 4096, torch.logspace(-6, -1.7, 64, dtype=torch.float64)
    u = torch.zeros(1, length, 64)
    u[:, 0] = 1
    one = torch.ones(1, length, 1)
    y = selective_scan(u, torch.ones_like(u), -rates.float().unsqueeze(1), one, one, dt_softplus=False, backend=backend)
    expected = torch.exp(-rates.float().double() * (length - 1))
    # A step rounds the decay and the product, each by 2^-24 of its value.
    assert ((y[0, -1] - expected) / expected).abs().max() < 2 * length * 2**-24
