"""Errors of the Triton backend against the fp64 reference: shared by the tests on a GPU and in Triton's interpreter."""

import functools

import torch
from scan_inputs import pair_inputs, scan_inputs
from ssd_inputs import inputs, recurrence

from vim_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan, ssd


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest wanted value; NaN if there is a NaN."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.is_contiguous()
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item() if want.numel() else 0.0


def flat(inputs: dict) -> dict[str, torch.Tensor]:
    """Pairs as name[0] and name[1]."""
    out = {}
    for name, t in inputs.items():
        out |= {name: t} if isinstance(t, torch.Tensor) else {f"{name}[{i}]": item for i, item in enumerate(t)}
    return out


def leaves(inputs: dict, **to) -> dict:
    """The same values as new leaves, converted with `to` (the arguments of Tensor.to)."""

    def leaf(t):
        moved = t.detach().to(**to)
        return (moved.clone() if moved.data_ptr() == t.data_ptr() else moved).requires_grad_()

    return {k: leaf(t) if isinstance(t, torch.Tensor) else tuple(map(leaf, t)) for k, t in inputs.items()}


def turned(inputs: dict, *names: str) -> dict:
    """The same values; the named tensors have their last dimension outermost in memory, like transposed ones."""
    return inputs | {
        name: t.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
        if t.dim() > 1
        # Every second element.
        else t.detach().repeat_interleave(2)[::2].requires_grad_()
        for name, t in inputs.items()
        if name in names
    }


def results(function, inputs: dict, **options) -> dict[str, torch.Tensor]:
    """Outputs of `function` and the gradient of each input, for a loss with random weights for all outputs."""
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    # Weights that are exact in every dtype, so that all precisions differentiate the same loss.
    weights = (torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs)
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    sources = flat(inputs)
    gradients = torch.autograd.grad(loss, sources.values(), allow_unused=True, materialize_grads=True)
    return {f"out{i}": t.detach() for i, t in enumerate(outputs)} | dict(zip(sources, gradients, strict=True))


def excess(function, inputs: dict, *, limit: float | None = None, **options) -> dict[str, float]:
    """For each output and gradient, its error as a fraction of what is allowed: `limit` or, without one, the budget.

    The budget is twice the error of an eager run of the reference in the inputs' own dtypes plus a unit in the last
    place of the largest value: eager rounds a result once, the backend also the y of each direction and their sum.
    """
    want = results(function, leaves(inputs, dtype=torch.float64), **options, backend="reference")
    got = results(function, inputs, **options, backend="triton")
    if limit is not None:
        return {name: error(got[name], want[name]) / limit for name in want}
    eager = results(function, leaves(inputs), **options, backend="reference")
    assert all(got[name].dtype == eager[name].dtype for name in want)
    budgets = {
        name: 2 * error(t.contiguous(), want[name]) + torch.finfo(t.dtype).eps + 1e-5 for name, t in eager.items()
    }
    return {name: error(got[name], want[name]) / budget for name, budget in budgets.items()}


def packed(rows: list[list[int]] | None, device="cpu") -> dict[str, torch.Tensor]:
    """The argument seq_idx for sequences of these lengths, 1, 0, 1, 0, ..., or no argument."""
    if rows is None:
        return {}
    numbers = [[(i + 1) % 2 for i, n in enumerate(row) for _ in range(n)] for row in rows]
    return {"seq_idx": torch.tensor(numbers, device=device)}


def scan_excess(
    *, limit: float | None = None, reverse: bool = False, rows=None, dt_softplus=True, strided=False, **shape
) -> dict[str, float]:
    options = {"reverse": reverse, "return_last_state": True, "dt_softplus": dt_softplus}
    inputs = scan_inputs(**shape)
    if not dt_softplus:
        inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
    inputs = turned(inputs, *inputs) if strided else inputs
    return excess(selective_scan, inputs, limit=limit, **options, **packed(rows, shape.get("device", "cpu")))


def pair_excess(*, limit: float | None = None, rows=None, scale=0.5, **shape) -> dict[str, float]:
    options = packed(rows, shape.get("device", "cpu"))
    return excess(bidirectional_selective_scan, pair_inputs(**shape), limit=limit, scale=scale, **options)


def conv_inputs(
    batch=2, length=37, channels=24, width=4, *, absent=(), dtype=torch.float64, device="cpu", seed=0
) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name not in absent}
    return leaves(tensors, dtype=dtype, device=device)


def conv_excess(
    *, limit: float | None = None, reverse: bool = False, activation="silu", rows=None, strided=False, **shape
) -> dict[str, float]:
    options = {"reverse": reverse, "activation": activation, **packed(rows, shape.get("device", "cpu"))}
    inputs = conv_inputs(**shape)
    return excess(causal_conv1d, turned(inputs, *inputs) if strided else inputs, limit=limit, **options)


def conv_pair_excess(*, limit: float | None = None, activation="silu", rows=None, **shape) -> dict[str, float]:
    shape["absent"] = (*shape.get("absent", ()), "initial_state")
    inputs, second = conv_inputs(**shape), conv_inputs(**shape, seed=1)
    pairs = {name: (t, second[name]) for name, t in inputs.items() if name != "x"}
    function = bidirectional_causal_conv1d
    options = {"activation": activation, **packed(rows, shape.get("device", "cpu"))}
    return excess(function, {"x": inputs["x"]} | pairs, limit=limit, **options)


def uneven_pair(dtype=torch.bfloat16, device="cpu", d_state=3) -> dict:
    """Directions that differ in dtype and strides: slices of channels, slices of steps, and expanded tensors."""
    inputs = pair_inputs(batch=2, length=6, d_inner=5, d_state=d_state, dtype=dtype, device=device)
    (u0, u1), (B0, B1) = ([t.detach() for t in inputs[name]] for name in "uB")
    z = inputs["z"].detach()
    inputs["u"] = (torch.cat([u0, u0], 2)[..., 5:].requires_grad_(), u1.float().requires_grad_())
    inputs["B"] = (B0.requires_grad_(), B1[:, :1].expand(-1, 6, -1).requires_grad_())
    inputs["z"] = torch.cat([z, z], 1)[:, :6].requires_grad_()
    return inputs


def widened_pair(device="cpu", d_state=3) -> dict:
    """fp32, with an fp64 D in the reverse direction, which makes both directions fp64."""
    inputs = pair_inputs(batch=1, length=6, d_inner=3, d_state=d_state, dtype=torch.float32, device=device)
    inputs["D"] = (inputs["D"][0], inputs["D"][1].detach().double().requires_grad_())
    return inputs


def widened_convolutions(device="cpu") -> dict:
    """fp32, with an fp64 bias in the reverse direction."""
    a, b = (conv_inputs(1, 9, 3, dtype=torch.float32, device=device, seed=seed) for seed in range(2))
    bias = b["bias"].detach().double().requires_grad_()
    return {"x": a["x"], "weight": (a["weight"], b["weight"]), "bias": (a["bias"], bias)}


def extreme_inputs(dtype=torch.float32, device="cpu", **shape) -> dict:
    """Steps, inputs and gates so large or small that a careless softplus, sigmoid or silu overflows."""
    inputs = scan_inputs(batch=1, length=6, dtype=dtype, device=device, **shape)
    channels = inputs["u"].shape[2] // 4
    with torch.no_grad():
        inputs["dt"] += inputs["dt"].new_tensor([-100.0, 100.0, -30.0, 19.9, 20.1, 0.0])[:, None]
        inputs["u"] *= inputs["u"].new_tensor([1e4, 1.0, 1e4, 1e-4] * channels)
        inputs["z"] += inputs["z"].new_tensor([-1e4, -100.0, 0.0, 100.0] * channels)
    return inputs


def norm_excess(
    shape=(3, 7, 192),
    *,
    dtype=torch.float32,
    out=None,
    gated: bool | torch.dtype = False,
    groups=1,
    eps=1e-5,
    strided=False,
    device="cpu",
    limit=1e-5,
) -> dict[str, float]:
    """`rms_norm` by its kernels, and its gradients, against torch's in fp64, as fractions of what is allowed.

    The gate is a slice of a wider tensor, as a layer has it, in x's dtype or in one that is given. Strided, all else is
    too.
    """
    from vim_kernels.triton_kernels import norm as triton_norm

    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(*shape, generator=generator)).to(device, dtype)
    weight = torch.randn(shape[-1], generator=generator).to(device)
    dy = torch.randn(*shape, generator=generator).to(device, out or dtype)
    gate = 2 * torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator)
    gate = gate.to(device, gated if isinstance(gated, torch.dtype) else dtype)[..., : shape[-1]] if gated else None
    if strided:
        given = {"x": x, "weight": weight, "dy": dy} | ({} if gate is None else {"gate": gate})
        x, weight, dy, *rest = (t.detach() for t in turned(given, *given).values())
        gate = rest[0] if rest else None
    got = [
        triton_norm.forward(x, weight, gate, eps, groups, out or dtype),
        *triton_norm.backward(dy, x, weight, gate, eps, groups),
    ]
    leaves = [t.double().requires_grad_() for t in (x, weight, *([] if gate is None else [gate]))]
    assert [t.dtype for t in got] == [out or dtype, dtype, weight.dtype, dtype if gate is None else gate.dtype]
    blocks = leaves[0] * torch.nn.functional.silu(leaves[2]) if gated else leaves[0]
    blocks = blocks.unflatten(-1, (groups, -1))
    y = (blocks / (blocks.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * leaves[1]
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    return {
        name: error(g, w) / (1e-12 if g.dtype == torch.float64 else limit)
        for name, g, w in zip(("y", "x", "weight", "gate"), got, want, strict=False)
    }


def residual_excess(
    function,
    shape=(2, 7, 20),
    *,
    dtype=torch.float32,
    branch_dtype=None,
    out=None,
    heading=False,
    reverse=False,
    bias=False,
    scale=False,
    unused=(),
    device="cpu",
    backend="triton",
    limit=1e-5,
) -> dict[str, float]:
    """`pre_norm`, `add_branch` or `add_and_norm` with gradients against formulas in fp64: fractions of what is allowed.

    unused: results, "stream" or "y", that have no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    length, channels = shape[1:]

    def random(*shape, dtype=torch.float32):
        return (2 * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()

    given = {"x": random(*shape, dtype=dtype)}
    if function.__name__ != "pre_norm":
        given["branch"] = random(shape[0], length + heading, channels, dtype=branch_dtype or dtype)
    if function.__name__ != "add_branch":
        given["weight"] = random(channels, dtype=torch.promote_types(dtype, torch.float32))
    if bias:
        given["bias"] = random(channels)
    options = {"heading": heading, "reverse": reverse, "backend": backend}
    if scale:
        options["scale"] = torch.arange(shape[0], device=device) / 2  # of the first sequence 0
    if "weight" in given:
        options |= {"eps": 0.125, "dtype": out}
    found = function(**given, **options)
    found = dict(zip(("stream", "y"), found if isinstance(found, tuple) else (found,), strict=False))

    exact = leaves(given, dtype=torch.float64)
    tokens = list(range(length))
    order = [*reversed(tokens[:-1]), tokens[-1]] if reverse else tokens  # of the tokens behind the heading
    stream = exact["x"]
    if "branch" in given:
        places = [order.index(token) + heading for token in tokens]
        added = exact["branch"][:, places] + exact.get("bias", 0)
        stream = stream + (added * options["scale"].double()[:, None, None] if scale else added)
    want = {"stream": stream}
    if "weight" in given:
        y = stream / (stream.square().mean(-1, keepdim=True) + 0.125).sqrt() * exact["weight"]
        if heading and "branch" not in given:
            y = torch.cat((y.sum(1, keepdim=True) / length, y[:, order]), 1)
        want["y"] = y
    dys = {name: torch.randn(t.shape, generator=generator).to(t) for name, t in found.items() if name not in unused}
    names = [name for name in given if not ("y" in unused and name == "weight")]
    got = torch.autograd.grad([found[n] for n in dys], [given[n] for n in names], list(dys.values()))
    right = torch.autograd.grad([want[n] for n in dys], [exact[n] for n in names], [t.double() for t in dys.values()])
    assert [t.dtype for t in got] == [given[name].dtype for name in names]
    pairs = [(name, t, want[name]) for name, t in found.items()]
    pairs += [(f"d_{name}", t, exactly) for name, t, exactly in zip(names, got, right, strict=True)]
    return {name: error(t.detach().contiguous(), truth.detach()) / limit for name, t, truth in pairs}


def swiglu_excess(
    shape=(5, 12), *, dtype=torch.float32, device="cpu", backend="triton", limit=1e-5
) -> dict[str, float]:
    """`biased_swiglu`, and its gradients, against the formula in fp64, as fractions of what is allowed."""
    from vim_kernels import biased_swiglu

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(2 * shape[-1], generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    y = biased_swiglu(x, bias.requires_grad_(), backend=backend)
    dy = torch.randn(*shape, generator=generator).to(y)
    exact = [t.detach().double().requires_grad_() for t in (x, bias)]
    gate, half = (exact[0] + exact[1]).chunk(2, -1)
    want = gate * torch.sigmoid(gate) * half
    got = [y.detach(), *torch.autograd.grad(y, (x, bias), dy)]
    want = [want.detach(), *torch.autograd.grad(want, exact, dy.double())]
    return {name: error(g, w) / limit for name, g, w in zip(("y", "x", "bias"), got, want, strict=True)}


def long_conv_excess(
    run, method, shape=(2, 9, 3), lags=9, ahead=0, *, dtype=torch.float64, device="cpu", limit=1e-12
) -> dict[str, float]:
    """A convolution by `run(u, kernel, ahead, method)`, and its gradients, against the sum that defines it, as
    fractions of what is allowed. u and dy are slices of wider tensors; the kernel is in fp32 at least."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    u, dy = (random(*shape[:-1], 2 * shape[-1] + 1).to(device, dtype)[..., : shape[-1]] for _ in range(2))
    kernel = random(shape[-1], lags).to(device, torch.promote_types(dtype, torch.float32))
    leaves = [t.detach().requires_grad_() for t in (u, kernel)]
    y = run(*leaves, ahead, method)
    got = [t.contiguous() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))]
    assert [t.dtype for t in got] == [dtype, dtype, kernel.dtype]
    leaves = [t.detach().double().requires_grad_() for t in (u, kernel)]
    step = torch.arange(shape[1], device=device)
    lag = step[:, None] - step + ahead
    matrix = torch.where((lag >= 0) & (lag < lags), leaves[1][:, lag.clamp(0, lags - 1)], 0)
    y = torch.einsum("hij, bj...h -> bi...h", matrix, leaves[0])
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    return {name: error(g, w) / limit for name, g, w in zip(("y", "u", "kernel"), got, want, strict=True)}


def step_excess(
    batch=2,
    d_model=24,
    d_inner=40,
    d_state=5,
    rank=3,
    taps=4,
    *,
    small=False,
    eps=1e-5,
    dtype=torch.float32,
    device="cpu",
    limit=1e-5,
) -> dict[str, float]:
    """`mamba_block_step` by its kernels against torch's operators in fp64, as fractions of what is allowed.

    Args: small: steps of the size of fp32's last digit, from a state of 0 which shows them.
    """
    from vim_kernels import MambaBlockWeights, torch_step
    from vim_kernels.triton_kernels import step as triton_step

    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    weights = MambaBlockWeights(
        norm=random(d_model),
        in_proj=random(2 * d_inner, d_model, scale=d_model**-0.5),
        conv=random(d_inner, taps),
        conv_bias=random(d_inner),
        x_proj=random(rank + 2 * d_state, d_inner, scale=d_inner**-0.5),
        dt_proj=random(d_inner, rank),
        dt_bias=random(d_inner) - (20 if small else 0),
        A_log=random(d_inner, d_state),
        D=random(d_inner),
        out_proj=random(d_model, d_inner, scale=d_inner**-0.5),
    )
    x, conv_state = random(batch, d_model).float(), random(batch, taps - 1, d_inner)
    ssm_state = random(batch, d_inner, d_state, scale=0 if small else 1).float()
    wide_x, *states = (t.double() for t in (x, conv_state, ssm_state))
    wide_weights = MambaBlockWeights._make(w.double() for w in weights)
    want = [torch_step.block_step(wide_x, states[0], states[1], wide_weights, eps), *states]
    got = [triton_step.block_step(x, conv_state, ssm_state, weights, eps), conv_state, ssm_state]
    return {name: error(g, w) / limit for name, g, w in zip(("x", "conv", "ssm"), got, want, strict=True)}


def ssd_inputs(
    dtype, *, absent=(), strided=False, device="cpu", forgetting=None, **shape
) -> dict[str, torch.Tensor | None]:
    """Arguments of `ssd`, sequences in a low precision; None for those in `absent`.

    Args:
        strided: x, B and C are slices of one tensor, dt of another, as in a layer.
        forgetting: dt of every ninth step, whose x is 0. Small decays between them keep their digits.
    """
    torch.manual_seed(0)
    given = {name: t.detach() for name, t in inputs(dtype=torch.float32, **shape).items()}
    if forgetting is not None:
        given["dt_bias"] -= 1
        given["dt"][:, 4::9] = forgetting
        given["x"][:, 4::9] = 0
    low = {name: given[name].to(device, dtype) for name in ("x", "dt", "B", "C")}
    if strided:
        sizes, parts = zip(*((t.shape[2:], t.flatten(2)) for t in low.values()), strict=True)
        slices = torch.cat(parts, 2).split([size.numel() for size in sizes], 2)
        low = {name: t.unflatten(2, size) for name, t, size in zip(low, slices, sizes, strict=True)}
    given = {name: low.get(name, t.to(device)).detach().requires_grad_() for name, t in given.items()}
    return {name: None if name in absent else t for name, t in given.items()}


def ssd_results(function, given: dict, dy=None, d_state=None, **options) -> dict[str, torch.Tensor]:
    """Outputs and gradients; without `dy` the gradients of half the outputs' squares, whose terms do not cancel."""
    y, state = function(**given, **options)
    wanted = {name: t for name, t in given.items() if t is not None}
    cotangents = (y, state) if dy is None else (dy.to(y), d_state.to(state))
    gradients = torch.autograd.grad((y, state), list(wanted.values()), [t.detach() for t in cotangents])
    return {"y": y.detach(), "state": state.detach()} | dict(zip(wanted, gradients, strict=True))


def ssd_excess(dtype, *, reverse=False, chunk_size=64, dt_softplus=True, **shape) -> dict[str, float]:
    """`ssd` by its kernels against the fp64 recurrence, as fractions of what is allowed: see `excess`."""
    from vim_kernels import torch_ssd

    given, options = ssd_inputs(dtype, **shape), {"reverse": reverse, "dt_softplus": dt_softplus}
    if not dt_softplus:
        given["dt"] = given["dt"].detach().abs().requires_grad_()
    # Absent arguments count as zero.
    everything = leaves(ssd_inputs(dtype, **shape | {"absent": ()}), dtype=torch.float64)
    truth = {name: 0 * t if given[name] is None else given[name].double() for name, t in everything.items()}
    truth = leaves(truth)
    want = ssd_results(recurrence, truth, **options)
    cotangents = {"dy": want["y"].to(dtype), "d_state": want["state"].float()}
    want = ssd_results(recurrence, truth, **{k: t.double() for k, t in cotangents.items()}, **options)
    eager = ssd_results(torch_ssd.ssd, given, **cotangents, **options, chunk_size=chunk_size)
    kernels = functools.partial(ssd, backend="triton", return_last_state=True)
    got = ssd_results(kernels, given, **cotangents, **options, chunk_size=chunk_size)
    assert all(got[name].dtype == t.dtype for name, t in eager.items())
    budgets = {
        name: 2 * error(t.contiguous(), want[name]) + torch.finfo(t.dtype).eps + 1e-5 for name, t in eager.items()
    }
    return {name: error(got[name], want[name]) / budget for name, budget in budgets.items()}
