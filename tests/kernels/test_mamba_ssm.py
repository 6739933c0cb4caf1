"""vim_kernels.mamba_ssm: the functions of mamba_ssm and causal_conv1d equal loops over their mathematics in fp64."""

from types import SimpleNamespace

import mamba_ssm_loops as loops
import pytest
import torch
import torch.nn.functional as F
from mamba_ssm_loops import Draw

import vim.layers
from vim_kernels import mamba_ssm
from vim_kernels.mamba_ssm.install import MODULES

SETS = 100
CASES = {
    "scan": (Draw.scan, mamba_ssm.selective_scan_fn, loops.scan, "return_last_state"),
    "conv": (Draw.conv, mamba_ssm.causal_conv1d_fn, loops.conv, "return_final_states"),
    "chunk_scan": (Draw.chunk_scan, mamba_ssm.mamba_chunk_scan_combined, loops.chunk_scan, "return_final_states"),
}


def assert_equal_to_the_loop(name, draw, relative_error, output_limit, grad_limit):
    """Outputs, states and all gradients of one random call."""
    make, function, loop, state_option = CASES[name]
    call = make(draw)
    got = function(**call)
    got = got if call[state_option] else (got,)
    leaves = {k: v.detach().cpu().double().requires_grad_() for k, v in call.items() if is_float(v)}
    rest = {k: v.cpu() if torch.is_tensor(v) else v for k, v in call.items()}
    want = loop(**(rest | leaves))[: len(got)]
    first = call["u" if name == "scan" else "x"]
    assert got[0].dtype == first.dtype
    assert got[0].shape == first.shape
    for g, w in zip(got, want, strict=True):
        assert relative_error(g.detach().cpu(), w.detach()) <= output_limit, call
    pulls = [draw.tensor(*w.shape).detach().cpu().float() for w in want]  # exact in the outputs' dtype
    sum((g.cpu().float() * pull).sum() for g, pull in zip(got, pulls, strict=True)).backward()
    sum((w * pull).sum() for w, pull in zip(want, pulls, strict=True)).backward()
    for key, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        ours = torch.zeros_like(leaf) if call[key].grad is None else call[key].grad.cpu()
        assert relative_error(ours, grad) <= grad_limit, f"gradient of {key} in {call}"


def is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


@pytest.mark.parametrize("seed", range(SETS))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name, seed, relative_error):
    assert_equal_to_the_loop(name, Draw(seed), relative_error, 1e-5, 1e-4)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", CASES)
def test_sequences_in_half_precision(name, seed, relative_error):
    """bf16 sequences, and A, D, biases and states in fp32, as under autocast."""
    assert_equal_to_the_loop(name, Draw(seed, half=True), relative_error, 2e-2, 4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop_on_a_gpu(name, seed, half, relative_error):
    limits = (2e-2, 4e-2) if half else (1e-5, 1e-4)
    assert_equal_to_the_loop(name, Draw(seed, "cuda", half), relative_error, *limits)


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_tensors_are_refused(name):
    """Also where a backend runs that takes them, with B and C constant in time."""
    u, states = torch.randn(1, 2, 3), torch.randn(2, 4)
    for B in (states, torch.randn(1, 4, 3)):
        call = {"u": u, "delta": u, "A": -states.abs(), "B": B, "C": B}
        with pytest.raises(ValueError, match=f"{name} is complex, and selective_scan_fn takes real.*'reference'"):
            mamba_ssm.selective_scan_fn(**call | {name: call[name].to(torch.complex64)})


def test_a_constant_b_or_c_says_that_a_loop_runs(caplog):
    mamba_ssm.scan._log_constant.cache_clear()
    u, A = torch.randn(1, 2, 3), -torch.ones(2, 4)
    for _ in range(2):
        mamba_ssm.selective_scan_fn(u, u, A, torch.randn(2, 4), torch.randn(1, 4, 3))
    assert [record.levelname for record in caplog.records if "Python loop" in record.message] == ["WARNING"]


def test_the_reference_equals_the_fast_scan(relative_error):
    call = Draw(3).scan() | {"return_last_state": True}
    for got, want in zip(mamba_ssm.selective_scan_ref(**call), mamba_ssm.selective_scan_fn(**call), strict=True):
        assert relative_error(got, want) <= 1e-5


def test_empty_sequences():
    x = torch.zeros(2, 4, 0)
    y, state = mamba_ssm.selective_scan_fn(x, x, -torch.ones(4, 3), *2 * [x[:, :3]], return_last_state=True)
    assert (y.shape, state.abs().sum()) == (x.shape, 0)
    assert (
        mamba_ssm.causal_conv1d_fn(x, torch.ones(4, 3), seq_idx=torch.zeros(2, 0, dtype=torch.int32)).shape == x.shape
    )
    rows, BC = torch.zeros(2, 0, 4, 1), torch.zeros(2, 0, 1, 3)
    y = mamba_ssm.mamba_chunk_scan_combined(
        rows, rows[..., 0], -torch.ones(4), BC, BC, 16, seq_idx=torch.zeros(2, 0, dtype=torch.int32)
    )
    assert y.shape == rows.shape


def test_layouts_in_memory():
    """As the originals': code calls view() on a scan's output; a convolution keeps the channels last."""
    u = torch.randn(2, 3, 4, 6).transpose(1, 2).flatten(2)  # (2, 4, 18)
    A, B = -torch.ones(4, 2), torch.randn(2, 2, 18)
    assert mamba_ssm.selective_scan_fn(u, u, A, B, B).is_contiguous()
    assert mamba_ssm.causal_conv1d_fn(u, torch.ones(4, 3)).is_contiguous()
    assert mamba_ssm.causal_conv1d_fn(u.mT.contiguous().mT, torch.ones(4, 3)).mT.is_contiguous()


def test_final_states_fill_the_tensor_given():
    x, out = torch.randn(2, 4, 7), torch.empty(2, 4, 2)
    _, states = mamba_ssm.causal_conv1d_fn(x, torch.ones(4, 3), return_final_states=True, final_states_out=out)
    assert states is out
    assert out.equal(x[..., 5:])


X, A, STEPS = torch.randn(2, 4, 5), -torch.ones(4, 3), torch.randn(2, 3, 5)
ROWS, HEADS = torch.randn(2, 5, 4, 1), torch.randn(2, 5, 1, 3)
chunked = (ROWS, ROWS[..., 0], A[:, 0], HEADS, HEADS, 16)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"delta must be the shape of u.*\(2, 4, 5\), got \(2, 4, 4\)", lambda: scan(delta=X[..., 1:])),
        (ValueError, "B must be .batch, d_state, length.", lambda: scan(B=STEPS.mT)),
        (ValueError, "C must have groups that divide dim = 4", lambda: scan(C=STEPS.unsqueeze(1).repeat(1, 3, 1, 1))),
        (ValueError, "z must be the shape of u", lambda: scan(z=X.mT)),
        (ValueError, "delta_bias must be", lambda: scan(delta_bias=torch.ones(3))),
        (TypeError, "A must be fp32", lambda: scan(A=A.bfloat16())),
        (
            NotImplementedError,
            "activation must be None, 'silu' or 'swish', got 'gelu'",
            lambda: conv(activation="gelu"),
        ),
        (ValueError, "return_final_states=True does not go", lambda: conv(seq_idx=IDS, return_final_states=True)),
        (ValueError, "initial_states must be", lambda: conv(initial_states=torch.zeros(2, 2, 4))),
        (TypeError, "seq_idx must have a dtype", lambda: conv(seq_idx=IDS.float())),
        (NotImplementedError, "return_varlen_states=True is not", lambda: chunks(return_varlen_states=True)),
        (ValueError, "D must be .heads, head_dim.", lambda: chunks(D=torch.ones(4, 2))),
        (ValueError, "C must be the shape of B", lambda: chunks(C=HEADS[..., :1], seq_idx=IDS)),
        (ValueError, "chunk_size must be at least 1", lambda: chunks(chunk_size=0)),
        (ValueError, "checkpoint_lvl must be 0 or 1, got 2", lambda: inner(checkpoint_lvl=2)),
        (NotImplementedError, "x1 is not supported", lambda: norm(x1=X)),
        (NotImplementedError, "return_dropout_mask is not", lambda: norm(return_dropout_mask=True)),
        (ValueError, "residual must be the shape of x", lambda: norm(residual=X[:1])),
        (ValueError, "group_size must divide the 5 channels", lambda: gated(group_size=2)),
        (ValueError, "conv_state must be .* state_len >= 2", lambda: update(conv_state=X[..., :1])),
        (ValueError, "cache_seqlens must be .batch,.", lambda: update(cache_seqlens=torch.zeros(3, dtype=torch.int32))),
        (TypeError, "conv_state_indices must have a dtype", lambda: update(conv_state_indices=torch.zeros(2))),
        (ValueError, "dt must be .batch, heads, dim.", lambda: step(dt=X[..., 0].mT)),
        (ValueError, "B must be .* groups that divide heads = 1", lambda: step(B=STEPS.mT[:, :2])),
        (ValueError, "state must have the batch of x", lambda: step(state=torch.zeros(3, 4, 3))),
        (ValueError, "dt_rank must be a number or 'auto'", lambda: mamba_ssm.Mamba(8, dt_rank="full")),
        (NotImplementedError, "dt_init must be 'random' or", lambda: mamba_ssm.Mamba(8, dt_init="zero")),
        (ValueError, "layer_idx must be a number", lambda: mamba_ssm.Mamba(5)(X, SimpleNamespace())),
    ],
)
def test_errors_give_name_value_and_rule(error, message, call):
    with pytest.raises(error, match=message):
        call()


IDS = torch.zeros(2, 5, dtype=torch.int32)


def scan(**changed):
    return mamba_ssm.selective_scan_fn(**{"u": X, "delta": X, "A": A, "B": STEPS, "C": STEPS} | changed)


def conv(**changed):
    return mamba_ssm.causal_conv1d_fn(X, torch.ones(4, 3), **changed)


def chunks(**changed):
    names = "x", "dt", "A", "B", "C", "chunk_size"
    return mamba_ssm.mamba_chunk_scan_combined(**dict(zip(names, chunked, strict=True)) | changed)


def inner(**changed):
    square = torch.ones(4, 4)
    return mamba_ssm.mamba_inner_fn(X, square[:, :1, None], None, square, square, square, None, A, **changed)


def norm(**changed):
    return mamba_ssm.rms_norm_fn(X, torch.ones(5), None, **changed)


def gated(**changed):
    return mamba_ssm.rmsnorm_fn(X, torch.ones(5), None, **changed)


def update(**changed):
    call = {"x": X[..., 0], "conv_state": torch.zeros(2, 4, 3), "weight": torch.ones(4, 3)}
    return mamba_ssm.causal_conv1d_update(**call | changed)


def step(**changed):
    x, BC = X[..., 0], STEPS[..., 0]
    return mamba_ssm.selective_state_update(
        **{"state": torch.zeros(2, 4, 3), "x": x, "dt": x, "A": A, "B": BC, "C": BC} | changed
    )


def test_the_result_does_not_depend_on_the_chunks_or_cu_seqlens(relative_error):
    call = Draw(7).chunk_scan() | {"return_final_states": False}
    want = mamba_ssm.mamba_chunk_scan_combined(**call)
    changed = call | {"chunk_size": 3, "cu_seqlens": torch.tensor([0, 1])}
    assert relative_error(mamba_ssm.mamba_chunk_scan_combined(**changed), want) <= 1e-5


@pytest.mark.parametrize("given", ["projected", "B and C", "biases and norms"])
def test_inner_function_equals_loops(given, relative_error):
    torch.manual_seed(0)
    batch, dim, length, rank, d_state = 2, 6, 7, 3, 4

    def leaf(*shape):
        return (torch.randn(*shape) / 2).requires_grad_()

    call = {
        "xz": leaf(batch, 2 * dim, length),
        "conv1d_weight": leaf(dim, 1, 3),
        "conv1d_bias": leaf(dim),
        "x_proj_weight": leaf(rank + 2 * d_state, dim),
        "delta_proj_weight": leaf(dim, rank),
        "out_proj_weight": leaf(5, dim),
        "out_proj_bias": leaf(5),
        "A": Draw(0).decays(dim, d_state),
        "D": leaf(dim),
        "delta_bias": leaf(dim),
    }
    if given == "B and C":
        call |= {"B": leaf(batch, 2, d_state, length), "C": leaf(dim, d_state), "delta_softplus": False}
        call["delta_bias"] = (torch.rand(dim) + 3).requires_grad_()
    if given == "biases and norms":
        call |= {name: leaf(d_state) for name in ("B_proj_bias", "C_proj_bias", "b_rms_weight", "c_rms_weight")}
        call |= {"dt_rms_weight": leaf(dim), "b_c_dt_rms_eps": 1e-2, "checkpoint_lvl": 0}
    got = mamba_ssm.mamba_inner_fn(**call)
    leaves = {k: v.detach().double().requires_grad_() for k, v in call.items() if torch.is_tensor(v)}
    want = inner_loop(**leaves, softplus=call.get("delta_softplus", True))
    assert got.shape == (batch, length, 5)
    assert relative_error(got, want) <= 1e-5
    pull = torch.randn_like(got)
    (got * pull).sum().backward()
    (want * pull).sum().backward()
    for key, wide in leaves.items():
        assert relative_error(call[key].grad, wide.grad) <= 1e-4, key


def inner_loop(
    xz, conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight, A, D, delta_bias, softplus, **more
):
    dim, rank, d_state = A.shape[0], delta_proj_weight.shape[1], A.shape[1]
    u, _ = loops.conv(xz[:, :dim], conv1d_weight[:, 0], more["conv1d_bias"], activation="silu")
    projected = torch.einsum("bdl, rd -> brl", u, x_proj_weight)
    delta = torch.einsum("brl, dr -> bdl", projected[:, :rank], delta_proj_weight)
    B = more.get("B", projected[:, rank : rank + d_state])
    C = more.get("C", projected[:, rank + d_state :])
    if "b_rms_weight" in more:
        B, C = B + more["B_proj_bias"].unsqueeze(-1), C + more["C_proj_bias"].unsqueeze(-1)
        weights = more["b_rms_weight"], more["c_rms_weight"], more["dt_rms_weight"]
        B, C, delta = (loops.norm(t.mT, w, eps=1e-2, rms=True).mT for t, w in zip((B, C, delta), weights, strict=True))
    y, _ = loops.scan(u, delta, A, B, C, D, xz[:, dim:], delta_bias, softplus)
    return torch.einsum("bdl, od -> blo", y, out_proj_weight) + more["out_proj_bias"]


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16])
def test_norms_of_a_stream(rms, dtype, residual_dtype, relative_error):
    """The sum is normalised before it is rounded to the stream's dtype."""
    torch.manual_seed(0)
    function = mamba_ssm.rms_norm_fn if rms else mamba_ssm.layer_norm_fn
    x, weight, rowscale = torch.randn(2, 3, 8).to(dtype), torch.randn(8), torch.rand(2, 3)
    residual = None if residual_dtype is None else torch.randn(2, 3, 8).to(residual_dtype)
    for bias in (None, torch.randn(8)):
        options = {"eps": 1e-2, "rowscale": rowscale}
        y, stream = function(x, weight, bias, residual, prenorm=True, residual_in_fp32=True, **options)
        total = x.double() * rowscale.unsqueeze(-1) + (0 if residual is None else residual.double())
        want = loops.norm(total, weight.double(), None if bias is None else bias.double(), 1e-2, rms=rms)
        assert (y.dtype, stream.dtype) == (dtype, residual_dtype or torch.float32)
        assert relative_error(y, want) <= rounding(dtype)
        assert relative_error(stream, total) <= rounding(stream.dtype)
        alone = function(x, weight, bias, residual, **options)
        assert alone.equal(y)
    assert function(x, weight, None, prenorm=True)[1].equal(x)


def rounding(dtype):
    return 2**-8 if dtype == torch.bfloat16 else 1e-6


def test_dropout_of_a_stream_comes_before_the_residual():
    layer = mamba_ssm.RMSNorm(1000, dropout_p=0.25)
    x, zeros = torch.ones(1, 1000), torch.zeros(1, 1000)
    _, stream = layer(x, residual=zeros, prenorm=True)
    assert set(stream.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 0.65 < (stream > 0).float().mean() < 0.85
    _, stream = layer.eval()(x, residual=zeros, prenorm=True)
    assert stream.equal(x)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gated_norms(rms, norm_before_gate, group_size, relative_error):
    torch.manual_seed(0)
    function = mamba_ssm.rmsnorm_fn if rms else mamba_ssm.layernorm_fn
    for bias in (None, torch.randn(8)):
        x, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
        got = function(x, weight, bias, z, 1e-2, group_size, norm_before_gate)
        gate = loops.silu(z.double())
        want = x.double() if norm_before_gate else x.double() * gate
        want = loops.norm(want, weight.double(), bias, 1e-2, rms=rms, group_size=group_size)
        assert relative_error(got, want * gate if norm_before_gate else want) <= 1e-5
        alone = function(x, weight, bias, eps=1e-2, group_size=group_size)
        want = loops.norm(x.double(), weight.double(), bias, 1e-2, rms=rms, group_size=group_size)
        assert relative_error(alone, want) <= 1e-5


def test_the_gated_norm_passes_its_options_on():
    layer = mamba_ssm.RMSNormGated(8, eps=0.5, group_size=2, norm_before_gate=False)
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    assert layer(x, z).equal(mamba_ssm.rmsnorm_fn(x, layer.weight, None, z, 0.5, 2, False))
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("state_len", [2, 3, 6])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (2, 1, 2), (3, 2)])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_step_by_step(state_len, lengths, ring, relative_error):
    """All pieces together are one convolution, and the cache holds the last steps."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, sum(lengths)), torch.randn(4, 3), torch.randn(4)
    start = torch.tensor([1, 4], dtype=torch.int32)
    state, pieces = torch.zeros(2, 4, state_len), []
    for done, piece in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), x.split(lengths, -1), strict=False):
        at = start + done if ring else None
        one = piece.squeeze(-1) if piece.shape[-1] == 1 else piece
        y = mamba_ssm.causal_conv1d_update(one, state, weight, bias, "silu", cache_seqlens=at)
        assert y.shape == one.shape
        pieces.append(y.view_as(piece))
    want, _ = loops.conv(*(t.double() for t in (x, weight, bias)), activation="silu")
    assert relative_error(torch.cat(pieces, -1), want) <= 1e-5
    kept = F.pad(x, (state_len, 0))[..., -state_len:]
    for b in range(2):
        if not ring:
            assert state[b].equal(kept[b])
        else:
            places = [(int(start[b]) + sum(lengths) - state_len + i) % state_len for i in range(state_len)]
            assert state[b][:, places].equal(kept[b])


def test_convolution_steps_pick_their_rows_of_a_larger_cache(relative_error):
    torch.manual_seed(0)
    cache, x, weight = torch.randn(5, 4, 3), torch.randn(3, 4), torch.randn(4, 3)
    before, rows = cache.clone(), torch.tensor([4, -1, 0], dtype=torch.int32)
    y = mamba_ssm.causal_conv1d_update(x, cache, weight, conv_state_indices=rows)
    want, states = loops.conv(x[[0, 2]].unsqueeze(-1), weight, initial_states=before[[4, 0], :, 1:])
    assert relative_error(y[[0, 2]], want[..., 0]) <= 1e-5
    assert y[1].abs().sum() == 0
    assert cache[[4, 0], :, 1:].equal(states)
    assert cache[1:4].equal(before[1:4])


@pytest.mark.parametrize("heads", [None, 1, 4])
@pytest.mark.parametrize("half", [False, True])
def test_state_steps_are_the_scan(heads, half, relative_error):
    """Step by step in a cache of more rows, one of the batch is padding; one scan over dim * heads channels."""
    torch.manual_seed(0)
    batch, dim, d_state, length, groups = 3, 4, 5, 6, 2 if heads == 4 else 1
    sizes = (dim,) if heads is None else (heads, dim)
    every, narrow = torch.Size(sizes).numel(), torch.bfloat16 if half else torch.float32
    x, dt, z = (torch.randn(batch, *sizes, length).to(narrow) for _ in range(3))
    B, C = (torch.randn(batch, groups, d_state, length).to(narrow) for _ in range(2))
    A, D, dt_bias = -torch.rand(*sizes, d_state) - 0.1, torch.randn(sizes), torch.randn(sizes)
    cache, rows, outputs = torch.zeros(5, *sizes, d_state), torch.tensor([3, -1, 1]), []
    for t in range(length):
        B_t, C_t = (v[..., t] if heads else v[:, 0, :, t] for v in (B, C))
        y = mamba_ssm.selective_state_update(
            cache, x[..., t], dt[..., t], A, B_t, C_t, D, z[..., t], dt_bias, True, state_batch_indices=rows
        )
        assert (y.shape, y.dtype) == (x[..., t].shape, narrow)
        outputs.append(y)
    u, delta, gate = (t.double().reshape(batch, every, length) for t in (x, dt, z))
    flat = (t.double().flatten(0, len(sizes) - 1) for t in (A, D, dt_bias))
    A, D, dt_bias = flat
    want, state = loops.scan(u, delta, A, B.double(), C.double(), D, gate, dt_bias, True)
    got = torch.stack(outputs, -1).reshape(batch, every, length)
    assert relative_error(got[[0, 2]], want[[0, 2]]) <= (1e-2 if half else 1e-5)
    assert got[1].abs().sum() == 0
    assert relative_error(cache[[3, 1]].reshape(2, every, d_state), state[[0, 2]]) <= 1e-5
    assert cache[[0, 2, 4]].abs().sum() == 0


def test_updates_have_no_gradients():
    weight = torch.ones(4, 3, requires_grad=True)
    state = torch.zeros(2, 4, 3)
    assert not mamba_ssm.causal_conv1d_update(X[..., 0], state, weight).requires_grad
    assert not state.requires_grad


class OnExtension(torch.autograd.Function):
    """A scan as VMamba writes it, on a compiled module's forward and backward."""

    @staticmethod
    def forward(ctx, module, options, *inputs):
        assert not torch.is_grad_enabled()
        y, states = module["fwd"](*inputs, *options)
        ctx.save_for_backward(*inputs, states)
        ctx.module, ctx.options = module, options[:2]
        return y

    @staticmethod
    def backward(ctx, dout):
        *inputs, states = ctx.saved_tensors
        return None, None, *ctx.module["bwd"](*inputs, dout, states, *ctx.options)


@pytest.mark.parametrize(("kind", "options"), [("_core", (True, 1)), ("_oflex", (True, 1, True))])
@pytest.mark.parametrize("half", [False, True])
def test_the_compiled_modules_of_vmamba(kind, options, half, relative_error):
    draw = Draw(0, half=half)
    names, groups = ("u", "delta", "A", "B", "C", "D", "delta_bias"), (2, 2, 3, 9)
    call = dict(zip(names, [draw.tensor(2, 8, 9), draw.tensor(2, 8, 9), draw.decays(8, 3)], strict=False))
    call |= {name: draw.tensor(*groups) for name in "BC"} | {"D": draw.tensor(8, wide=True), "delta_bias": None}
    module = MODULES[f"selective_scan_cuda{kind}"]
    got = OnExtension.apply(module, options, *(call[name] for name in names))
    assert got.dtype == (torch.float32 if kind == "_oflex" else draw.narrow)
    leaves = {k: v.detach().double().requires_grad_() for k, v in call.items() if v is not None}
    want, _ = loops.scan(**leaves, delta_softplus=True)
    assert relative_error(got, want) <= (1e-2 if half and kind == "_core" else 1e-5)
    pull = torch.randn_like(got)
    got.backward(pull)
    want.backward(pull.double())
    for name, leaf in leaves.items():
        assert call[name].grad.dtype == call[name].dtype
        rounded = half and (kind == "_core" or name not in "AD")  # the module of an fp32 output rounds nothing else
        assert relative_error(call[name].grad, leaf.grad) <= (1e-2 if rounded else 1e-4), name


def test_the_compiled_module_of_mamba_ssm(relative_error):
    """Its gate, the last state in its place, and a gradient that is written into half of a tensor."""
    draw = Draw(0)
    u, delta, z, pull = (draw.tensor(2, 8, 9).detach() for _ in range(4))
    A, B, C = draw.decays(8, 3).detach(), draw.tensor(2, 2, 3, 9).detach(), draw.tensor(2, 2, 3, 9).detach()
    module = MODULES["selective_scan_cuda"]
    plain, states, gated = module["fwd"](u, delta, A, B, C, None, z, None, True)
    alone, _ = module["fwd"](u, delta, A, B, C, None, None, None, True)
    leaves = [t.double().requires_grad_() for t in (u, delta, A, B, C, z)]
    want, last_state = loops.scan(*leaves[:5], z=leaves[5], delta_softplus=True)
    assert relative_error(gated, want) <= 1e-5
    assert relative_error(states[:, :, -1, 1::2], last_state) <= 1e-5
    assert alone.equal(plain)
    both = torch.zeros(2, 16, 9)
    half = both.chunk(2, 1)[1]
    found = module["bwd"](u, delta, A, B, C, None, z, None, pull, states, plain, half, True, True)
    du, d_delta, dA, dB, dC, dD, d_bias, dz, again = found
    assert (dD, d_bias) == (None, None)
    want.backward(pull.double())
    for grad, leaf in zip((du, d_delta, dA, dB, dC, dz), leaves, strict=True):
        assert relative_error(grad, leaf.grad) <= 1e-4
    assert both[:, 8:].equal(dz)
    assert relative_error(again, want) <= 1e-5
    assert len(module["bwd"](u, delta, A, B, C, None, z, None, pull, states, plain, None, True, False)) == 8
    assert len(module["bwd"](u, delta, A, B, C, None, None, None, pull, states, None, None, True, False)) == 7


def renamed(layer):
    """The state of a Mamba layer under the names of this project's."""
    return {k if k.startswith(("in_proj", "out_proj")) else f"ssm.{k}": v for k, v in layer.state_dict().items()}


def test_the_layer_equals_the_projects_own(relative_error):
    torch.manual_seed(0)
    layer, own = mamba_ssm.Mamba(8, d_state=4), vim.layers.Mamba(8, d_state=4)
    own.load_state_dict(renamed(layer))
    x = torch.randn(2, 7, 8)
    want = own(x)
    assert relative_error(layer(x), want) <= 1e-5


@pytest.mark.parametrize("prompt", [1, 3, 6])  # shorter and longer than the convolution
def test_the_layer_step_by_step(prompt, relative_error):
    """A prompt that fills the caches, then single steps, is the whole sequence."""
    torch.manual_seed(0)
    layer = mamba_ssm.Mamba(8, d_state=4, layer_idx=3, bias=True, conv_bias=False)
    x, inference = torch.randn(2, 9, 8), SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    outputs = []
    for steps in x.split([prompt] + [1] * (9 - prompt), 1):
        outputs.append(layer(steps, inference_params=inference))
        inference.seqlen_offset += steps.shape[1]
    assert relative_error(torch.cat(outputs, 1), layer(x)) <= 1e-5
    conv_state, ssm_state = inference.key_value_memory_dict[3]
    assert (conv_state.shape, ssm_state.shape) == ((2, 16, 4), (2, 16, 4))
    assert [t.dtype for t in layer.allocate_inference_cache(2, 9, torch.bfloat16)] == 2 * [torch.bfloat16]


def test_the_layer_starts_as_the_paper_says():
    torch.manual_seed(0)
    layer = mamba_ssm.Mamba(64, d_state=3, expand=4, dt_min=0.01, dt_max=0.02, dt_scale=2.0)
    steps = F.softplus(layer.dt_proj.bias)
    assert steps.min() >= 0.0099
    assert steps.max() <= 0.0201
    assert layer.A_log.exp()[5].tolist() == pytest.approx([1, 2, 3])
    assert 0.9 < layer.dt_proj.weight.abs().max() <= 1  # dt_scale / sqrt(dt_rank), with rank 4
    marks = {"A_log": "_no_weight_decay", "D": "_no_weight_decay", "dt_proj.bias": "_no_reinit"}
    assert all(getattr(layer.get_parameter(name), mark) for name, mark in marks.items())
    assert mamba_ssm.Mamba(64, dt_init="constant").dt_proj.weight.unique().tolist() == [0.5]
    assert mamba_ssm.Mamba(64, dt_rank=7, bias=True).dt_proj.in_features == 7
