"""State-space duality against the plain recurrence, and against the selective scan, of which it is a special case."""

import functools

import pytest
import torch
from ssd_inputs import NAMES, inputs, recurrence
from torch.utils._python_dispatch import TorchDispatchMode

from vim_kernels import available_backends, selective_scan
from vim_kernels import ssd as public_ssd

BACKENDS = [name for name in available_backends() if name in ("torch", "cpu")]


@pytest.fixture(params=BACKENDS)
def ssd(request):
    """The function with each backend that takes fp64 tensors on a CPU."""
    return functools.partial(public_ssd, backend=request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scan(x, dt, A, B, C, D, dt_bias, initial_state, reverse=False):
    """The selective scan with the same dt, A, D and bias for all channels of a head."""

    def repeat(t):
        return t.repeat_interleave(x.shape[3], -1)

    y, state = selective_scan(
        x.flatten(2),
        repeat(dt),
        repeat(A)[:, None].expand(-1, B.shape[3]),
        B,
        C,
        D=repeat(D),
        dt_bias=repeat(dt_bias),
        initial_state=initial_state.flatten(1, 2),
        return_last_state=True,
        reverse=reverse,
        backend="reference",
    )
    return y.view_as(x), state.view_as(initial_state)


# 150 steps in chunks of 2 are more chunks than one product joins.
@pytest.mark.parametrize(
    ("length", "chunk_size", "sizes"),
    [
        (0, 4, {}),
        (1, 64, {"batch": 1}),
        (23, 5, {}),
        (130, 16, {}),
        (150, 2, {}),
        (97, 48, {"batch": 1, "heads": 5, "head_dim": 17, "groups": 1, "d_state": 20}),
        (49, 48, {"heads": 3, "head_dim": 32, "groups": 3, "d_state": 16}),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_and_gradients(ssd, length, chunk_size, sizes, reverse, relative_error):
    given = inputs(length, **sizes)

    def results(run, **options):
        y, state = run(**given, reverse=reverse, **options)
        loss = (y * y.detach().cos()).sum() + (state * state.detach().sin()).sum()
        return y, state, *torch.autograd.grad(loss, list(given.values()), materialize_grads=True)

    got = results(ssd, chunk_size=chunk_size, return_last_state=True)
    for truth in (recurrence, scan):
        for name, a, b in zip(("y", "state", *NAMES), got, results(truth), strict=True):
            assert relative_error(a, b) < 1e-12, (truth.__name__, name)


def test_the_last_state_alone(ssd, relative_error):
    """Without a gradient of y; D then has none."""
    given = inputs(60)

    def gradients(run, **options):
        _, state = run(**given, **options)
        return torch.autograd.grad((state * state.detach().sin()).sum(), list(given.values()), materialize_grads=True)

    for name, a, b in zip(NAMES, gradients(ssd, return_last_state=True), gradients(recurrence), strict=True):
        assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(ssd, reverse):
    given = inputs(7, batch=1, heads=2, head_dim=2, d_state=2)

    def run(*tensors):
        return ssd(**dict(zip(NAMES, tensors, strict=True)), chunk_size=3, return_last_state=True, reverse=reverse)

    assert torch.autograd.gradcheck(run, tuple(given.values()))


def test_steps_without_softplus_and_without_what_is_optional(ssd, relative_error):
    given = inputs(23)
    given |= {name: given[name].detach().abs() for name in ("dt", "dt_bias")}
    got = ssd(**given, chunk_size=5, dt_softplus=False)
    assert relative_error(got, recurrence(**given, dt_softplus=False)[0]) < 1e-12
    bare = {name: given[name] for name in NAMES[:5]}
    zeros = {name: torch.zeros_like(given[name]) for name in NAMES[5:]}
    assert relative_error(ssd(**bare, chunk_size=5), recurrence(**bare, **zeros)[0]) < 1e-12


@pytest.mark.parametrize("wide", NAMES)
def test_one_tensor_in_fp64_widens_all(ssd, wide, relative_error):
    """Gradients of the fp64 tensor, and y if it is x, are right to fp64 precision."""
    given = {name: t.detach().float() for name, t in inputs(23).items()}
    given |= {wide: given[wide].double()}

    def results(run, leaves, **options):
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        y, state = run(**leaves, **options)
        return [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), list(leaves.values()))]

    got = results(ssd, given, chunk_size=5, return_last_state=True)
    want = results(recurrence, {name: t.double() for name, t in given.items()})
    dtypes = [given["x"].dtype, torch.float64, *(t.dtype for t in given.values())]
    for name, found, right, dtype in zip(("y", "state", *NAMES), got, want, dtypes, strict=True):
        assert found.dtype == dtype, name
        # The gradient of y itself is in x's dtype.
        exact = dtype == torch.float64 and (name == "state" or wide == "x")
        assert relative_error(found, right) < (1e-12 if exact else 2e-6), name


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_equal_the_whole(ssd, reverse, relative_error):
    given = inputs(41)
    y, last = ssd(**given, chunk_size=8, reverse=reverse, return_last_state=True)
    state, parts = given["initial_state"], {}
    bounds = [(0, 13), (13, 14), (14, 41)]
    for start, stop in reversed(bounds) if reverse else bounds:
        part = {name: t[:, start:stop] if name in ("x", "dt", "B", "C") else t for name, t in given.items()}
        part["initial_state"] = state
        parts[start], state = ssd(**part, chunk_size=8, reverse=reverse, return_last_state=True)
    assert relative_error(torch.cat([parts[start] for start, _ in bounds], 1), y) < 1e-13
    assert relative_error(state, last) < 1e-13


@torch.no_grad()
def test_reverse_is_a_flip(ssd, relative_error):
    given = inputs(41)
    flipped = {name: t.flip(1) if name in ("x", "dt", "B", "C") else t for name, t in given.items()}
    y, state = ssd(**given, chunk_size=8, return_last_state=True)
    y_flipped, state_flipped = ssd(**flipped, chunk_size=8, reverse=True, return_last_state=True)
    assert relative_error(y_flipped.flip(1), y) < 1e-13
    assert relative_error(state_flipped, state) < 1e-13


ON_EACH_DEVICE = [*(("cpu", name) for name in BACKENDS), pytest.param("cuda", "auto", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("forgetting", [100, 1e9])
@pytest.mark.parametrize(("device", "backend"), ON_EACH_DEVICE)
@pytest.mark.parametrize("reverse", [False, True])
def test_single_precision_behind_steps_that_forget(device, backend, forgetting, reverse, relative_error):
    """Some large steps, and small decays between them, whose digits a sum of both would lose."""
    given = inputs(200, head_dim=8)
    with torch.no_grad():
        given["dt_bias"] -= 1
        given["dt"][:, ::9] = forgetting
        given["x"][:, ::9] = 0

    def results(run, dtype, **options):
        leaves = {name: t.detach().float().to(device, dtype).requires_grad_() for name, t in given.items()}
        y, state = run(**leaves, reverse=reverse, **options)
        return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), list(leaves.values()))

    got = results(public_ssd, torch.float32, return_last_state=True, backend=backend)
    for name, a, b in zip(("y", "state", *NAMES), got, results(recurrence, torch.float64), strict=True):
        assert relative_error(a, b) < 3e-6, name


def test_no_overflow(ssd):
    given = inputs(100, dtype=torch.float32)
    with torch.no_grad():
        given["dt"][:, ::7] = 1e6
        given["dt"][:, 3::7] = -1e6
    y, state = ssd(**given, return_last_state=True)
    gradients = torch.autograd.grad(y.sum() + state.sum(), list(given.values()))
    assert all(t.isfinite().all() for t in (y, state, *gradients))


@pytest.mark.parametrize(("device", "backend"), ON_EACH_DEVICE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device, backend):
    """Products in half precision, states in fp32; autocast changes nothing."""
    ssd = functools.partial(public_ssd, backend=backend)
    given = {name: t.detach().to(device) for name, t in inputs(300, head_dim=16, dtype=torch.float32).items()}
    low = {name: t.to(dtype) if name in ("x", "dt", "B", "C") else t for name, t in given.items()}
    want, want_state = recurrence(**{name: t.double() for name, t in low.items()})
    y, state = ssd(**low, return_last_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    limit = 3 * torch.finfo(dtype).eps
    assert (y - want).norm() < limit * want.norm()
    assert (state - want_state).norm() < limit * want_state.norm()
    with torch.autocast(device, dtype):
        single = ssd(**given)
    assert torch.equal(single, ssd(**given))


def test_a_state_stays_in_fp32_beside_half_precision(ssd, relative_error):
    """With no input the state only decays."""
    given = {name: t.detach() for name, t in inputs(3, dtype=torch.float32).items()}
    given |= {name: given[name].bfloat16() for name in ("dt", "B", "C")} | {"x": given["x"].bfloat16() * 0}
    _, state = ssd(**given, return_last_state=True)
    _, want = recurrence(**{name: t.double() for name, t in given.items()})
    assert relative_error(state, want) < 1e-6


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_memory_is_linear_in_the_length():
    """Including the memory of the carry from chunk to chunk."""
    found = []
    for length in (2048, 16384):
        given = inputs(length, batch=1, heads=2, head_dim=2, d_state=2, dtype=torch.float32)
        with Largest() as largest:
            torch.autograd.grad(public_ssd(**given, chunk_size=8, backend="torch").sum(), list(given.values()))
        found.append(largest.elements)
    assert found[1] <= 8.1 * found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 9, 12)}, r"x must be \(batch, length, heads, head_dim\), got \(2, 9, 12\)"),
        ({"dt": torch.zeros(2, 9, 12)}, r"dt must be \(batch, length, heads\) = \(2, 9, 4\), got \(2, 9, 12\)"),
        ({"A": torch.zeros(4, 5)}, r"A must be \(heads,\) = \(4,\), got \(4, 5\)"),
        ({"B": torch.zeros(2, 9, 5)}, r"B must be \(2, 9, groups, d_state\), got \(2, 9, 5\)"),
        ({"B": torch.zeros(2, 9, 3, 5)}, "B must have groups that divide heads = 4"),
        ({"C": torch.zeros(2, 9, 2, 6)}, "C must be the shape of B"),
        ({"D": torch.zeros(1)}, r"D must be \(heads,\) = \(4,\), got \(1,\)"),
        ({"dt_bias": torch.zeros(1)}, r"dt_bias must be \(heads,\) = \(4,\), got \(1,\)"),
        ({"D": torch.zeros(4, device="meta")}, "D must be on the device of x, cpu, got meta"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, r"initial_state must be .* = \(2, 4, 3, 5\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        public_ssd(**inputs(9) | changes)
