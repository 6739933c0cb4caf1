"""The operators return what their fake kernels promise to compilers, and refuse wrong sizes when a traced program
calls them directly."""

import itertools

import pytest
import torch
from scan_inputs import pair_inputs, scan_inputs
from ssd_inputs import inputs as ssd_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from vim_kernels import available_backends

BACKENDS = [name for name in available_backends() if name in ("torch", "cpu")]


def assert_as_promised(operator, *args) -> list[Tensor]:
    """The operator's results, after a check that sizes, dtypes and strides match those of its fake."""
    with FakeTensorMode() as mode:
        fakes = operator(*tree_map_only(Tensor, mode.from_tensor, args))
    found = operator(*args)
    for real, fake in zip(tree_flatten(found)[0], tree_flatten(fakes)[0], strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    return found


def strided(t: Tensor) -> Tensor:
    """The same values with the steps innermost: dense, but not contiguous."""
    return t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scan(backend, pair, dtype):
    for absent, save, layout in itertools.product([(), ("z", "D", "dt_bias")], [False, True], [Tensor.detach, strided]):
        make = pair_inputs if pair else scan_inputs
        given = make(batch=2, length=34, d_inner=6, d_state=3, groups=2, dtype=dtype, absent=absent)
        columns = []
        for name in ("u", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"):
            value = given.get(name, ())
            columns.append([layout(t) for t in (value if isinstance(value, tuple) else (value,))])
        z = layout(given["z"]) if "z" in given else None
        shared = *columns, z, None, [False, True] if pair else [True], True, 0.5
        y, state, *kept = assert_as_promised(torch.ops.vim_kernels.selective_scan, *shared, save, backend)
        if save:
            for d_state in (state, None):
                gradients = layout(y), d_state, *shared, *kept, backend
                assert_as_promised(torch.ops.vim_kernels.selective_scan_backward, *gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [[False], [True], [False, True]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_convolution(backend, reverse, dtype):
    for bare, layout in itertools.product([False, True], [Tensor.detach, strided]):
        generator = torch.Generator().manual_seed(0)
        x, state = (layout(torch.randn(2, n, 5, generator=generator).to(dtype)) for n in (9, 3))
        weight = [layout(torch.randn(5, 4, generator=generator)) for _ in reverse]
        bias = [] if bare else [torch.zeros(5) for _ in reverse]
        args = x, weight, bias, None if bare or len(reverse) == 2 else state, None, True, reverse, backend
        ys = assert_as_promised(torch.ops.vim_kernels.causal_conv1d, *args)
        assert_as_promised(torch.ops.vim_kernels.causal_conv1d_backward, [layout(y) for y in ys], *args)


def test_absent_tensors_are_empty_lists_or_none():
    """A compiled package has None."""
    given = pair_inputs(batch=2, length=9, d_inner=6, d_state=3, groups=2, absent=("D", "dt_bias"))
    present = [[t.detach() for t in given[name]] for name in ("u", "dt", "A", "B", "C")]
    x, weight = torch.randn(2, 9, 5), [torch.randn(5, 4) for _ in range(2)]
    scans, convolutions = [], []
    for absent in ([], None):
        columns = *present, absent, absent, absent
        scans.append(torch.ops.vim_kernels.selective_scan(*columns, None, None, [0, 1], True, 0.5, False, "torch")[0])
        operator = torch.ops.vim_kernels.causal_conv1d
        convolutions.append(operator(x, weight, absent, None, None, True, [0, 1], "torch")[0])
    assert torch.equal(*scans)
    assert torch.equal(*convolutions)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_duality(dtype):
    for bare, layout in itertools.product([False, True], [Tensor.detach, strided]):
        x, dt, A, B, C, *others = (layout(t) for t in ssd_inputs(9, dtype=dtype).values())
        args = x, dt, A.double() if bare else A, B, C, *([None] * 3 if bare else others), True, True
        y, state = assert_as_promised(torch.ops.vim_kernels.ssd, *args)
        for d_state in (layout(state), None):
            assert_as_promised(torch.ops.vim_kernels.ssd_backward, layout(y), d_state, *args)


# Sizes


def cut(t: Tensor, dim: int) -> Tensor:
    """Without the last entry of a dimension: a kernel that assumes the full size would read past the end."""
    return t.narrow(dim, 0, t.shape[dim] - 1).contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scan_of_other_sizes_than_the_kernel_is_told_is_refused(backend):
    """In any dimension of any tensor, including those of the second direction."""
    given = {name: t.detach() for name, t in scan_inputs(length=5, d_inner=4, d_state=3, groups=2).items()}
    z, cuts = given.pop("z"), torch.zeros(2, 6, dtype=torch.bool)

    def scan(second, z=z, cuts=cuts, first=given):
        columns = [[first[name], second[name]] for name in given]
        order = [list(given).index(name) for name in ("u", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")]
        options = [False, True], True, 0.5, False, backend
        return torch.ops.vim_kernels.selective_scan(*(columns[i] for i in order), z, cuts, *options)

    assert scan(given)[0].isfinite().all()
    for name, t in given.items():
        for dim in range(t.dim()):
            with pytest.raises(ValueError, match=rf"^{name} must be \(.*\) in this call, got"):
                scan(given | {name: cut(t, dim)})
    for name, t in (("z", z), ("cuts", cuts)):
        for dim in range(t.dim()):
            with pytest.raises(ValueError, match=rf"^{name} must be \(.*\) in this call, got"):
                scan(given, **{name: cut(t, dim)})
    uneven = given | {name: torch.zeros(2, 5, 3, 3, dtype=torch.float64) for name in ("B", "C")}
    with pytest.raises(ValueError, match=r"^B must have groups that divide d_inner = 4 evenly, got \(2, 5, 3, 3\)"):
        scan(uneven, first=uneven)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolution_of_other_sizes_than_the_kernel_is_told_is_refused(backend):
    x, weight, bias, state = torch.ones(2, 9, 5), torch.ones(5, 4), torch.ones(5), torch.ones(2, 3, 5)
    given = {"weight": weight, "bias": bias, "initial_state": state, "segments": torch.zeros(2, 9, dtype=torch.int32)}

    def convolve(weight, bias, initial_state, segments):
        args = [given["weight"], weight], [given["bias"], bias], initial_state, segments, True, [False, True], backend
        return torch.ops.vim_kernels.causal_conv1d(x, *args)

    assert len(convolve(**given)) == 2
    for name, t in given.items():
        for dim in range(t.dim()):
            with pytest.raises(ValueError, match=rf"^{name} must be \(.*\) .*, got"):
                convolve(**given | {name: cut(t, dim)})
