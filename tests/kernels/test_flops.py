"""Counts of FlopCounterMode: by hand, the same on every device and backend, and without an effect on the results."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vim_kernels import (
    available_backends,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    long_conv,
    selective_scan,
    ssd,
)

BATCH, LENGTH, CHANNELS, STATES = 2, 7, 6, 3
ELEMENTS = BATCH * LENGTH * CHANNELS
HEADS, HEAD_DIM, GROUPS, WIDE = 4, 5, 2, 8  # of ssd; WIDE states
DEVICES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]
FFT_16 = 2.5 * 16 * 4  # a real FFT of 16 points


def tensor(*shape, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def counts(run) -> tuple[dict[str, int], dict[str, int]]:
    """Operations by operator, of run() and of the backward of its outputs."""
    found = []
    with FlopCounterMode(display=False) as counter:
        outputs = run()
    found.append(counter.get_flop_counts())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with FlopCounterMode(display=False) as counter:
        sum(y.square().sum() for y in outputs).backward()
    found.append(counter.get_flop_counts())
    forward, backward = ({str(op): n for op, n in by.get("Global", {}).items() if n} for by in found)
    return forward, backward


def scan(device="cpu", gated=True, skip=True, pair=False, **options):
    def row(*last):
        return tensor(BATCH, LENGTH, *last, device=device)

    u, A = row(CHANNELS), -tensor(CHANNELS, STATES, device=device).square()
    given = {"u": u, "dt": row(CHANNELS), "A": A, "B": row(STATES), "C": row(STATES)}
    given |= {"D": tensor(CHANNELS, device=device)} if skip else {}
    if pair:
        given = {name: (t, t) for name, t in given.items()}
    run = bidirectional_selective_scan if pair else selective_scan
    return run(**given, z=row(CHANNELS) if gated else None, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({}, 9 * STATES + 2),
        ({"gated": False}, 9 * STATES + 1),
        ({"skip": False}, 9 * STATES + 1),
        ({"pair": True}, 2 * (9 * STATES + 1) + 1),  # one gate for both directions
        ({"return_last_state": True, "reverse": True}, 9 * STATES + 2),
    ],
)
def test_scan(device, options, each):
    forward, backward = counts(lambda: scan(device, **options))
    assert forward == {"vim_kernels.selective_scan": each * ELEMENTS}
    assert backward == {"vim_kernels.selective_scan_backward": 2 * each * ELEMENTS}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filters", [1, 2])
def test_causal_convolution(device, filters):
    x, weight, bias = (tensor(*s, device=device) for s in ((BATCH, LENGTH, CHANNELS), (CHANNELS, 4), (CHANNELS,)))

    def run():
        if filters == 1:
            return causal_conv1d(x, weight, bias, activation="silu")
        return bidirectional_causal_conv1d(x, [weight, weight], [bias, bias])

    forward, backward = counts(run)
    assert forward == {"vim_kernels.causal_conv1d": 2 * 4 * filters * ELEMENTS}
    assert backward == {"vim_kernels.causal_conv1d_backward": 2 * 2 * 4 * filters * ELEMENTS}


@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if name in available_backends()])
def test_a_named_backend_counts_the_same(backend):
    assert counts(lambda: scan(backend=backend)) == counts(scan)


def heads(length=LENGTH, device="cpu", skip=True, dtype=torch.float32, **options):
    x = tensor(BATCH, length, HEADS, HEAD_DIM, device=device, dtype=dtype)
    dt, A = tensor(BATCH, length, HEADS, device=device, dtype=dtype), -tensor(HEADS, device=device).square()
    B, C = (tensor(BATCH, length, GROUPS, WIDE, device=device, dtype=dtype) * sign for sign in (1, -1))
    return ssd(x, dt, A, B, C, D=tensor(HEADS, device=device) if skip else None, **options)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [*((d, torch.float32) for d in ("cpu", "meta")), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(("length", "chunk"), [(96, 16), (40, 64)])
@pytest.mark.parametrize("skip", [True, False])
def test_ssd(device, dtype, length, chunk, skip):
    forward, backward = counts(lambda: heads(length, device, skip, dtype, chunk_size=chunk))
    scores = 2 * min(chunk, length) * GROUPS * WIDE
    weighted = 2 * min(chunk, length) * HEADS * HEAD_DIM
    into_and_out_of_states = 2 * 2 * HEADS * HEAD_DIM * WIDE
    each = scores + weighted + into_and_out_of_states + (HEADS * HEAD_DIM if skip else 0)
    assert forward == {"vim_kernels.count_ssd": BATCH * length * each}
    assert backward == {"vim_kernels.count_ssd": 2 * BATCH * length * each}


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the cpu backend")
def test_ssd_in_an_exported_program():
    """It calls the operator, which counts as the function does."""
    row = BATCH, 96
    x, dt, A = tensor(*row, HEADS, HEAD_DIM), tensor(*row, HEADS), -tensor(HEADS).square()
    B, D = tensor(*row, GROUPS, WIDE), tensor(HEADS)
    forward, backward = counts(lambda: torch.ops.vim_kernels.ssd(x, dt, A, B, B, D, None, None, True, False, 16)[0])
    want = counts(lambda: heads(96, chunk_size=16))
    assert forward == {"vim_kernels.ssd": want[0]["vim_kernels.count_ssd"]}
    assert backward == {"vim_kernels.ssd_backward": want[1]["vim_kernels.count_ssd"]}


def test_ssd_counts_the_products_that_torch_does():
    """All but the carry between chunks, which torch computes as a product of the four states before and after them."""
    length, chunk, chunks = 48, 16, 3

    class Products(TorchDispatchMode):
        flops, reported = 0, False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reported |= func is torch.ops.vim_kernels.count_ssd.default
            if func is torch.ops.aten.bmm.default:
                self.flops += 2 * args[0].numel() * args[1].shape[2]
            return func(*args, **(kwargs or {}))

    with Products() as products:  # not a FLOP counter: it sees what is computed
        heads(length, skip=False, chunk_size=chunk, backend="torch")
    carry = 2 * BATCH * HEADS * (1 + chunks) ** 2 * HEAD_DIM * WIDE
    forward, _ = counts(lambda: heads(length, skip=False, chunk_size=chunk))
    assert products.flops - carry == forward["vim_kernels.count_ssd"]
    assert not products.reported


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("others", [(), (3,)])
def test_long_convolution(device, others):
    u, kernel = tensor(BATCH, LENGTH, *others, CHANNELS, device=device), tensor(CHANNELS, LENGTH, device=device)
    rows = BATCH * math.prod(others) * CHANNELS
    forward, backward = counts(lambda: long_conv(u, kernel, method="matrix"))
    assert forward == {"vim_kernels.count_long_conv": 2 * rows * LENGTH**2}
    assert backward == {"vim_kernels.count_long_conv": 2 * 2 * rows * LENGTH**2}
    forward, backward = counts(lambda: long_conv(u, kernel))
    transforms, spectra = (2 * rows + CHANNELS) * FFT_16, 6 * 9 * rows  # 2 * 7 - 1 steps fit into 16
    assert forward == {"vim_kernels.count_long_conv": transforms + spectra}
    assert backward == {"vim_kernels.count_long_conv": transforms + 2 * spectra}


def long_inputs():
    return tensor(BATCH, LENGTH, CHANNELS), tensor(CHANNELS, LENGTH)


def head_inputs():
    """x, dt, A, B, C, D, dt_bias, initial_state of ssd."""
    row = BATCH, LENGTH
    shapes = (*row, HEADS, HEAD_DIM), (*row, HEADS), (HEADS,), (*row, GROUPS, WIDE), (*row, GROUPS, WIDE), (HEADS,)
    return *(tensor(*shape) for shape in shapes), None, tensor(BATCH, HEADS, HEAD_DIM, WIDE)


def run_ssd(x, dt, A, B, C, D, dt_bias, initial_state):
    options = {"D": D, "dt_bias": dt_bias, "initial_state": initial_state, "return_last_state": True}
    return ssd(x, dt, -A.square(), B, C, chunk_size=3, reverse=True, **options)


def run_long_conv(u, kernel):
    return (long_conv(u, kernel, ahead=2),)


@pytest.mark.parametrize(("inputs", "run"), [(head_inputs, run_ssd), (long_inputs, run_long_conv)])
@pytest.mark.parametrize("learns", ["all", "the first", "the last"])
@pytest.mark.parametrize("output", [0, -1])
def test_a_counter_changes_no_result(inputs, run, learns, output):
    """Neither outputs nor gradients, whichever input learns and whichever output is used."""
    found = []
    for count in (False, True):
        given = inputs()
        kept = {"all": given, "the first": given[:1], "the last": given[-1:]}[learns]
        for t in given:
            if t is not None:
                t.requires_grad_(any(t is k for k in kept))
        if count:
            with FlopCounterMode(display=False):
                outputs = run(*given)
                outputs[output].square().sum().backward()
        else:
            outputs = run(*given)
            outputs[output].square().sum().backward()
        found.append([*outputs, *(None if t is None else t.grad for t in given)])
    for plain, counted in zip(*found, strict=True):
        assert (plain is None) == (counted is None)
        if plain is not None:
            assert_close(counted, plain, atol=0, rtol=0)


def test_length_zero_under_a_counter():
    with FlopCounterMode(display=False) as counter:
        assert heads(0).shape == (BATCH, 0, HEADS, HEAD_DIM)
        assert long_conv(torch.zeros(BATCH, 0, CHANNELS), torch.zeros(CHANNELS, 1)).numel() == 0
    assert counter.get_total_flops() == 0


def test_transforms_under_a_counter():
    """torch.func differentiates ATen operators alone; the counter sees those."""
    x, dt, A, B, C, *_ = (None if t is None else t.detach() for t in head_inputs())

    def loss(x):
        return ssd(x, dt, -A.square(), B, C).square().sum()

    want = grad(loss)(x)
    with FlopCounterMode(display=False):
        got = grad(loss)(x)
    assert_close(got, want)


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors(inside):
    """With the counter in or around the mode of fake tensors, which must see all operators."""
    fake, counter = FakeTensorMode(), FlopCounterMode(display=False)
    with fake:
        u, kernel = (torch.randn(t.shape).requires_grad_() for t in long_inputs())
        row = BATCH, 40
        x, dt = torch.randn(*row, HEADS, HEAD_DIM).requires_grad_(), torch.randn(*row, HEADS)
        B, A = torch.randn(*row, GROUPS, WIDE), torch.randn(HEADS)
    outer, inner = (fake, counter) if inside else (counter, fake)
    with outer, inner:
        ssd(x, dt, A, B, B, backend="torch").sum().backward()
        long_conv(u, kernel).sum().backward()
    want = [
        sum(by.values())
        for make in (lambda: heads(40, skip=False), lambda: long_conv(*long_inputs()))
        for by in counts(make)
    ]
    assert counter.get_total_flops() == sum(want)
    assert x.grad.shape == x.shape


def test_a_second_derivative_under_a_counter_is_refused():
    u, kernel = long_inputs()
    with FlopCounterMode(display=False):
        (du,) = torch.autograd.grad(long_conv(u, kernel).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        du.sum().backward()
