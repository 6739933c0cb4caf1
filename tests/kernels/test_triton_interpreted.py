"""The Triton kernels in Triton's interpreter, on the CPU: tiny shapes, every branch.

The interpreter is chosen when a kernel is decorated, so the cases run in a process of their own, which is this file
started as a program: it prints one line of JSON.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU runs the kernels themselves: test_triton_gpu.py"
)

NAMES = [
    "scan_longer_than_a_block",
    "scan_reverse_groups_fp64",
    "scan_one_step_one_state",
    "scan_states_over_lanes",
    "scan_two_channels_of_many_states",
    "scan_bare",
    "scan_every_other_step",
    "scan_bf16_groups",
    "scan_windows",
    "pair_windows",
    "pair_chunks",
    "pair_blocks_of_channels",
    "pair_bf16",
    "pair_that_needs_two_launches",
    "pair_widened",
    "scan_extremes",
    "conv",
    "conv_reverse_fp64",
    "conv_short",
    "conv_width_1",
    "conv_bf16",
    "conv_pair",
    "conv_pair_widened",
    "scan_packed",
    "pair_packed",
    "scan_packed_windows",
    "pair_packed_windows",
    "conv_packed",
    "conv_packed_reverse",
    "conv_pair_packed",
    "norm",
    "norm_in_bf16",
    "norm_gated",
    "norm_in_groups",
    "norm_in_turns",
    "norm_with_a_gate_in_bf16",
    "norm_with_a_gate_in_fp64",
    "norm_strided",
    "stream_pre_norm",
    "stream_heading",
    "stream_heading_fp64",
    "stream_heading_reverse",
    "stream_heading_of_one_token",
    "stream_add",
    "stream_add_and_norm",
    "stream_add_and_norm_reverse",
    "stream_add_and_norm_without_y",
    "stream_pre_norm_alone",
    "stream_in_bf16",
    "stream_in_turns",
    "stream_add_in_turns",
    "swiglu_with_biases",
    "swiglu_in_turns",
    "sums_of_columns",
    "long_fft",
    "long_fft_in_tiles",
    "long_fft_across",
    "long_fft_in_bf16",
    "long_matrix",
    "long_matrix_in_tiles",
    "long_matrix_across",
    "long_matrix_in_bf16",
    "step_of_one",
    "step_of_few",
    "step_of_small_size",
    "step_of_many",
    "step_bf16",
    "ssd_chunks",
    "ssd_reverse_in_slices",
    "ssd_one_step",
    "ssd_bare",
    "ssd_steps_given",
    "ssd_steps_that_forget",
    "ssd_huge_steps",
    "ssd_a_head_a_group",
    "ssd_in_order",
    "ssd_in_order_in_slices",
    "ssd_in_order_bare",
]


def long_convolutions():
    from triton_checks import long_conv_excess

    from vim_kernels.triton_kernels.long_conv import long_conv

    for method in ("fft", "matrix"):
        yield method, long_conv_excess(long_conv, method, lags=4)
        yield f"{method}_in_tiles", long_conv_excess(long_conv, method, (2, 70, 65), 139, 69)
        yield f"{method}_across", long_conv_excess(long_conv, method, (1, 3, 5, 2, 4), 4, 1)
        yield f"{method}_in_bf16", long_conv_excess(long_conv, method, (2, 33, 3), 33, dtype=torch.bfloat16, limit=8e-3)


def column_sums_excess():
    """Few rows and several tiles of them, with a batch and rows of the result that are apart."""
    from triton_checks import error

    from vim_kernels.triton_kernels.column_sums import column_sums

    for count in (3, 5000):
        parts = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(0))
        found = column_sums(parts, torch.zeros(2, 2, 5)[:, 1], 7)
        yield str(count), error(found.contiguous(), parts.double().sum(1) / 7) / 1e-5


def every_other_step() -> dict[str, torch.Tensor]:
    """Inputs with u as a slice of a longer sequence of odd length."""
    from scan_inputs import scan_inputs

    inputs = scan_inputs(length=6, d_inner=3, d_state=2, dtype=torch.float32)
    longer = torch.zeros(2, 13, 3)
    longer[:, :12:2] = inputs["u"].detach()
    return inputs | {"u": longer[:, :12:2].requires_grad_()}


def cases() -> dict[str, dict[str, float]]:
    """Name of a case -> name of an output or gradient -> its error as a fraction of what is allowed."""
    from triton_checks import (
        conv_excess,
        conv_pair_excess,
        excess,
        extreme_inputs,
        norm_excess,
        pair_excess,
        residual_excess,
        scan_excess,
        ssd_excess,
        step_excess,
        swiglu_excess,
        uneven_pair,
        widened_convolutions,
        widened_pair,
    )

    from vim_kernels import (
        add_and_norm,
        add_branch,
        bidirectional_causal_conv1d,
        bidirectional_selective_scan,
        pre_norm,
        selective_scan,
    )
    from vim_kernels.triton_kernels import conv as triton_conv
    from vim_kernels.triton_kernels import norm as triton_norm
    from vim_kernels.triton_kernels import scan_plain as triton_scan_plain
    from vim_kernels.triton_kernels import scan_windows as triton_scan_windows
    from vim_kernels.triton_kernels import ssd_states as triton_ssd_states
    from vim_kernels.triton_kernels import swiglu as triton_swiglu

    bf16 = 0.02  # the interpreter truncates fp32 to bf16; the hardware rounds
    triton_conv.ROWS = 64  # so that short sequences have two chunks
    # Outputs and scratch memory start as NaN, so that unwritten elements show.
    torch.use_deterministic_algorithms(True)
    found = {
        "scan_longer_than_a_block": scan_excess(
            batch=1, length=34, d_inner=5, d_state=3, dtype=torch.float32, limit=1e-5
        ),
        "scan_reverse_groups_fp64": scan_excess(
            length=5, d_inner=6, groups=2, d_state=4, reverse=True, strided=True, dtype=torch.float64, limit=1e-12
        ),
        "scan_one_step_one_state": scan_excess(length=1, d_inner=3, d_state=1, dtype=torch.float32, limit=1e-5),
        "scan_states_over_lanes": scan_excess(
            batch=1, length=3, d_inner=5, d_state=17, dtype=torch.float32, limit=1e-5
        ),
        "scan_two_channels_of_many_states": scan_excess(
            batch=1, length=3, d_inner=3, d_state=257, dtype=torch.float32, limit=1e-5
        ),
        "scan_bare": scan_excess(
            length=5,
            d_inner=3,
            d_state=2,
            absent=("D", "z", "dt_bias", "initial_state"),
            dt_softplus=False,
            dtype=torch.float32,
            limit=1e-5,
        ),
        "scan_every_other_step": excess(selective_scan, every_other_step(), limit=1e-5),
        "scan_bf16_groups": scan_excess(
            batch=1, length=3, d_inner=12, groups=2, d_state=14, dtype=torch.bfloat16, limit=bf16
        ),
        "pair_bf16": pair_excess(batch=1, length=9, d_inner=6, d_state=4, dtype=torch.bfloat16, limit=bf16),
        "pair_that_needs_two_launches": excess(bidirectional_selective_scan, uneven_pair(), limit=bf16),
        "pair_widened": excess(bidirectional_selective_scan, widened_pair(), limit=2e-7),
        "conv_pair_widened": excess(bidirectional_causal_conv1d, widened_convolutions(), activation="silu", limit=2e-7),
        "pair_blocks_of_channels": pair_excess(
            batch=1, length=6, d_inner=70, d_state=6, dtype=torch.float32, limit=1e-5
        ),
        "scan_extremes": excess(selective_scan, extreme_inputs(d_inner=4, d_state=2), limit=1e-5),
        "conv": conv_excess(batch=1, length=18, channels=130, dtype=torch.float32, limit=1e-5),
        "conv_reverse_fp64": conv_excess(length=17, channels=3, width=3, reverse=True, limit=1e-12),
        "conv_short": conv_excess(
            length=2, channels=3, activation=None, reverse=True, strided=True, dtype=torch.float32, limit=1e-5
        ),
        "conv_pair": conv_pair_excess(batch=2, length=70, channels=5, width=3, dtype=torch.float32, limit=1e-5),
        "conv_width_1": conv_excess(length=3, width=1, absent=("bias",), dtype=torch.float32, limit=1e-5),
        "norm": norm_excess(),
        "norm_in_bf16": norm_excess((5, 20), out=torch.bfloat16, limit=bf16),
        "norm_gated": norm_excess((3, 5, 24), gated=True),
        "norm_in_groups": norm_excess((5, 60), gated=True, groups=3, eps=0.5),
        "norm_with_a_gate_in_bf16": norm_excess((5, 20), gated=torch.bfloat16, limit=bf16),
        "norm_with_a_gate_in_fp64": norm_excess((2, 20), out=torch.float64, gated=torch.float64, limit=2e-7),
        "norm_strided": norm_excess((2, 3, 20), gated=True, strided=True),
        "stream_pre_norm": residual_excess(pre_norm),
        "stream_heading": residual_excess(pre_norm, heading=True),
        "stream_heading_fp64": residual_excess(pre_norm, dtype=torch.float64, heading=True, limit=1e-12),
        "stream_heading_reverse": residual_excess(pre_norm, heading=True, reverse=True),
        "stream_heading_of_one_token": residual_excess(pre_norm, (2, 1, 5), heading=True, reverse=True),
        "stream_add": residual_excess(add_branch, bias=True, scale=True),
        "stream_add_and_norm": residual_excess(add_and_norm, heading=True),
        "stream_add_and_norm_reverse": residual_excess(add_and_norm, heading=True, reverse=True, scale=True),
        "stream_add_and_norm_without_y": residual_excess(add_and_norm, heading=True, unused=["y"]),
        "stream_pre_norm_alone": residual_excess(pre_norm, heading=True, unused=["stream"]),
        "stream_in_bf16": residual_excess(add_and_norm, branch_dtype=torch.bfloat16, out=torch.bfloat16, limit=bf16),
        "swiglu_with_biases": swiglu_excess(),
        "sums_of_columns": dict(column_sums_excess()),
        **{f"long_{name}": fractions for name, fractions in long_convolutions()},
        "step_of_one": step_excess(1, d_model=520, d_inner=530, rank=1, d_state=16),  # more than a tile of each
        "step_of_few": step_excess(3, eps=0.5),
        "step_of_small_size": step_excess(2, small=True),
        "step_of_many": step_excess(6, taps=2, d_state=1, eps=0.5),
        "step_bf16": step_excess(2, dtype=torch.bfloat16, limit=2 * bf16),
        # Cuts at and next to the ends of blocks of 4 and 8 steps, of halves and of the convolution's 33 and 35 rows.
        "scan_packed": scan_excess(
            length=14, d_inner=3, d_state=5, rows=[[1, 3, 4, 1, 5], [14]], dtype=torch.float32, limit=1e-5
        ),
        "pair_packed": pair_excess(
            batch=1, length=13, d_inner=3, d_state=3, rows=[[1, 5, 1, 6]], scale=1.5, dtype=torch.float64, limit=1e-12
        ),
        "conv_packed": conv_excess(
            length=70, channels=3, rows=[[1, 1, 32, 1, 2, 1, 1, 31], [70]], dtype=torch.float32, limit=1e-5
        ),
        "conv_packed_reverse": conv_excess(
            batch=1, length=70, channels=3, width=3, reverse=True, rows=[[2, 33, 1, 33, 1]], limit=1e-12
        ),
        "conv_pair_packed": conv_pair_excess(
            batch=1, length=66, channels=3, width=5, rows=[[3, 1, 1, 27, 1, 1, 32]], dtype=torch.float32, limit=1e-5
        ),
        "conv_bf16": conv_excess(length=5, absent=("initial_state",), dtype=torch.bfloat16, limit=bf16),
    }
    # In fp16: the interpreter has no bf16 matrix products.
    half = torch.float16
    wide = {"batch": 1, "length": 70, "heads": 2, "head_dim": 20, "groups": 1, "d_state": 70}
    found |= {
        "ssd_chunks": ssd_excess(half, length=37, chunk_size=16),
        "ssd_reverse_in_slices": ssd_excess(half, **wide, strided=True, reverse=True),
        "ssd_one_step": ssd_excess(half, length=1, head_dim=3, d_state=5),
        "ssd_bare": ssd_excess(half, **wide, absent=("D", "dt_bias", "initial_state")),
        "ssd_steps_given": ssd_excess(half, length=20, dt_softplus=False, absent=("dt_bias",)),
        "ssd_steps_that_forget": ssd_excess(half, length=47, chunk_size=32, forgetting=100, reverse=True),
        "ssd_a_head_a_group": ssd_excess(half, batch=1, length=33, heads=3, groups=3, chunk_size=31, reverse=True),
    }
    huge = ssd_excess(half, length=47, forgetting=3e4)
    found["ssd_huge_steps"] = {name: error for name, error in huge.items() if name != "x"}  # beyond fp16
    # Chunks in order, as if these heads filled the chip.
    triton_ssd_states.PROGRAMS = 1
    found["ssd_in_order"] = ssd_excess(half, length=37, chunk_size=16)
    found["ssd_in_order_in_slices"] = ssd_excess(half, **wide, strided=True, reverse=True)
    found["ssd_in_order_bare"] = ssd_excess(half, **wide, absent=("D", "dt_bias", "initial_state"))
    # Fewer programs than tiles of rows or blocks of channels, so that each takes several in turn.
    triton_norm.PROGRAMS, triton_swiglu.PROGRAMS, triton_scan_plain.REGISTERS = 2, 4, 255
    found["norm_in_turns"] = norm_excess((23, 260), gated=True)
    found["stream_in_turns"] = residual_excess(pre_norm, (1, 13, 260), heading=True, reverse=True)
    found["stream_add_in_turns"] = residual_excess(add_and_norm, (3, 9, 260), heading=True, reverse=True)
    found["swiglu_in_turns"] = swiglu_excess((23, 260))
    # Windows of 16 steps and states saved every 8 steps, so that short sequences have several.
    triton_scan_plain.INTERVAL = triton_scan_windows.INTERVAL = 8
    triton_scan_plain.T, triton_scan_windows.LONGEST = 4, 16
    found["scan_windows"] = scan_excess(batch=1, length=37, d_inner=2, d_state=3, dtype=torch.float32, limit=1e-5)
    # A cut between two windows, and one within a window that lies between windows without cuts.
    found["scan_packed_windows"] = scan_excess(
        batch=1, length=21, d_inner=2, d_state=3, reverse=True, rows=[[16, 5]], dtype=torch.float32, limit=1e-5
    )
    found["pair_packed_windows"] = pair_excess(
        batch=1, length=37, d_inner=2, d_state=2, rows=[[20, 17]], dtype=torch.float32, limit=1e-5
    )
    found["pair_windows"] = pair_excess(
        batch=1, length=21, d_inner=2, d_state=2, absent=("z",), scale=1.5, dtype=torch.float32, limit=1e-5
    )
    triton_scan_windows.LONGEST = 48  # three chunks in each half
    found["pair_chunks"] = pair_excess(batch=1, length=45, d_inner=2, d_state=2, dtype=torch.float32, limit=1e-5)
    return found


def mend_indices() -> None:
    """Triton 3.6 converts one-element arrays to indices by int(), which numpy no longer supports."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name, found):
    assert found[name]
    wrong = {output: fraction for output, fraction in found[name].items() if not fraction <= 1}
    assert not wrong


def test_every_case_is_listed(found):
    assert sorted(found) == sorted(NAMES)


if __name__ == "__main__":
    mend_indices()
    print(json.dumps(cases()))
