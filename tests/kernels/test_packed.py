"""Packed sequences on every backend of this machine: each gets the result that it gets alone."""

import pytest
import torch
from scan_inputs import pair_inputs, scan_inputs
from torch import Tensor

from vim_kernels import (
    available_backends,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)

BACKENDS = [name for name in available_backends() if name in ("torch", "cpu")]
ALL = [*BACKENDS, "reference"]

# Lengths of the sequences in each row: single steps at both ends and in the middle, cuts around the 32nd step, before
# which the CPU backends save a state, and a row of one sequence. The convolution takes each row twice, with cuts around
# the 128th step, where its tasks end.
ROWS = [[1, 31, 1, 2, 34, 1], [70], [33, 37]]
CONV_ROWS = [[*row, 58 - i, 1, 1, 1, 9 + i] for i, row in enumerate(ROWS)]


def seq_idx_of(rows: list[list[int]], dtype=torch.int64) -> Tensor:
    """(batch, length) of repeating values: 3, 0, 3, 0, ..."""
    return torch.stack(
        [torch.tensor([3 * (i % 2 == 0) for i, n in enumerate(row) for _ in range(n)]) for row in rows]
    ).to(dtype)


def one_by_one(function, rows, sequences: dict, others: dict, initial_state: Tensor | None, *, reverse=False):
    """(y, last state) of function(**sequences, **others, initial_state=...), run on each sequence separately."""
    ys, states = [], []
    for b, lengths in enumerate(rows):
        pieces = list(zip(*(t[b : b + 1].split(lengths, 1) for t in sequences.values()), strict=True))
        state = None if initial_state is None else initial_state[b : b + 1]
        y_row = []
        for piece in reversed(pieces) if reverse else pieces:
            y, last = function(**dict(zip(sequences, piece, strict=True)), **others, initial_state=state)
            y_row.append(y)
            state = None
        ys.append(torch.cat(y_row[::-1] if reverse else y_row, 1))
        states.append(last)
    return torch.cat(ys), torch.cat(states)


def with_gradients(outputs, leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a loss with random weights for all of them."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def as_leaves(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        name: tuple(t.detach().to(dtype).requires_grad_() for t in v)
        if isinstance(v, tuple)
        else v.detach().to(dtype).requires_grad_()
        for name, v in inputs.items()
    }


def flat(inputs: dict) -> list[Tensor]:
    return [t for v in inputs.values() for t in (v if isinstance(v, tuple) else (v,))]


def scans_one_by_one(inputs: dict, rows=ROWS, *, reverse=False):
    sequences = {name: inputs[name] for name in ("u", "dt", "B", "C", "z") if name in inputs}
    others = {name: inputs[name] for name in ("A", "D", "dt_bias") if name in inputs}
    state = inputs.get("initial_state")

    def scan(**given):
        return selective_scan(**given, reverse=reverse, return_last_state=True, backend="reference")

    return one_by_one(scan, rows, sequences, others, state, reverse=reverse)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape",
    [{"d_state": 5}, {"groups": 2, "d_state": 17}, {"d_inner": 1, "absent": ("D", "z", "dt_bias", "initial_state")}],
    ids=str,
)
def test_scan_equals_each_sequence_alone(backend, reverse, shape, relative_error):
    inputs = scan_inputs(3, 70, **shape)
    want = with_gradients(scans_one_by_one(inputs, reverse=reverse), flat(inputs))
    options = {"reverse": reverse, "return_last_state": True, "backend": backend}
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = as_leaves(inputs, dtype)
        got = with_gradients(selective_scan(**leaves, seq_idx=seq_idx_of(ROWS), **options), flat(leaves))
        for name, g, w in zip(("y", "last_state", *inputs), got, want, strict=True):
            assert relative_error(g, w) < limit, (dtype, name)


@pytest.mark.parametrize("backend", ALL)
def test_pair_equals_each_sequence_alone(backend, relative_error):
    inputs = pair_inputs(batch=3, length=70, d_inner=9, d_state=3)
    z = inputs["z"]
    halves = [
        scans_one_by_one({name: pair[i] for name, pair in inputs.items() if name != "z"}, reverse=i == 1)[0]
        for i in range(2)
    ]
    want = with_gradients([0.5 * (halves[0] + halves[1]) * torch.nn.functional.silu(z)], flat(inputs))
    y = bidirectional_selective_scan(**inputs, seq_idx=seq_idx_of(ROWS, torch.int32), backend=backend)
    for g, w in zip(with_gradients([y], flat(inputs)), want, strict=True):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_stays_within_the_eager_error(backend, relative_error):
    inputs = scan_inputs(3, 70, dtype=torch.bfloat16)
    exact = as_leaves(inputs, torch.float64)
    want = with_gradients(scans_one_by_one(exact), flat(exact))
    options = {"seq_idx": seq_idx_of(ROWS), "return_last_state": True}
    eager, got = (
        with_gradients(selective_scan(**inputs, **options, backend=b), flat(inputs)) for b in ("reference", backend)
    )
    for name, g, e, w in zip(("y", "last_state", *inputs), got, eager, want, strict=True):
        assert g.dtype == e.dtype
        assert relative_error(g, w) <= 2.5 * relative_error(e, w) + 1e-5, name


def conv_inputs(width: int, *, batch=3, length=140, channels=5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("width", "activation"), [(1, None), (4, "silu"), (7, None)])
def test_convolution_equals_each_sequence_alone(backend, reverse, width, activation, relative_error):
    """The widest filter reaches across two changes to another sequence with the same seq_idx."""
    inputs = conv_inputs(width)
    options = {"activation": activation, "reverse": reverse, "return_final_state": True}

    def alone(**given):
        return causal_conv1d(**given, **options, backend="reference")

    others = {name: inputs[name] for name in ("weight", "bias")}
    expected = one_by_one(alone, CONV_ROWS, {"x": inputs["x"]}, others, inputs["initial_state"], reverse=reverse)
    want = with_gradients(expected, flat(inputs))
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = as_leaves(inputs, dtype)
        outputs = causal_conv1d(**leaves, **options, seq_idx=seq_idx_of(CONV_ROWS), backend=backend)
        got = with_gradients(outputs, flat(leaves))
        for name, g, w in zip(("y", "final_state", *inputs), got, want, strict=True):
            assert relative_error(g, w) < limit, (dtype, name)


@pytest.mark.parametrize("backend", ALL)
def test_the_last_state_of_short_sequences(backend):
    """For a row that ends with a sequence shorter than the filter's past, and for one that is such a sequence."""
    x = torch.arange(1.0, 5).view(1, 4, 1).expand(2, -1, -1)
    state = torch.tensor([[-5.0, -4, -3, -2, -1]]).expand(2, -1).unsqueeze(-1)
    options = {"weight": torch.ones(1, 6), "initial_state": state, "return_final_state": True, "backend": backend}
    seq_idx = torch.tensor([[0, 1, 0, 0], [2, 2, 2, 2]])
    _, final = causal_conv1d(x, seq_idx=seq_idx, **options)
    assert final.squeeze(-1).tolist() == [[0, 0, 0, 3, 4], [-1, 1, 2, 3, 4]]
    _, final = causal_conv1d(x, seq_idx=seq_idx, reverse=True, **options)
    assert final.squeeze(-1).tolist() == [[0, 0, 0, 0, 1], [-1, 4, 3, 2, 1]]


@pytest.mark.parametrize("backend", ALL)
def test_both_convolutions_at_once(backend, relative_error):
    inputs, other = conv_inputs(4), conv_inputs(4)
    x, pairs = inputs["x"], [(inputs[name], -2 * other[name].detach()) for name in ("weight", "bias")]
    options = {"activation": "silu", "seq_idx": seq_idx_of(CONV_ROWS), "backend": backend}
    got = bidirectional_causal_conv1d(x, *pairs, **options)
    want = [causal_conv1d(x, *(pair[i] for pair in pairs), reverse=i == 1, **options) for i in range(2)]
    leaves = [x, inputs["weight"], inputs["bias"]]
    for g, w in zip(with_gradients(got, leaves), with_gradients(want, leaves), strict=True):
        assert relative_error(g, w) < 1e-13


@pytest.mark.parametrize("backend", ALL)
def test_one_sequence_is_a_row_as_it_was(backend):
    """A constant seq_idx of any value changes no bit, and the initial state counts."""
    inputs = scan_inputs(length=37)
    constant = torch.tensor([[5], [-1]]).expand(-1, 37)
    scans = (
        selective_scan(**inputs, return_last_state=True, **o, backend=backend) for o in ({}, {"seq_idx": constant})
    )
    for a, b in zip(*(with_gradients(y, flat(inputs)) for y in scans), strict=True):
        assert torch.equal(a, b)
    inputs = conv_inputs(4, batch=2, length=37)
    convs = (
        causal_conv1d(**inputs, return_final_state=True, **o, backend=backend) for o in ({}, {"seq_idx": constant})
    )
    for a, b in zip(*(with_gradients(y, flat(inputs)) for y in convs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_cut(backend, length):
    seq_idx = torch.zeros(2, length, dtype=torch.int32)
    inputs = scan_inputs(length=length)
    y, state = selective_scan(**inputs, seq_idx=seq_idx, return_last_state=True, backend=backend)
    assert torch.equal(y, selective_scan(**inputs, backend=backend))
    assert length or torch.equal(state, inputs["initial_state"])
    inputs = conv_inputs(4, batch=2, length=length)
    y, state = causal_conv1d(**inputs, seq_idx=seq_idx, return_final_state=True, backend=backend)
    assert torch.equal(y, causal_conv1d(**inputs, backend=backend))
    assert length or torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, reverse):
    inputs = scan_inputs(1, 35, 3, 2)
    names, seq_idx = list(inputs), seq_idx_of([[1, 2, 29, 3]])
    options = {"seq_idx": seq_idx, "reverse": reverse, "backend": backend}

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), return_last_state=True, **options)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True)
    inputs = conv_inputs(4, batch=1, length=35, channels=2)

    def convolve(*tensors):
        return causal_conv1d(
            *tensors[:3], initial_state=tensors[3], return_final_state=True, activation="silu", **options
        )

    assert torch.autograd.gradcheck(convolve, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs = scan_inputs(length=34, dtype=torch.float32, groups=1)
    z = inputs.pop("z")
    columns = [[inputs[n]] for n in ("u", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")]
    cuts = torch.zeros(2, 35, dtype=torch.bool)
    cuts[:, 20] = True
    args = (*columns, z, cuts, [False], True, 1.0, True, backend)
    torch.library.opcheck(torch.ops.vim_kernels.selective_scan, args)
    x, weight, bias, state = conv_inputs(4, batch=2, length=34).values()
    args = (x, [weight], [bias], state, cuts[:, :-1].cumsum(1, dtype=torch.int32), True, [True], backend)
    torch.library.opcheck(torch.ops.vim_kernels.causal_conv1d, args)


class Both(torch.nn.Module):
    """A convolution, and a scan over its output."""

    def forward(self, u, dt, A, B, C, weight, seq_idx):
        u = causal_conv1d(u, weight, activation="silu", seq_idx=seq_idx)
        return selective_scan(u, dt, A, B, C, seq_idx=seq_idx)


def both_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    inputs = scan_inputs(batch, length, dtype=torch.float32)
    seq_idx = torch.arange(length).div(7, rounding_mode="floor").expand(batch, -1) + torch.arange(batch).unsqueeze(1)
    seq_idx[0, 3:] += 1
    return *(inputs[name] for name in ("u", "dt", "A", "B", "C")), torch.ones(24, 4).requires_grad_(), seq_idx


def test_compiles_in_one_graph_for_any_length():
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33):
        inputs = both_inputs(2, length)
        eager, traced = (with_gradients([f(*inputs)], inputs[:-1]) for f in (Both(), compiled))
        for a, b in zip(eager, traced, strict=True):
            assert torch.equal(a, b)


def test_exports_with_a_dynamic_batch_and_length():
    example, *others = ([t.detach() for t in both_inputs(*shape)] for shape in ((2, 20), (3, 41), (3, 2)))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = [{0: batch, 1: length} if t.shape[:2] == (2, 20) else None for t in example]
    program = torch.export.export(Both(), tuple(example), dynamic_shapes=tuple(shapes))
    for other in others:
        assert torch.equal(program.module()(*other), Both()(*other))


def test_runs_on_meta():
    inputs = [t.to("meta") for t in both_inputs(2, 20)]
    assert Both()(*inputs).shape == inputs[0].shape


@pytest.mark.parametrize(
    ("seq_idx", "error", "message"),
    [
        (
            torch.zeros(2, 36, dtype=torch.int64),
            ValueError,
            r"seq_idx must be \(batch, length\) = \(2, 37\), got \(2, 36\)",
        ),
        (torch.zeros(37, dtype=torch.int64), ValueError, r"seq_idx must be \(batch, length\) = \(2, 37\), got \(37,\)"),
        (torch.zeros(2, 37), TypeError, "seq_idx must have a dtype of .*int32.*int64.*, got torch.float32"),
        (torch.zeros(2, 37, dtype=torch.bool), TypeError, "seq_idx must have a dtype of"),
        (
            torch.zeros(2, 37, dtype=torch.int64, device="meta"),
            ValueError,
            "seq_idx must be on the device of [ux], cpu, got meta",
        ),
        ([[0] * 37] * 2, TypeError, "seq_idx must be a tensor, got list"),
    ],
)
def test_a_bad_seq_idx_is_named(seq_idx, error, message):
    scan, pair, conv = (
        scan_inputs(dtype=torch.float32),
        pair_inputs(dtype=torch.float32),
        conv_inputs(4, batch=2, length=37),
    )
    two = {"weight": (conv["weight"],) * 2}
    for call in (
        lambda: selective_scan(**scan, seq_idx=seq_idx),
        lambda: bidirectional_selective_scan(**pair, seq_idx=seq_idx),
        lambda: causal_conv1d(**conv, seq_idx=seq_idx),
        lambda: bidirectional_causal_conv1d(conv["x"], **two, seq_idx=seq_idx),
    ):
        with pytest.raises(error, match=message):
            call()
