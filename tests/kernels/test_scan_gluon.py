"""The scan in Gluon on a GPU, forward and backward: parity of outputs and gradients with the fp64 reference."""

import pytest
import torch
import triton
from scan_inputs import pair_inputs, scan_inputs
from triton_checks import pair_excess, scan_excess, turned

from vim_kernels import bidirectional_selective_scan, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
BF16, FP16 = ({"dtype": dtype, "device": "cuda"} for dtype in (torch.bfloat16, torch.float16))


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[str]:
    """Pass and number of directions of each launch."""
    from vim_kernels.triton_kernels import scan_gluon, scan_gluon_backward

    found: list[str] = []

    def count(module, name):
        launch = getattr(module, name)

        def counted(*args, **kwargs):
            directions = next(value for value in args if not isinstance(value, torch.Tensor))
            found.append(f"{'backward' if name == 'launch_backward' else 'forward'} {len(directions)}")
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(scan_gluon, "launch")
    count(scan_gluon_backward, "launch_backward")
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs start as NaN
    yield found
    torch.use_deterministic_algorithms(False)


def assert_within(found: dict[str, float]) -> None:
    assert found
    assert not {name: fraction for name, fraction in found.items() if not fraction <= 1}


@pytest.mark.parametrize("precision", [BF16, FP16], ids=lambda p: str(p["dtype"]))
def test_pair(launches, precision):
    """Lengths around slots, rings, halves and saved states; channels that fill no program, or more than one."""
    for length in (1, 2, 3, 15, 16, 17, 31, 64, 150, 257):
        assert_within(pair_excess(length=length, **precision))
    for d_inner in (8, 128, 136, 264):
        assert_within(pair_excess(length=37, d_inner=d_inner, batch=3, **precision))
    assert set(launches) == {"forward 2", "backward 2"}


@pytest.mark.parametrize("options", [{"absent": ("z",)}, {"absent": ("D", "dt_bias")}, {"groups": 3}], ids=str)
def test_pair_in_other_forms(launches, options):
    assert_within(pair_excess(length=67, **options, **BF16))
    assert launches


@pytest.mark.parametrize("reverse", [False, True])
def test_one_direction(launches, reverse):
    """With states going in and out."""
    for length in (1, 9, 70):
        assert_within(scan_excess(length=length, reverse=reverse, **BF16))
    assert_within(scan_excess(length=33, reverse=reverse, dt_softplus=False, absent=("D", "dt_bias"), **BF16))
    assert set(launches) == {"forward 1", "backward 1"}


@pytest.mark.parametrize(
    "rows", [None, [[1, 3, 60, 11, 1, 51, 1, 472], [600]], [[128, 256, 1, 3, 212], [10, 590]]], ids=str
)
def test_windows_and_packed_sequences(launches, rows):
    assert_within(pair_excess(length=600, d_inner=40, rows=rows, **BF16))
    assert_within(scan_excess(length=600, d_inner=40, rows=rows, reverse=True, **BF16))
    # Each pass first finds the ends of the windows.
    assert launches == [name for n in (2, 1) for name in (*[f"forward {n}"] * 3, f"backward {n}")]


def test_dtypes_may_differ(launches):
    inputs = pair_inputs(length=21, device="cuda", dtype=torch.bfloat16)
    want = bidirectional_selective_scan(**inputs, backend="triton")
    mixed = inputs | {"z": inputs["z"].half(), "dt": tuple(t.half() for t in inputs["dt"])}
    got = bidirectional_selective_scan(**mixed, backend="triton")
    assert launches == ["forward 2", "forward 2"]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_steps_that_forget_everything_and_steps_of_no_size():
    """Exponents of -1e4 and inputs of softplus of -100: no NaN, and both backends agree."""
    inputs = scan_inputs(length=40, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        inputs["dt"][:, 3], inputs["dt"][:, 20:25] = 1e4, -100.0
    got = selective_scan(**inputs, backend="triton")
    want = selective_scan(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    assert ((got.double() - want).norm() / want.norm()).item() < 5e-3


def test_what_it_does_not_take(launches, monkeypatch):
    """Rows of no whole words, other numbers of states, fp32, and an untried version of Triton."""
    assert_within(pair_excess(length=9, d_inner=20, **BF16))
    assert_within(pair_excess(length=9, d_state=8, **BF16))
    selective_scan(**turned(scan_inputs(length=5, device="cuda", dtype=torch.float32), "z"), backend="triton")
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    assert_within(pair_excess(length=9, **BF16))
    assert launches == []
