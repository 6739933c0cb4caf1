"""`backend=` of all operators but scan and convolution: a named one runs or raises; "auto" picks and logs once."""

import functools
import re

import pytest
import torch
from torch.func import grad

from vim_kernels import (
    MambaBlockWeights,
    available_backends,
    backends,
    long_conv,
    mamba_block_step,
    pre_norm,
    rms_norm,
    ssd,
    swiglu,
)


def run_ssd(dtype=torch.bfloat16, head_dim=4, d_state=5, A=None, **options):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    B = random(2, 7, 1, d_state)
    A = -torch.ones(2) if A is None else A
    return ssd(random(2, 7, 2, head_dim), random(2, 7, 2), A, B, B, **options)


def run_conv(**options):
    generator = torch.Generator().manual_seed(0)
    return long_conv(torch.randn(2, 7, 3, generator=generator), torch.randn(3, 7, generator=generator), **options)


def run_norm(**options):
    generator = torch.Generator().manual_seed(0)
    return rms_norm(torch.randn(2, 8, generator=generator), torch.ones(8), **options)


def run_pre_norm(**options):
    generator = torch.Generator().manual_seed(0)
    return pre_norm(torch.randn(2, 3, 8, generator=generator), torch.ones(8), **options)[1]


def run_swiglu(**options):
    generator = torch.Generator().manual_seed(0)
    return swiglu(*(torch.randn(2, 8, generator=generator) for _ in range(2)), **options)


def run_step(dtype=torch.float32, strided=False, **options):
    d_model, d_inner, d_state, rank, taps = 4, 6, 3, 2, 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    shapes = (d_model,), (2 * d_inner, d_model), (d_inner, taps), (d_inner,), (rank + 2 * d_state, d_inner)
    shapes += (d_inner, rank), (d_inner,), (d_inner, d_state), (d_inner,), (d_model, d_inner)
    weights = MambaBlockWeights(*(random(*shape) for shape in shapes))
    window = random(2, d_inner, taps - 1).mT if strided else random(2, taps - 1, d_inner)
    return mamba_block_step(random(2, d_model), window, random(2, d_inner, d_state), weights, **options)


CALLS = {
    "ssd": run_ssd,
    "long_conv": run_conv,
    "rms_norm": run_norm,
    "residual": run_pre_norm,
    "swiglu": run_swiglu,
    "mamba_block_step": run_step,
}
NAMES = dict.fromkeys(CALLS, ("triton", "torch")) | {"ssd": ("triton", "cpu", "torch")}
each_operator = pytest.mark.parametrize("operator", CALLS)


@pytest.fixture
def gpu(monkeypatch):
    """Dispatch as on a machine with a GPU, for CPU tensors; nothing runs there."""
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    monkeypatch.setattr(backends, "_fastest", lambda device_type, operator=None, names=(): "triton")
    monkeypatch.setattr(backends, "_triton_interprets", lambda: True)


@pytest.fixture
def choices_anew():
    """Nothing has been chosen or logged yet; nor has it afterwards."""
    caches = backends._fastest, backends._log_fallback
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@each_operator
def test_auto_takes_the_fastest_on_a_cpu_and_logs_it_once(operator, choices_anew, caplog):
    fastest = "cpu" if "cpu" in NAMES[operator] and "cpu" in available_backends() else "torch"
    with caplog.at_level("INFO", "vim_kernels"):
        first, second = CALLS[operator](), CALLS[operator]()
    named = CALLS[operator](backend=fastest)
    assert torch.equal(first, second)
    assert torch.equal(first, named)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"backend '{fastest}' of {operator} for tensors on cpu")


def test_without_a_compiler_auto_takes_torch(choices_anew, monkeypatch, caplog):
    monkeypatch.setattr(backends, "unavailable", lambda backend: "no compiler" if backend == "cpu" else None)
    with caplog.at_level("INFO", "vim_kernels"):
        assert torch.equal(run_ssd(), run_ssd(backend="torch"))
    reason = "backend 'torch' of ssd for tensors on cpu: the faster 'cpu' cannot run here: no compiler"
    assert [record.getMessage() for record in caplog.records] == [reason]
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: no compiler; available: "):
        run_ssd(backend="cpu")


@pytest.mark.parametrize(
    ("operator", "name"),
    [(operator, name) for operator in CALLS for name in ("cpu", "reference", "cuda") if name not in NAMES[operator]],
)
def test_an_unknown_name_lists_those_there_are(operator, name):
    listed = re.escape(str(("auto", *NAMES[operator])))
    with pytest.raises(ValueError, match=rf"backend must be one of {listed}, got '{name}'"):
        CALLS[operator](backend=name)


@each_operator
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_named_backend_never_falls_back(operator):
    available = re.escape(str(tuple(name for name in available_backends() if name in NAMES[operator])))
    with pytest.raises(RuntimeError, match=rf"backend 'triton' cannot run here: .*; available: {available}"):
        CALLS[operator](backend="triton")


LIMITS = {
    "x in fp32": (functools.partial(run_ssd, torch.float32), "x must be bf16 or fp16, got torch.float32"),
    "A in fp64": (functools.partial(run_ssd, A=-torch.ones(2, dtype=torch.float64)), "it has no fp64"),
    "wide heads": (functools.partial(run_ssd, head_dim=129), "head_dim must be at most 128, got 129"),
    "many states": (functools.partial(run_ssd, d_state=257), "d_state must be from 1 to 256, got 257"),
    "step in fp64": (functools.partial(run_step, torch.float64), "it has no fp64"),
    "strided window": (
        functools.partial(run_step, strided=True),
        "conv_state, ssm_state and weights must be contiguous",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_call_beyond_the_kernels_limits(case, choices_anew, gpu, caplog):
    """By name it raises and names the limit; "auto" takes torch and logs the reason once."""
    call, reason = LIMITS[case]
    with pytest.raises(
        RuntimeError, match=f"backend 'triton' of .* cannot run this call: {reason}; use backend='auto'"
    ):
        call(backend="triton")
    with caplog.at_level("INFO", "vim_kernels"):
        for _ in range(2):
            assert torch.equal(call(), call(backend="torch"))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(f"for tensors on cpu: the faster 'triton' cannot run here: {reason}")


def test_a_call_within_the_limits_takes_triton(gpu):
    for limit in (None, lambda: None):
        for backend in ("auto", "triton"):
            assert backends.kernels_or_torch("ssd", backend, torch.device("cpu"), limit=limit) == "triton"
        assert backends.kernels_or_torch("ssd", "torch", torch.device("cpu"), limit=limit) == "torch"


EACH_KERNEL = [(operator, name) for operator, names in NAMES.items() for name in names[:-1]]


@pytest.mark.parametrize(("operator", "name"), EACH_KERNEL)
def test_transforms_take_torch(operator, name, gpu):
    """A named kernel raises there, and "auto" runs."""

    def total(scale, backend):
        return (CALLS[operator](backend=backend) * scale).sum()

    with pytest.raises(RuntimeError, match=f"backend '{name}' of {operator} supports only first derivatives"):
        grad(total)(torch.ones(()), name)
    assert torch.isfinite(grad(total)(torch.ones(()), "auto"))


@pytest.mark.parametrize(("operator", "name"), EACH_KERNEL)
def test_a_compiler_takes_torch(operator, name, gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    arguments = torch.device("cpu"), NAMES[operator]
    assert backends.kernels_or_torch(operator, "auto", *arguments) == "torch"
    assert backends.kernels_or_torch(operator, "torch", *arguments) == "torch"
    with pytest.raises(RuntimeError, match=f"backend '{name}' of {operator} cannot be compiled or exported"):
        backends.kernels_or_torch(operator, name, *arguments)


@pytest.mark.parametrize("limit", [None, lambda: None, lambda: "too wide"])
def test_a_compiler_keeps_registered_kernels_on_cuda(limit, monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def chosen(device):
        return backends.kernels_or_torch(
            "ssd", "auto", torch.device(device), NAMES["ssd"], limit=limit, registered=True
        )

    assert chosen("cuda") == ("triton" if limit is None or limit() is None else "torch")
    assert chosen("cpu") == "torch"
    assert grad(lambda x: x * (chosen("cuda") == "torch"))(torch.ones(())) == 1  # a transform sees ATen only


def test_a_program_traced_with_kernels_refuses_what_they_cannot_take():
    x = torch.zeros(2, 7, 2, 4)
    B = torch.zeros(2, 7, 1, 5)
    with pytest.raises(RuntimeError, match=r"this traced program has backend 'triton' of ssd, .*: x must be bf16"):
        torch.ops.vim_kernels.ssd(x, x[..., 0], x[0, 0, :, 0], B, B, None, None, None, True, False, 64, "triton")
