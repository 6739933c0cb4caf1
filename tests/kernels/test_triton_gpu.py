"""The Triton kernels on a GPU: parity with the fp64 reference, memory, determinism, compilation."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from scan_inputs import pair_inputs, scan_inputs
from triton_checks import (
    conv_excess,
    conv_inputs,
    conv_pair_excess,
    error,
    excess,
    extreme_inputs,
    leaves,
    norm_excess,
    pair_excess,
    results,
    scan_excess,
    ssd_excess,
    ssd_inputs,
    ssd_results,
    step_excess,
    uneven_pair,
    widened_convolutions,
    widened_pair,
)

from vim_kernels import (
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    pre_norm,
    rms_norm,
    selective_scan,
    ssd,
)

pytestmark = pytest.mark.gpu

# fp32 on a GPU: 1e-4 of the largest value of a tensor, outputs and gradients.
FP32 = {"dtype": torch.float32, "device": "cuda", "limit": 1e-4}
FP64 = {"dtype": torch.float64, "device": "cuda", "limit": 1e-11}
# Without a limit the budget is the error of an eager run in the same dtype.
LOW = [{"dtype": dtype, "device": "cuda"} for dtype in (torch.bfloat16, torch.float16)]
PRECISIONS = [FP32, FP64, *LOW]

# Compilation takes most of the time: some 5 s for each d_state, dtype and set of arguments. One d_state for tests that
# do not depend on it, and not 16, because half precision with 16 states is `scan_gluon`'s.
QUICK = {"d_state": 24}

# Odd lengths, lengths around the checkpoint interval, channels and states off powers of two, each argument absent.
SHAPES = [
    {},
    {"length": 1},
    {"batch": 1, "length": 32, "d_inner": 5},
    {"length": 70, "d_inner": 130, "reverse": True},
    {"length": 33, "d_inner": 1, "d_state": 1},
    {"length": 65, "d_inner": 130, "d_state": 3, "absent": ("D", "z", "dt_bias", "initial_state")},
    {"length": 70, "d_state": 17, "absent": ("D", "dt_bias", "initial_state"), "reverse": True},
    {"length": 40, "d_state": 64},
    {"length": 9, "d_inner": 5, "d_state": 300},
    {"groups": 2, "length": 34},
    {"groups": 3, "d_inner": 33, "d_state": 5, "absent": ("z",), "reverse": True},
]


def assert_within(found: dict[str, float]) -> None:
    assert found
    assert not {name: fraction for name, fraction in found.items() if not fraction <= 1}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Outputs and scratch memory start as NaN, so that elements not written, or read too early, show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_equals_reference(shape):
    assert_within(scan_excess(**shape, **FP32))


@pytest.mark.parametrize("precision", [FP64, *LOW], ids=lambda p: str(p["dtype"]))
def test_scan_in_other_precisions(precision):
    for length in (1, 37, 64):
        assert_within(scan_excess(length=length, **QUICK, **precision))


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p["dtype"]))
def test_pair_equals_reference(precision):
    for length in (1, 37, 64):
        assert_within(pair_excess(length=length, **precision))


@pytest.mark.parametrize("shape", [{"groups": 2, "length": 5}, {"absent": ("z",)}], ids=str)
def test_pair_in_other_forms(shape):
    assert_within(pair_excess(**shape, **QUICK, **FP32))


@pytest.mark.parametrize("precision", [FP32, LOW[0]], ids=lambda p: str(p["dtype"]))
def test_vim_tiny_at_224_pixels(precision):
    """Batch 8 runs in windows, 32 in whole sequences."""
    for batch in (8, 32):
        assert_within(pair_excess(batch=batch, length=197, d_inner=384, **precision))


@pytest.mark.parametrize("precision", [FP32, LOW[0]], ids=lambda p: str(p["dtype"]))
def test_windows(precision):
    """Sequences long enough for several, the last one short, with states going in and out."""
    from vim_kernels.directions import Direction
    from vim_kernels.triton_kernels.scan_windows import window_length

    d = Direction(torch.empty(2, 600, 40), None, None, None, None, None, None, None, False)
    assert 600 / window_length(d, 1) > 2
    shape = {"batch": 2, "length": 600, "d_inner": 40, **precision}
    for reverse in (False, True):
        assert_within(scan_excess(**shape, **QUICK, reverse=reverse))
    assert_within(pair_excess(**shape))


# Cuts next to the ends of blocks, halves, saved states and chunks of the convolution, and a row of one sequence.
PACKED = {"length": 150, "rows": [[1, 3, 60, 11, 1, 51, 1, 22], [150]]}
# Windows of 128 steps with and without cuts, and cuts between windows.
PACKED_WINDOWS = {"length": 600, "rows": [[128, 256, 1, 3, 212], [10, 590]]}


@pytest.mark.parametrize("precision", [FP32, FP64, LOW[0]], ids=lambda p: str(p["dtype"]))
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(reverse, precision):
    assert_within(conv_excess(**PACKED, **precision, reverse=reverse))
    for shape in (PACKED, PACKED_WINDOWS):
        assert_within(scan_excess(**shape, **QUICK, **precision, reverse=reverse))


@pytest.mark.parametrize("precision", [FP32, FP64, LOW[0]], ids=lambda p: str(p["dtype"]))
def test_packed_sequences_of_pairs(precision):
    assert_within(conv_pair_excess(**PACKED, **precision))
    for shape in (PACKED, PACKED_WINDOWS):
        assert_within(pair_excess(**shape, **QUICK, **precision))


def test_packed_sequences_of_vim():
    assert_within(pair_excess(**PACKED, **LOW[0]))


def test_uneven_pairs_and_strides():
    assert_within(excess(bidirectional_selective_scan, uneven_pair(device="cuda", **QUICK)))
    assert_within(excess(bidirectional_selective_scan, widened_pair("cuda", **QUICK), limit=2e-7))
    assert_within(excess(bidirectional_causal_conv1d, widened_convolutions("cuda"), activation="silu", limit=2e-7))


def test_extremes():
    assert_within(excess(selective_scan, extreme_inputs(device="cuda"), limit=1e-4))
    low = extreme_inputs(torch.bfloat16, "cuda")
    assert all(t.isfinite().all() for t in results(selective_scan, low, backend="triton").values())


CONVOLUTIONS = [
    {"length": 197, "channels": 384},
    {"length": 2},
    {"length": 1, "width": 2},
    {"width": 1, "absent": ("bias",)},
    {"width": 3, "channels": 130, "absent": ("initial_state",)},
    {"width": 9, "length": 20},
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution_equals_reference(shape):
    for reverse in (False, True):
        assert_within(conv_excess(**shape, reverse=reverse, **FP32))
    assert_within(conv_pair_excess(**shape, **FP32))


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p["dtype"]))
def test_convolution_in_other_precisions(precision):
    assert_within(conv_excess(**precision))
    assert_within(conv_excess(**precision, activation=None))


def test_block_step():
    assert_within(step_excess(3, device="cuda"))
    assert_within(step_excess(2, small=True, device="cuda"))
    assert_within(step_excess(9, small=True, device="cuda"))


def test_norm():
    assert_within(norm_excess(device="cuda"))
    assert_within(norm_excess((12_345, 96), device="cuda"))
    assert_within(norm_excess((2, 5000), out=torch.bfloat16, device="cuda", limit=8e-3))
    assert_within(norm_excess((77, 384), dtype=torch.bfloat16, device="cuda", limit=8e-3))
    assert_within(norm_excess((3, 997, 384), dtype=torch.bfloat16, gated=True, device="cuda", limit=8e-3))
    assert_within(norm_excess((12_345, 96), gated=True, groups=4, device="cuda"))
    x, weight = (torch.randn(*shape, 20, device="cuda", dtype=torch.float64) for shape in ((2, 3), ()))
    assert torch.autograd.gradcheck(rms_norm, [x.requires_grad_(), weight.requires_grad_()])
    assert rms_norm(x[:0], weight).shape == (0, 3, 20)


DUALITIES = [
    {"length": 197, "heads": 6, "head_dim": 64, "groups": 1, "d_state": 64, "strided": True},
    {"length": 197, "heads": 6, "head_dim": 64, "groups": 1, "d_state": 64, "reverse": True},
    {"batch": 1, "length": 5000, "heads": 2, "head_dim": 64, "groups": 1, "d_state": 64},
    {"length": 130, "head_dim": 64, "d_state": 16, "reverse": True},
    {"length": 130, "heads": 2, "head_dim": 64, "groups": 1, "d_state": 128, "strided": True},
    {"length": 70, "heads": 2, "head_dim": 128, "groups": 1, "d_state": 256, "chunk_size": 32},
    {"length": 70, "head_dim": 20, "d_state": 70, "absent": ("D", "dt_bias", "initial_state"), "chunk_size": 16},
    {"length": 1, "head_dim": 3, "d_state": 5},
    {"length": 20, "head_dim": 16, "d_state": 16, "dt_softplus": False, "absent": ("dt_bias",)},
    {"length": 200, "head_dim": 8, "forgetting": 100},
]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", DUALITIES, ids=str)
def test_duality_equals_recurrence(shape, dtype, in_order, monkeypatch):
    from vim_kernels.triton_kernels import ssd_states as triton_ssd_states

    monkeypatch.setattr(triton_ssd_states, "PROGRAMS", 1 if in_order else 10**9)
    assert_within(ssd_excess(dtype, device="cuda", **shape))


def test_duality_takes_its_kernels():
    given = ssd_inputs(torch.bfloat16, device="cuda", length=100)
    want, state = torch.ops.vim_kernels.ssd(*given.values(), True, False, 64, "triton")
    y, last = ssd(**given, return_last_state=True)
    assert y.equal(want)
    assert last.equal(state)
    assert ssd(**given, backend="triton").equal(want)
    assert not ssd(**given, backend="torch").equal(want)
    assert ssd(**given | {"A": given["A"].double()}).dtype == torch.bfloat16
    assert ssd(**given | {name: given[name][:, :0] for name in ("x", "dt", "B", "C")}).shape[1] == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_duality_at_extremes(reverse):
    given = ssd_inputs(torch.bfloat16, device="cuda", length=100)
    with torch.no_grad():
        given["dt"][:, ::7] = 1e6
        given["dt"][:, 3::7] = -1e6
    found = ssd_results(ssd, given, reverse=reverse, return_last_state=True)
    assert all(t.isfinite().all() for t in found.values())
    assert_within(ssd_excess(torch.bfloat16, device="cuda", length=200, forgetting=1e9, reverse=reverse))


def test_golden_scan(golden):
    t = {name: tensor.cuda() for name, tensor in golden("g4_selective_scan").items()}
    sequences = ("u", "delta", "B", "C", "z")
    names = {"u": "u", "dt": "delta", "A": "A", "B": "B", "C": "C", "z": "z", "D": "D", "dt_bias": "delta_bias"}
    official = {ours: t[name].transpose(1, 2) if name in sequences else t[name] for ours, name in names.items()}
    inputs = leaves(official)
    y, state = selective_scan(**inputs, return_last_state=True, backend="triton")
    assert error(y, t["output_f64"].transpose(1, 2)) < 5e-4
    assert error(state, t["last_state_f64"]) < 5e-4
    loss = (y * t["loss_weight"].transpose(1, 2)).sum()
    with_state = loss + (state * t["last_state_weight"]).sum()
    for prefix, total in (("grad_f64.", loss), ("grad_with_state_f64.", with_state)):
        gradients = torch.autograd.grad(total, inputs.values(), retain_graph=True)
        for (ours, name), got in zip(names.items(), gradients, strict=True):
            want = t[prefix + name]
            assert error(got, want.transpose(1, 2) if name in sequences else want) < 5e-4, ours


@pytest.mark.parametrize("name", ["real", "groups"])
def test_golden_forms(name, golden):
    t = {key: tensor.cuda() for key, tensor in golden(f"ssm_scan_{name}").items()}

    def ours(prefix):
        found = {}
        for theirs in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
            if prefix + theirs in t:
                value = t[prefix + theirs]
                value = value.permute(0, 3, 1, 2) if value.dim() == 4 else value
                value = value.transpose(1, 2) if value.dim() == 3 else value
                found[{"delta": "dt", "delta_bias": "dt_bias"}.get(theirs, theirs)] = value
        return found

    inputs = leaves(ours("in."))
    y, state = selective_scan(**inputs, return_last_state=True, backend="triton")
    assert error(y, t["out.y"].transpose(1, 2)) < 5e-4
    assert error(state, t["out.last_state"]) < 5e-4
    gradients = torch.autograd.grad((y * t["in.cotangent"].transpose(1, 2)).sum(), inputs.values())
    for (key, want), got in zip(ours("grad.").items(), gradients, strict=True):
        assert error(got, want) < 5e-4, key


def digests() -> dict[str, str]:
    """Hash of every output and gradient, for shapes with different tiles and with sums over many programs."""
    found = {}
    for batch, length, d_inner in ((8, 197, 384), (1, 1000, 192), (2, 37, 48)):
        inputs = pair_inputs(batch=batch, length=length, d_inner=d_inner, dtype=torch.bfloat16, device="cuda")
        for name, t in results(bidirectional_selective_scan, inputs, backend="triton").items():
            found[f"{batch} {name}"] = hashlib.sha256(t.cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        inputs = conv_inputs(batch=batch, length=length, channels=d_inner, dtype=torch.bfloat16, device="cuda")
        for name, t in results(causal_conv1d, inputs, activation="silu", backend="triton").items():
            found[f"{batch} conv {name}"] = hashlib.sha256(t.cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        inputs = ssd_inputs(torch.bfloat16, device="cuda", batch=batch, length=length, head_dim=64, d_state=64)
        for name, t in ssd_results(ssd, inputs, return_last_state=True).items():
            found[f"{batch} ssd {name}"] = hashlib.sha256(t.cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
    return found


def test_two_processes_give_the_same_bits():
    from processes import outputs  # not if this file runs as a program

    here = digests()  # first, so that the other processes find compiled kernels
    runs = [subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [json.loads(out.splitlines()[-1]) for out, _ in outputs(*runs)] == [here, here]


def test_a_new_length_compiles_nothing():
    from vim_kernels.triton_kernels import conv as triton_conv
    from vim_kernels.triton_kernels import norm as triton_norm
    from vim_kernels.triton_kernels import scan_plain as triton_scan_plain
    from vim_kernels.triton_kernels import scan_windows as triton_scan_windows
    from vim_kernels.triton_kernels import ssd as triton_ssd
    from vim_kernels.triton_kernels import ssd_backward as triton_ssd_backward
    from vim_kernels.triton_kernels import ssd_states as triton_ssd_states

    kernels = [
        triton_scan_plain._forward_kernel,
        triton_scan_plain._backward_kernel,
        triton_scan_windows._starts_kernel,
        triton_conv._forward_kernel,
        triton_conv._backward_kernel,
        triton_conv._tap_sums_kernel,
        triton_ssd_states._steps,
        triton_norm._forward_kernel,
        triton_norm._backward_kernel,
        triton_ssd_states._states,
        triton_ssd._outputs,
        triton_ssd_backward._gradients,
        triton_ssd_backward._step_gradients,
        triton_ssd_backward._sums,
    ]

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(batch, length):
        """B and C as a slice of a projection's output, 44 wide, whose batch stride has no fixed alignment."""
        for dtype in (torch.bfloat16, torch.float32):
            inputs = pair_inputs(batch=batch, length=length, d_inner=384, dtype=dtype, device="cuda")
            projections = [torch.randn(batch, length, 44, device="cuda", dtype=dtype) for _ in range(2)]
            inputs["B"] = tuple(p[..., 12:28].requires_grad_() for p in projections)
            inputs["C"] = tuple(p[..., 28:].requires_grad_() for p in projections)
            results(bidirectional_selective_scan, inputs, backend="triton")
        inputs = conv_inputs(batch=batch, length=length, channels=384, dtype=torch.bfloat16, device="cuda")
        results(causal_conv1d, inputs, activation="silu", backend="triton")
        weight = torch.ones(384, device="cuda", requires_grad=True)
        pre_norm(inputs["x"], weight, heading=True, reverse=True)[1].sum().backward()
        inputs = ssd_inputs(
            torch.bfloat16, device="cuda", batch=batch, length=length, head_dim=64, d_state=64, strided=True
        )
        ssd_results(ssd, inputs, return_last_state=True)

    run(4, 197)
    before = compiled()
    for batch, length in ((4, 196), (4, 785), (4, 64), (4, 1), (3, 200), (1, 333)):
        run(batch, length)
        assert compiled() == before, (batch, length)


def test_one_graph_under_compile():
    inputs = pair_inputs(length=50, dtype=torch.bfloat16, device="cuda")
    step = torch.compile(lambda **given: bidirectional_selective_scan(**given) * 2.0, fullgraph=True)
    got = results(step, inputs)
    want = results(lambda **given: bidirectional_selective_scan(**given) * 2.0, leaves(inputs))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_duality_under_compile():
    """A compiled program keeps the kernels, and with them every bit."""
    given = ssd_inputs(torch.bfloat16, device="cuda", length=100, strided=True)
    options = {"reverse": True, "return_last_state": True}
    want = ssd_results(ssd, given, **options)
    got = ssd_results(torch.compile(ssd, fullgraph=True), given, **options)
    for name in want:
        assert got[name].equal(want[name]), name
    only = torch.compile(lambda **given: ssd(**given) * 2.0, fullgraph=True)(**given)
    assert only.equal(ssd(**given) * 2.0)


def test_one_graph_under_autocast():
    """fp32 inputs stay fp32: autocast leaves the operator alone."""
    inputs = pair_inputs(length=20, dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.compile(bidirectional_selective_scan, fullgraph=True)(**inputs).detach()
    want = bidirectional_selective_scan(**leaves(inputs, dtype=torch.float64), backend="reference").detach()
    assert error(y, want) < 1e-4


def test_offsets_beyond_32_bits_in_strided_inputs():
    """Rows of u are 2^25 elements apart, so the last ones are 2^31 elements or more from the first (4.4 GB)."""
    torch.use_deterministic_algorithms(False)  # do not fill memory that is never read
    far = torch.empty(2, 33, 2**25, dtype=torch.bfloat16, device="cuda")
    inputs = scan_inputs(batch=2, length=33, d_inner=24, dtype=torch.bfloat16, device="cuda")
    near = inputs["u"].detach()
    far[..., :24] = near
    far = far[..., :24].requires_grad_()
    for function, others, name in (
        (selective_scan, inputs, "u"),
        (causal_conv1d, conv_inputs(length=33, dtype=torch.bfloat16, device="cuda"), "x"),
    ):
        want = results(function, others | {name: near.clone().requires_grad_()}, backend="triton")
        for key, t in results(function, others | {name: far}, backend="triton").items():
            assert error(t, want[key].double()) < 1e-2, key


def test_offsets_beyond_32_bits_in_outputs():
    """With more than 2^31 elements, the last batch entry equals a scan of it alone (some 30 GB)."""
    torch.use_deterministic_algorithms(False)
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GB of free GPU memory")
    shape = {"length": 2**13, "d_inner": 2**13, "d_state": 1, "absent": ("z", "initial_state")}
    small = scan_inputs(batch=1, **shape, dtype=torch.bfloat16, device="cuda")
    large = {k: t.detach().expand(33, -1, -1).contiguous() if t.dim() == 3 else t for k, t in small.items()}

    def run(inputs):
        u, dt = (inputs[name].requires_grad_() for name in ("u", "dt"))
        y = selective_scan(**inputs, backend="triton")
        return y.detach()[-1], *(g[-1] for g in torch.autograd.grad(y, (u, dt), torch.ones_like(y)))

    for got, want in zip(run(large), run(small), strict=True):
        assert error(got, want.double()) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device():
    inputs = pair_inputs(length=20, dtype=torch.float32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_within(excess(bidirectional_selective_scan, inputs, limit=1e-4))
    assert_within(excess(causal_conv1d, conv_inputs(dtype=torch.float32, device="cuda:1"), limit=1e-4))


if __name__ == "__main__":
    print(json.dumps(digests()))
