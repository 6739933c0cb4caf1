"""Discretisation and the three views of a linear system, against each other, an ODE solver and closed forms."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch.testing import assert_close

from vim.layers import linear_system
from vim.layers.discretize import RULES, discretize_dense, discretize_diagonal
from vim.layers.hippo import DIAGONALS, MEASURES, diagonal, hippo, low_rank, nplr
from vim.layers.linear_system import (
    LinearSystem,
    convolve,
    vandermonde,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stable(channels=3, states=4):
    """A random dense real system and its input: A, B, C."""
    A = torch.randn(channels, states, states, dtype=torch.float64)
    A = A - A.mT - torch.diag_embed(torch.rand(channels, states, dtype=torch.float64) + 0.2)
    return A, torch.randn(channels, states, dtype=torch.float64), torch.randn(channels, states, dtype=torch.float64)


def stable_diagonal(channels=3, states=4):
    A = torch.complex(-torch.rand(channels, states) - 0.1, 3 * torch.randn(channels, states)).to(torch.complex128)
    return A, *(torch.randn(channels, states, dtype=torch.complex128) for _ in range(2))


@pytest.mark.parametrize("rule", RULES)
def test_dense_and_diagonal_rules_agree(rule):
    A, B, _ = stable_diagonal()
    delta = torch.rand(3, dtype=torch.float64)
    dA, dB = discretize_dense(torch.diag_embed(A), B, delta, rule)
    diagonal_dA, diagonal_dB = discretize_diagonal(A, B, delta[:, None], rule)
    assert_close(dA, torch.diag_embed(diagonal_dA))
    assert_close(dB, diagonal_dB)


def test_zero_order_hold_of_an_integrator():
    """The poles are at 0, so A has no inverse."""
    delta = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True), torch.ones(1, 1, dtype=torch.float64)
    for dA, dB in (
        discretize_dense(zero.unsqueeze(0), one, delta, "zoh"),
        discretize_diagonal(zero, one, delta[:, None], "zoh"),
    ):
        assert (dA.item(), dB.item()) == (1, pytest.approx(0.3))
        (gradient,) = torch.autograd.grad(dA.sum() + dB.sum(), zero)
        assert gradient.isfinite().all()


def test_small_steps_keep_their_digits():
    """For small x, e^x - 1 loses all digits in fp32."""
    A, B, delta = torch.tensor([-0.5]), torch.ones(1), torch.tensor([2e-5])
    _, dB = discretize_diagonal(A, B, delta, "zoh")
    _, want = discretize_diagonal(A.double(), B.double(), delta.double(), "zoh")
    assert_close(dB.double(), want, atol=0, rtol=1e-6)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be one of 'zoh', 'bilinear', 'euler', got 'tustin'"):
        discretize_diagonal(torch.ones(1), torch.ones(1), torch.ones(1), "tustin")


def after(A, B, C, u, steps, rule, time=2.0):
    """Output at a given time, for an input sampled in the middle of each step."""
    delta = time / steps
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * delta
    dA, dB = discretize_dense(A, B, torch.full(A.shape[:1], delta, dtype=torch.float64), rule)
    y, _ = LinearSystem(dA, dB, C).recurrent(u(middles)[None, :, None].expand(1, steps, len(A)))
    return y[0, -1]


def solved(A, B, C, u, time=2.0):
    ends = []
    for a, b, c in zip(A.numpy(), B.numpy(), C.numpy(), strict=True):
        solution = solve_ivp(lambda t, x: a @ x + b * u(t), (0, time), [0.0] * len(b), rtol=1e-11, atol=1e-12)  # noqa: B023
        ends.append(c @ solution.y[:, -1])
    return torch.tensor(ends, dtype=torch.float64)


@pytest.mark.parametrize(("rule", "order"), [("euler", 1), ("bilinear", 2), ("zoh", 2)])
def test_orders_of_convergence(rule, order):
    """The error against an ODE solver, for a smooth input."""
    A, B, C = stable()
    truth = solved(A, B, C, lambda t: math.sin(3 * t) + t)
    errors = torch.stack(
        [(after(A, B, C, lambda t: (3 * t).sin() + t, n, rule) - truth).abs().max() for n in (256, 512, 1024)]
    )
    assert errors[-1] < 0.05
    assert_close(
        torch.log2(errors[:-1] / errors[1:]), torch.full((2,), float(order), dtype=torch.float64), atol=0.1, rtol=0
    )


def test_zero_order_hold_is_exact_for_held_inputs():
    A, B, C = stable()
    held = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    ends = torch.zeros(len(A), A.shape[-1], dtype=torch.float64)
    for value in held:  # the solver continues from the end of the last piece
        for channel in range(len(A)):
            a, b = A[channel].numpy(), (B[channel] * value).numpy()
            piece = solve_ivp(lambda t, x: a @ x + b, (0, 0.5), ends[channel].numpy(), rtol=1e-12, atol=1e-12)  # noqa: B023
            ends[channel] = torch.from_numpy(piece.y[:, -1])
    dA, dB = discretize_dense(A, B, torch.full((3,), 0.5, dtype=torch.float64), "zoh")
    y, state = LinearSystem(dA, dB, C).recurrent(held[None, :, None].expand(1, 4, 3))
    assert_close(state[0], ends, atol=1e-9, rtol=1e-9)
    assert_close(y[0, -1], (C * ends).sum(-1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("make", [stable, stable_diagonal])
def test_three_views(make, rule, length):
    A, B, C = make()
    delta = torch.rand(3, dtype=torch.float64) * 0.2
    dense = A.ndim == 3
    rules = discretize_dense(A, B, delta, rule) if dense else discretize_diagonal(A, B, delta[:, None], rule)
    system = LinearSystem(*rules, C)
    u = torch.randn(2, length, 3, dtype=torch.float64)
    y, _ = system.recurrent(u)
    assert_close(system.unrolled(u), y)
    assert_close(system.convolution(u), y)
    head, state = system.recurrent(u[:, :1])
    tail, _ = system.recurrent(u[:, 1:], state)
    assert_close(torch.cat((head, tail), 1), y)


def test_views_of_nothing():
    A, B, C = stable_diagonal()
    y, state = LinearSystem(A.exp(), B, C).recurrent(torch.zeros(2, 0, 3))
    assert y.shape == (2, 0, 3)
    assert not state.any()


@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_vandermonde(length):
    log_dA = torch.complex(-torch.rand(2, 5) * 0.1, torch.randn(2, 5)).to(torch.complex128).requires_grad_()
    weight = torch.randn(3, 2, 5, dtype=torch.complex128, requires_grad=True)
    terms = weight.unsqueeze(-1) * (log_dA.unsqueeze(-1) * torch.arange(length)).exp()
    assert_close(vandermonde(log_dA, weight, length), terms.sum(-2).real)
    assert torch.autograd.gradcheck(lambda a, w: vandermonde(a, w, length), (log_dA, weight))


@pytest.mark.parametrize("method", ["fft", "matrix"])
@pytest.mark.parametrize("sizes", [(1, 1), (11, 12), (3, 5)])
def test_convolution_along_both_axes_in_both_directions(method, sizes):
    """The response to an impulse: forward kernels behind it, backward kernels in front."""
    kernels = [torch.randn(2, 3, size, dtype=torch.float64) for size in sizes]
    place = [size // 2 for size in sizes]
    u = torch.zeros(1, *sizes, 3, dtype=torch.float64)
    u[0, place[0], place[1]] = 1
    lines = [
        torch.cat((backward[:, :at].flip(-1), forward[:, : size - at]), -1)
        for (forward, backward), at, size in zip(kernels, place, sizes, strict=True)
    ]
    assert_close(convolve(u, kernels, method)[0], torch.einsum("hi, hj -> ijh", *lines))


def test_short_axes_are_products_of_matrices(monkeypatch):
    """Matrix product and FFT agree, also in gradients."""
    u = torch.randn(2, 9, 5, 3, dtype=torch.float64, requires_grad=True)
    kernels = [torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (9, 5)]
    found = {}
    for limit in (0, 256):
        monkeypatch.setattr(linear_system, "MATRIX", limit)
        y = convolve(u, kernels)
        found[limit] = [y, *torch.autograd.grad(y.square().sum(), (u, *kernels))]
    for by_fft, by_matrix in zip(*found.values(), strict=True):
        assert_close(by_matrix, by_fft, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("d_state", [8, 16, 64])
def test_hippo_golden(golden, d_state):
    t = golden("ssm_hippo_init", f"N{d_state}.")
    for measure, names in (("legs", ("A", "B")), ("fout", ("fout.A", "fout.B"))):
        A, B = hippo(measure, d_state)
        assert_close(A, t[names[0]])
        assert_close(B, t[names[1]][:, 0])

    def complex_of(name):
        return torch.complex(t[f"{name}.real"], t[f"{name}.imag"]).to(torch.complex128)

    system = nplr("legs", d_state)
    limit = {"atol": 1e-4, "rtol": 1e-6}
    assert_close(system.w, complex_of("nplr_w"), **limit)
    assert_close(system.P.abs(), t["nplr_P_abs"].double(), **limit)
    assert_close(system.B.abs(), t["nplr_B_abs"].double(), **limit)
    assert_close(system.B * system.P[0].conj(), complex_of("nplr_BPconj"), **limit)
    for name in DIAGONALS:
        A, B = diagonal(name, d_state)
        assert_close(A, complex_of(f"diag_{name}.A"), **limit)
        assert_close(B, system.B if name == "legs" else torch.ones_like(B))


@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank_is_the_same_system(measure):
    """A in the diagonal basis has the same trace and characteristic polynomial."""
    A, _ = hippo(measure, 8)
    P = low_rank(measure, 8)
    normal = A + P.T @ P
    assert_close(normal @ normal.T, normal.T @ normal)
    w, p, _ = (torch.cat((half, half.conj()), -1) for half in nplr(measure, 8))
    poles = torch.linalg.eigvals(torch.diag(w) - torch.einsum("rn, rm -> nm", p, p.conj()))
    assert_close(poles.sum().real, A.trace())
    characteristic = torch.stack([torch.prod(s - poles) for s in (0.3, 1.0, 2.0)]).real
    assert_close(
        characteristic, torch.stack([torch.linalg.det(s * torch.eye(8).double() - A) for s in (0.3, 1.0, 2.0)])
    )


def test_hippo_reads_back_the_past():
    """LegT holds the Legendre coefficients of the last window; evaluated at its ends they give the input."""
    A, B = hippo("legt", 32)
    time, steps = 3.0, 6000
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * time / steps
    dA, dB = discretize_dense(A[None], B[None], torch.tensor([time / steps], dtype=torch.float64), "bilinear")
    _, state = LinearSystem(dA, dB, B[None]).recurrent((3 * middles).sin()[None, :, None])
    root = (2 * torch.arange(32, dtype=torch.float64) + 1).sqrt()
    window = 2.0  # A and B are halved for it
    newest = (state[0, 0] * root).sum()
    oldest = (state[0, 0] * root * (1 - 2 * (torch.arange(32) % 2))).sum()
    assert newest.item() == pytest.approx(math.sin(3 * time), abs=0.02)
    assert oldest.item() == pytest.approx(math.sin(3 * (time - window)), abs=0.02)


def test_bad_names_and_sizes():
    with pytest.raises(ValueError, match="measure must be one of 'legs', 'legt', 'fout', got 'lmu'"):
        hippo("lmu", 8)
    with pytest.raises(ValueError, match="init must be one of 'lin', 'inv', 'real', 'quad', 'legs', got 'line'"):
        diagonal("line", 8)
    with pytest.raises(ValueError, match="d_state must be even and positive, for conjugate pairs, got 7"):
        nplr("legs", 7)
    with pytest.raises(ValueError, match="d_state must be even and positive, for conjugate pairs, got 7"):
        hippo("fout", 7)
