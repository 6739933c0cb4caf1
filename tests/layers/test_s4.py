"""S4, S4D and S4ND against golden numbers from the authors' code and properties of linear systems."""

import math

import pytest
import torch
from torch.testing import assert_close

from vim.layers import S4, S4D, S4ND, s4
from vim.layers.linear_system import LinearSystem
from vim.layers.s4 import DPLRKernel
from vim.layers.s4d import DiagonalKernel

GOLDEN = {
    "ssm_s4": lambda: S4(4, 16),
    "ssm_s4_diag_lin": lambda: S4D(4, 16),
    "ssm_s4_diag_legs_bilinear_bidir": lambda: S4D(4, 12, init="legs", rule="bilinear", bidirectional=True),
    "ssm_s4d": lambda: S4D(8, 16),
    "ssm_s4nd": lambda: S4ND(4, 8),
}
# Our names of what has a gradient in the files.
OURS = {"inv_dt": "log_dt", "log_A_real": "A_log", "A_real": "A_log", "output_linear.0": "out_proj"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ours(name):
    name = name.removeprefix("layer.")
    for theirs, own in OURS.items():
        name = name.replace(theirs, own)
    return name


def complex_of(t, name):
    return torch.complex(t[f"{name}.real"], t[f"{name}.imag"])


def load(golden, name, before):
    t = golden(name)
    prefix = "param_before." if before and name != "ssm_s4d" else "param."
    mixer = GOLDEN[name]()
    weights = {key.removeprefix(prefix): value for key, value in t.items() if key.startswith(prefix)}
    if name == "ssm_s4nd":  # the file has only the linear part
        weights |= {f"output_linear.0.{key}": value for key, value in mixer.out_proj.state_dict().items()}
    torch.nn.Sequential(mixer).load_state_dict({f"0.{key}": value for key, value in weights.items()})
    return mixer, t


def channels_last(x):
    return x.movedim(1, -1)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, relative_error, name, before):
    mixer, t = load(golden, name, before)
    x = channels_last(t["in.u"]).requires_grad_()
    linear = name == "ssm_s4nd"
    y = mixer.convolve(x) if linear else mixer(x)
    assert relative_error(y, channels_last(t["out.y"])) < 1e-5
    kernels = mixer.kernel if linear else [mixer.kernel]
    wanted = [t[key] for key in ("out.kernel", "out.kernel0", "out.kernel1") if key in t]
    for kernel, size, want in zip(kernels, x.shape[1:], wanted, strict=False):
        assert relative_error(kernel(size).reshape(want.shape), want) < 1e-5
    (y * channels_last(t["in.cotangent"])).sum().backward()
    assert relative_error(x.grad, channels_last(t["grad.in.u"])) < 1e-4
    gradients = dict(mixer.named_parameters())
    checked = 0
    for key, want in t.items():
        if key.startswith("grad.") and key != "grad.in.u":
            got = gradients[ours(key.removeprefix("grad."))].grad
            if key.endswith("A_imag") and name != "ssm_s4d":
                want = -want  # s4.py's A is -exp(A_real) - i A_imag
            assert relative_error(got.reshape(want.shape), want) < 1e-4, key
            checked += 1
    assert checked == len(gradients) - (2 if linear else name == "ssm_s4d")


@pytest.mark.parametrize("name", ["ssm_s4", "ssm_s4_diag_lin", "ssm_s4d"])
@torch.no_grad()
def test_golden_steps(golden, relative_error, name):
    mixer, t = load(golden, name, before=False)
    x = channels_last(t["in.u"])
    cache = mixer.default_state(len(x))
    for symbol in ("dA", "dB"):
        want = complex_of(t, f"out.{symbol}")
        if name == "ssm_s4d" and symbol == "dB":
            want = want * torch.view_as_complex(mixer.kernel.B)
        assert relative_error(getattr(cache.system, symbol), want) < 1e-5, symbol
    y = torch.stack([mixer.step(one, cache) for one in x.unbind(1)], 1)
    assert relative_error(y, channels_last(t.get("out.step_y", t["out.y"]))) < 1e-4
    assert relative_error(cache.state, complex_of(t, "out.state_after_L")) < 1e-4


MIXERS = {
    "s4": lambda **kw: S4(6, 8, **kw),
    "s4-legt": lambda **kw: S4(6, 8, measure="legt", **kw),
    "s4-fout": lambda **kw: S4(6, 8, measure="fout", **kw),
    "s4d": lambda **kw: S4D(6, 8, **kw),
    "s4d-real": lambda **kw: S4D(6, 8, init="real", **kw),
    "s4d-bilinear": lambda **kw: S4D(6, 8, init="inv", rule="bilinear", **kw),
}


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(("name", "rate"), [*((name, 1.0) for name in MIXERS), ("s4d", 0.5), ("s4d-bilinear", 0.5)])
def test_steps_equal_the_whole(name, rate, length):
    """Outputs and the gradients of all parameters."""
    mixer = MIXERS[name](dt_min=0.05).double()
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    whole = mixer(x, rate)
    cache = mixer.default_state(2, rate)
    steps = torch.stack([mixer.step(one, cache) for one in x.unbind(1)], 1)
    assert_close(steps, whole, atol=1e-9, rtol=1e-9)
    leaves = (x, *mixer.parameters())
    found = [torch.autograd.grad((y * weight).sum(), leaves) for y in (steps, whole)]
    assert_close(*found, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", MIXERS)
def test_a_flipped_sequence(name):
    """A bidirectional layer with exchanged kernels gives flipped outputs, except for the lag of the backward kernel."""
    mixer = MIXERS[name](bidirectional=True).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    forward, backward = mixer.kernel(9)
    y = mixer.convolve(x) - mixer.D * x
    for k in range(9):
        want = sum(forward[:, k - j] * x[0, j] for j in range(k + 1))
        want = want + sum(backward[:, j - k - 1] * x[0, j] for j in range(k + 1, 9))
        assert_close(y[0, k], want)
    with pytest.raises(ValueError, match="a bidirectional layer has no step"):
        mixer.default_state(1)


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_gradients_of_the_low_rank_kernel(measure):
    kernel = DPLRKernel(2, 4, measure, dt_min=0.05, l_max=7).double()
    parameters = dict(kernel.named_parameters())

    def call(*values):
        return torch.func.functional_call(kernel, dict(zip(parameters, values, strict=True)), (6,))

    assert torch.autograd.gradcheck(call, tuple(parameters.values()))


def test_gradients_of_the_diagonal_kernel():
    for rule in ("zoh", "bilinear"):
        kernel = DiagonalKernel(2, 6, "lin", rule, 2, dt_min=0.05).double()
        parameters = dict(kernel.named_parameters())

        def call(*values, kernel=kernel, parameters=parameters):
            return torch.func.functional_call(kernel, dict(zip(parameters, values, strict=True)), (6,))

        assert torch.autograd.gradcheck(call, tuple(parameters.values()))


@pytest.mark.parametrize(
    ("rule", "decay"),
    [("zoh", torch.exp), ("bilinear", lambda step: (1 + step / 2) / (1 - step / 2)), ("euler", lambda step: 1 + step)],
)
def test_a_diagonal_system_moves_by_its_rule(rule, decay):
    kernel = DiagonalKernel(3, 4, "lin", rule).double()
    step = kernel.log_dt.exp().unsqueeze(-1) * torch.complex(-kernel.A_log.exp(), kernel.A_imag)
    assert_close(kernel.system().dA, decay(step))
    assert_close(kernel.system(0.5).dA, decay(step / 2))


def test_a_kernel_in_chunks_is_the_same(monkeypatch):
    kernel = DPLRKernel(3, 8, "legs", dt_min=0.05).double()
    whole = kernel(50)
    whole.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in kernel.named_parameters()}
    kernel.zero_grad()
    monkeypatch.setattr(s4, "MAX_ELEMENTS", 7 * 12)
    chunked = kernel(50)
    chunked.square().sum().backward()
    assert_close(chunked, whole)
    assert_close({name: p.grad for name, p in kernel.named_parameters()}, gradients)


@torch.no_grad()
def test_lengths():
    """A longer sequence changes the stored C but not the function of the layer; l_max sets it from the start."""
    kernel = DPLRKernel(3, 8, "legs", dt_min=0.05).double()
    true_C = torch.view_as_complex(kernel.C).clone()
    dA, dB, _ = kernel._dense(1.0)
    systems = [kernel.system(rate) for rate in (1.0, 0.5)]
    want = LinearSystem(dA, dB, torch.cat((true_C, true_C.conj()), -1)[0]).kernel(40)
    for length, kept in ((8, 8), (3, 8), (40, 40), (17, 40)):
        assert_close(kernel(length)[0], want[:, :length])
        assert kernel.l_kernel == kept
    assert_close([kernel.system(rate) for rate in (1.0, 0.5)], systems)
    torch.manual_seed(1)
    one = DPLRKernel(3, 8, l_max=20)
    torch.manual_seed(1)
    other = DPLRKernel(3, 8)
    assert one.l_kernel == 20
    assert_close(one(20), other(20))
    assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_rate_samples_the_same_kernel(name):
    """Two steps at half the rate equal one step at the full rate, exactly for zero-order hold."""
    kernel = MIXERS[name](dt_min=0.004, dt_max=0.008).double().kernel
    coarse, fine = kernel(64)[0], kernel(128, 0.5)[0]
    limit = 1e-9 if getattr(kernel, "rule", "bilinear") == "zoh" else 0.01
    scale = coarse.abs().max().item()
    assert_close(fine[:, ::2] + fine[:, 1::2], coarse, atol=limit * scale, rtol=0)
    assert MIXERS[name]().kernel(33, 0.5).shape == (1, 6, 33)


@torch.no_grad()
def test_s4nd_axes():
    """The response to an impulse is the outer product of the kernels, without wrapping at the borders."""
    mixer = S4ND(2, 4, dim=3).double()
    x = torch.zeros(1, 3, 4, 5, 2, dtype=torch.float64)
    x[0, 1, 2, 1] = 1
    y = mixer.convolve(x) - mixer.D * x
    lags = []
    for kernel, size, place in zip(mixer.kernel, (3, 4, 5), (1, 2, 1), strict=True):
        forward, backward = kernel(size)
        lags.append(torch.cat((backward[:, :place].flip(-1), forward[:, : size - place]), -1))
    assert_close(y[0], torch.einsum("hi, hj, hk -> ijkh", *lags))


def test_bandlimit_leaves_out_what_aliases():
    kernel = DiagonalKernel(1, 8, "lin", bandlimit=0.5, dt_min=0.2, dt_max=0.2)
    _, _, C = kernel._discrete(1.0)
    hertz = 0.2 * kernel.A_imag.abs()[0] / (2 * torch.pi)
    assert (hertz >= 0.25).tolist() == [False, False, False, True]
    assert (C[0, 0] == 0).tolist() == [False, False, False, True]
    for rate in (0.5, 2.0):  # another resolution brings in no mode that was not trained, and drops none that was
        assert (kernel._discrete(rate)[2][0, 0] == 0).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "make", [*MIXERS.values(), lambda: S4ND(6, 8, dim=1), lambda: S4ND(6, 8, dim=1, measure="legs")]
)
def test_autocast_and_round_trip(make):
    mixer = make()
    x = torch.randn(2, 12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert_close(y.float(), mixer(x), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        linear = mixer.convolve(x)
    assert_close(linear, mixer.convolve(x), atol=0, rtol=0)
    half = make()
    half.load_state_dict(mixer.state_dict())
    assert_close(half.bfloat16()(x.bfloat16()).float(), mixer(x), atol=0.15, rtol=0.05)
    again = make()
    again.load_state_dict(mixer.state_dict())
    assert_close(again(x), mixer(x), atol=0, rtol=0)
    assert mixer(x[:0]).shape == (0, 12, 6)
    assert mixer(x[:, :0]).shape == (2, 0, 6)
    with pytest.raises(ValueError, match=r"x must be \(batch, size, 6\), got \(2, 3, 12, 6\)"):
        mixer(torch.zeros(2, 3, 12, 6))


LAYERS = {"s4": S4, "s4d": S4D, "s4nd": S4ND}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("low", "high", "options"), [(0.001, 0.1, {}), (0.01, 0.03, {"dt_min": 0.01, "dt_max": 0.03})])
def test_initial_values(layer, low, high, options):
    """Step sizes are log-uniform in their range; C and D have mean square 1."""
    mixer = layer(2048, 4, **options)
    for name, p in mixer.named_parameters():
        if name.endswith("log_dt"):
            assert low * (1 - 1e-6) <= p.exp().min() < low * 1.02
            assert high * 0.98 < p.exp().max() <= high * (1 + 1e-6)
            middle, width = (math.log(low) + math.log(high)) / 2, math.log(high / low)
            assert p.median().item() == pytest.approx(middle, abs=0.03 * width)
        if name.endswith("C"):
            assert p.square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)
    assert mixer.D.mean().item() == pytest.approx(0, abs=0.1)
    assert mixer.D.square().mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("measure", "decay"), [("legs", 0.5), ("legt", 1e-4), ("fout", 1e-4)])
def test_where_the_poles_of_s4_start(measure, decay):
    """The real part of the poles is -1/2 for LegS; for the others it is 0, clamped for the logarithm."""
    kernel = DPLRKernel(3, 8, measure)
    assert_close(kernel.A_log.exp(), torch.full((3, 4), decay))
    assert (kernel.A_imag <= 0).all()
    assert_close(kernel.A_imag, kernel.A_imag[:1].expand(3, 4))


def test_where_the_poles_of_s4d_start():
    """By default at -1/2 - i pi n."""
    for kernel in (S4D(3, 8).kernel, *S4ND(3, 8).kernel):
        assert_close(kernel.A_log.exp(), torch.full((3, 4), 0.5))
        assert_close(kernel.A_imag, -math.pi * torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_dropout_in_front_of_the_last_product(layer):
    """With dropout of everything only the bias of the output projection remains."""
    mixer, x = layer(6, 4, dropout=1.0), torch.randn(2, 5, 6)
    x = x.unsqueeze(1) if layer is S4ND else x
    want = torch.nn.functional.glu(mixer.out_proj.bias, -1)
    assert_close(mixer.train()(x), want.expand_as(x))
    plain = layer(6, 4)
    plain.load_state_dict(mixer.state_dict())
    assert_close(mixer.eval()(x), plain(x))


@torch.no_grad()
def test_s4nd_along_one_axis_is_s4d_in_both_directions():
    """Outputs and initial values agree; with a band limit the aliasing modes are gone."""
    options = {"init": "inv", "rule": "bilinear", "dt_min": 0.2, "dt_max": 0.2}
    one, other = S4ND(3, 8, dim=1, **options), S4D(3, 8, bidirectional=True, **options)
    assert_close(one.kernel[0].A_imag, other.kernel.A_imag)
    assert_close(one.kernel[0].log_dt, other.kernel.log_dt)
    limited = S4ND(3, 8, dim=1, bandlimit=0.5, **options)
    weights = {name.replace("kernel.0.", "kernel."): value for name, value in one.state_dict().items()}
    other.load_state_dict(weights)
    limited.load_state_dict(one.state_dict())
    x = torch.randn(2, 9, 3)
    assert_close(one(x), other(x))
    aliases = 0.2 * other.kernel.A_imag.abs() / (2 * torch.pi) >= 0.25
    assert 0 < aliases.sum() < aliases.numel()
    other.kernel.C[:, aliases] = 0
    assert_close(limited(x), other(x))


def test_bad_arguments():
    for layer in (S4, S4D, S4ND):
        with pytest.raises(ValueError, match="d_state must be even"):
            layer(4, 7)
        sizes = (3, 5) if layer is S4ND else (5,)
        want = rf"x must be \(batch, {', '.join(['size'] * len(sizes))}, 4\), got \(2, .* 1\)"
        for x in (torch.zeros(2, *sizes, 1), torch.zeros(2, *sizes[1:], 0, 1)):
            with pytest.raises(ValueError, match=want):
                layer(4, 8)(x)
    with pytest.raises(ValueError, match="init must be one of"):
        S4D(4, 8, init="hippo")
    with pytest.raises(ValueError, match="rule must be one of"):
        S4D(4, 8, rule="foh")
    with pytest.raises(ValueError, match="dim must be 1, 2 or 3, got 4"):
        S4ND(4, 8, dim=4)
