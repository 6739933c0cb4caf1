"""Forward mode, torch.func, second derivatives and traces: right, or an error that names the alternative."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from scan_inputs import pair_inputs, scan_inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import vim  # noqa: F401 (it registers the models)
from vim_kernels import (
    add_and_norm,
    add_branch,
    available_backends,
    biased_swiglu,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    long_conv,
    pre_norm,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd,
    swiglu,
)

NAMED = [name for name in available_backends() if name in ("torch", "cpu")]
BATCH, LENGTH, CHANNELS, STATES = 2, 5, 4, 3
ROW = (BATCH, LENGTH, CHANNELS)
SCAN_ARGUMENTS = "u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"  # in the order of `scan_inputs`
SEQ_IDX = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def of_scan(*tensors: Tensor, **options) -> Tensor:
    inputs = dict(zip(SCAN_ARGUMENTS, tensors, strict=True))
    return selective_scan(**inputs, seq_idx=SEQ_IDX.to(tensors[0].device), **options)


def of_scans(*tensors: Tensor, **options) -> Tensor:
    z, *rest = tensors
    pairs = zip(rest[::2], rest[1::2], strict=True)
    names = ("u", "dt", "A", "B", "C", "D", "dt_bias")
    return bidirectional_selective_scan(**dict(zip(names, pairs, strict=True)), z=z, **options)


def of_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, **options) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu", initial_state=state, reverse=True, **options)


def of_convs(x: Tensor, *pairs: Tensor, **options) -> Tensor:
    seq_idx = SEQ_IDX.to(x.device)
    return torch.cat(
        bidirectional_causal_conv1d(x, pairs[:2], pairs[2:], activation="silu", seq_idx=seq_idx, **options)
    )


def of_step(state, u, dt, A, B, C, D, z) -> Tensor:
    y, state = selective_state_update(state, u, dt, A, B, C, D=D, z=z)
    return torch.cat([y.unsqueeze(-1), state], -1)


def of_ssd(x, dt, A, B, C, D) -> Tensor:
    return ssd(x, dt, -A.exp(), B, C, D=D, chunk_size=2)


def by_fft(u, kernel) -> Tensor:
    return long_conv(u, kernel)


def by_matrix(u, kernel) -> Tensor:
    return long_conv(u, kernel, method="matrix")


def gated_norm(x, weight, gate) -> Tensor:
    return rms_norm(x, weight, gate=gate, groups=2)


def of_block(x, branch, bias, weight) -> Tensor:
    """A block of Adventurer: a norm behind a heading, a branch, a norm, a branch with a bias."""
    x, y = pre_norm(x, weight, heading=True, reverse=True)
    x, y = add_and_norm(x, branch * y, weight, heading=True, reverse=True)
    return add_branch(x, y, bias)


def of_gate(x, bias) -> Tensor:
    return biased_swiglu(x, bias)


HEADS, MATRIX = (BATCH, LENGTH, 2, STATES), (CHANNELS, STATES)
WITH_BACKENDS = {
    of_scan: None,
    of_scans: None,
    of_conv: (ROW, (CHANNELS, 4), (CHANNELS,), (BATCH, 3, CHANNELS)),
    of_convs: (ROW, *2 * [(CHANNELS, 4)], *2 * [(CHANNELS,)]),
}
SHAPES = WITH_BACKENDS | {
    of_step: (
        *[(BATCH, *MATRIX), (BATCH, CHANNELS), (BATCH, CHANNELS), MATRIX],
        *[(BATCH, STATES), (BATCH, STATES), (CHANNELS,), (BATCH, CHANNELS)],
    ),
    of_ssd: ((*ROW[:2], 2, 2), (*ROW[:2], 2), (2,), HEADS, HEADS, (2,)),
    by_fft: (ROW, (CHANNELS, LENGTH)),
    by_matrix: (ROW, (CHANNELS, LENGTH)),
    rms_norm: (ROW, (CHANNELS,)),
    swiglu: (ROW, ROW),
    gated_norm: (ROW, (CHANNELS,), ROW),
    of_block: (ROW, (BATCH, LENGTH + 1, CHANNELS), (CHANNELS,), (CHANNELS,)),
    of_gate: ((BATCH, LENGTH, 2 * CHANNELS), (2 * CHANNELS,)),
}
each_operator = pytest.mark.parametrize("function", SHAPES, ids=lambda f: f.__name__)
each_with_backends = pytest.mark.parametrize("function", WITH_BACKENDS, ids=lambda f: f.__name__)
each_registered = pytest.mark.parametrize("function", [*WITH_BACKENDS, of_ssd], ids=lambda f: f.__name__)


def inputs_of(function, device="cpu", seed=0) -> tuple[Tensor, ...]:
    """Leaves in fp64, without gradients."""
    if function is of_scan:
        tensors = list(scan_inputs(*ROW, STATES, seed=seed).values())
    elif function is of_scans:
        pairs = pair_inputs(batch=BATCH, length=LENGTH, d_inner=CHANNELS, d_state=STATES)
        tensors = [pairs.pop("z"), *(t for pair in pairs.values() for t in pair)]
    else:
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in SHAPES[function]]
    return tuple(t.detach().to(device) for t in tensors)


def like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in tensors)


def gradients(function, inputs: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of <weight, function> by one backward, which other tests check against the reference."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad((function(*leaves) * weight).sum(), leaves)


@each_operator
def test_each_input_may_be_the_only_one_to_learn(function, device, relative_error):
    """Its gradient equals the one with all inputs learning, on every backend."""
    inputs = inputs_of(function, device)
    (weight,) = like((function(*inputs),), 1)
    plain = functools.partial(function, backend="reference") if function in WITH_BACKENDS else function
    want = gradients(plain, inputs, weight)
    named = NAMED if function in WITH_BACKENDS and device == "cpu" else []
    for call in (function, *(functools.partial(function, backend=name) for name in named)):
        for i, right in enumerate(want):
            leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
            (found,) = torch.autograd.grad((call(*leaves) * weight).sum(), leaves[i])
            assert relative_error(found, right) < 1e-10, i


@each_operator
def test_forward_mode_is_the_transpose_of_the_backward(function, device):
    """<weight, J tangents> = <J^T weight, tangents>, for torch.func.jvp and for dual tensors."""
    inputs = inputs_of(function, device)
    tangents = like(inputs, 1)
    (weight,) = like((function(*inputs),), 2)
    want = sum((g * t).sum() for g, t in zip(gradients(function, inputs, weight), tangents, strict=True))

    def push(inputs, tangents):
        return (jvp(function, inputs, tangents)[1] * weight).sum()

    assert torch.allclose(push(inputs, tangents), want, rtol=1e-10)
    with forward_ad.dual_level():
        y = function(*map(forward_ad.make_dual, inputs, tangents))
        assert torch.allclose((forward_ad.unpack_dual(y).tangent * weight).sum(), want, rtol=1e-10)


@pytest.mark.parametrize("function", [of_scan, of_conv])
def test_compiled_forward_mode(function):
    inputs = inputs_of(function)
    tangents = like(inputs, 1)
    (weight,) = like((function(*inputs),), 2)
    want = sum((g * t).sum() for g, t in zip(gradients(function, inputs, weight), tangents, strict=True))
    compiled = torch.compile(lambda i, t: jvp(function, i, t)[1], backend="aot_eager", fullgraph=True)
    assert torch.allclose((compiled(inputs, tangents) * weight).sum(), want, rtol=1e-10)


@each_operator
def test_per_sample_gradients(function, device, relative_error):
    samples = [inputs_of(function, device, seed) for seed in range(3)]
    weight = like((function(*samples[0]),), 2)[0]
    want = [torch.stack(g) for g in zip(*(gradients(function, s, weight) for s in samples), strict=True)]
    everywhere = tuple(range(len(want)))
    found = vmap(grad(lambda *t: (function(*t) * weight).sum(), everywhere))(
        *map(torch.stack, zip(*samples, strict=True))
    )
    for got, right in zip(found, want, strict=True):
        assert relative_error(got, right) < 1e-10


@each_operator
@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(jacrev(f))], ids=["hessian", "jacrev"])
def test_second_derivatives_by_torch_func(function, second, device):
    """Along a direction, against finite differences of the gradient."""
    x, *rest = inputs_of(function, device)
    (direction,), (weight,) = like((x,), 1), like((function(x, *rest),), 2)

    def loss(x):
        return (function(x, *rest) ** 2 * weight).sum()

    def slope(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    got = (second(loss)(x) * direction).sum(tuple(range(x.dim(), 2 * x.dim())))
    want = (slope(x + 1e-5 * direction) - slope(x - 1e-5 * direction)) / 2e-5
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


@each_with_backends
def test_what_an_operator_cannot_do_is_an_error(function):
    """A named backend under transforms, a second backward, and forward mode or vmap over an existing graph."""
    x, *rest = inputs = inputs_of(function)
    rule = "only first derivatives in reverse mode, .* backend='reference'"
    for backend in NAMED:
        named = functools.partial(lambda x, backend: function(x, *rest, backend=backend), backend=backend)
        for call in (
            lambda f: jvp(f, (x,), (x,)),
            lambda f: grad(lambda x: f(x).sum())(x),
            lambda f: vmap(f)(x.unsqueeze(0)),
        ):
            with pytest.raises(RuntimeError, match=f"backend '{backend}' supports {rule}"):
                call(named)
    leaves = [t.requires_grad_() for t in inputs]
    y = function(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=rule):
        torch.autograd.grad(first.sum(), leaves[0])
    y = function(*leaves)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=rule):
        torch.autograd.grad(
            y, leaves[0], forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)), retain_graph=True
        )
    with pytest.raises(RuntimeError, match=rule):
        vmap(lambda dy: torch.autograd.grad(y, leaves[0], dy, retain_graph=True))(
            torch.ones(2, *y.shape, dtype=y.dtype)
        )


@each_with_backends
def test_reference_has_second_backwards(function):
    leaves = [t.requires_grad_() for t in inputs_of(function)]
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend="reference"), leaves, fast_mode=True)


@each_registered
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_traced(function, relative_error):
    """A trace equals the function for other values, gradients included, even if traced without gradients."""
    inputs, others = (inputs_of(function, seed=seed) for seed in (0, 1))
    weight = like((function(*inputs),), 2)[0]
    with torch.no_grad():
        quiet = torch.jit.trace(function, inputs)
    for traced in (torch.jit.trace(function, tuple(t.requires_grad_() for t in inputs)), quiet):
        assert torch.equal(traced(*others), function(*others))
        found = gradients(traced, others, weight)
        for got, want in zip(found, gradients(function, others, weight), strict=True):
            assert relative_error(got, want) < 1e-14


@each_registered
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_trace_refuses_other_sizes(function):
    """It calls the operator without the function's checks: a kernel would read past a buffer."""
    inputs = inputs_of(function)
    traced = torch.jit.trace(function, inputs)
    for i, t in enumerate(inputs):
        for dim in range(t.dim()):
            if (function, i, dim) in ((of_conv, 0, 1), (of_ssd, 0, 3)):
                continue  # the length and the head_dim, which only x has
            others = [*inputs[:i], t.narrow(dim, 0, t.shape[dim] - 1), *inputs[i + 1 :]]
            with pytest.raises(RuntimeError):
                traced(*others)


def test_an_export_without_gradients_has_none():
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return of_scan(*tensors)

    inputs = inputs_of(of_scan)
    program = torch.export.export(Scan(), inputs).module()
    y = program(*(t.requires_grad_() for t in inputs))
    with pytest.raises(RuntimeError, match="exported without gradients and saved nothing for the backward"):
        y.sum().backward()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vim_nano", img_size=32, num_classes=3).eval().double()


IMAGES, LABELS = (
    torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.arange(3),
)


def test_forward_mode_of_a_model(model):
    images = IMAGES.clone().requires_grad_()
    model(images).sum().backward()
    tangent = like((IMAGES,), 1)[0]
    assert torch.allclose(jvp(model, (IMAGES,), (tangent,))[1].sum(), (images.grad * tangent).sum(), rtol=1e-9)


def test_per_sample_gradients_of_a_model(model, relative_error):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image.unsqueeze(0),)), label.unsqueeze(0))

    found = vmap(grad(loss), (None, 0, 0))(parameters, IMAGES, LABELS)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(IMAGES[i : i + 1]), LABELS[i : i + 1]).backward()
        for name, p in model.named_parameters():
            assert relative_error(found[name][i], p.grad) < 1e-9, name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_trace_of_a_model(model):
    """It contains the operators, for tools that count them, and takes any batch size."""
    traced = torch.jit.trace(model, IMAGES[:2])
    assert torch.equal(traced(IMAGES), model(IMAGES))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {"vim_kernels::selective_scan", "vim_kernels::causal_conv1d"} <= kinds
