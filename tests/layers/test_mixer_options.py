"""Mambas and the gated convolution: gradients with a cache, initial values and options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from vim.layers import BiMamba, BiMamba2, GatedConv, Mamba, Mamba2, MambaBlock, SelectiveSSM


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


MIXERS = {
    "mamba": lambda: Mamba(4, d_state=3, d_conv=3),
    "mamba, called modules": lambda: hooked(Mamba(4, d_state=3, d_conv=3)),
    "mamba2": lambda: Mamba2(4, d_state=3, d_conv=3, head_dim=4),
    "mamba2, called modules": lambda: hooked(Mamba2(4, d_state=3, d_conv=3, head_dim=4)),
}
PADDED = torch.tensor([[True, True, False, True], [False, True, True, True]])
PACKED = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])


def hooked(mixer):
    for module in list(mixer.modules()):
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.register_forward_hook(lambda *_: None)
    return mixer


def in_steps(mixer):
    """A module whose forward runs step by step."""
    mixer.forward = lambda x, cache: torch.stack([mixer.step(one, cache) for one in x.unbind(1)], 1)
    return mixer


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in MIXERS
        for way in ("whole", "step", "mask", "packed")
        if "2" not in name or way in ("whole", "step")
    ],
)
def test_gradients_behind_a_cache(name, way):
    """Against finite differences, from a filled cache that the call overwrites.

    A step has gradients only for its own input: earlier ones are constants.
    """
    mixer = MIXERS[name]().double()
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    fresh = mixer.allocate_cache(2)
    before = type(fresh)(*(torch.randn_like(part, dtype=torch.float64) for part in fresh))
    options = {"mask": {"mask": PADDED}, "packed": {"seq_idx": PACKED}}.get(way, {})
    if way == "step":
        mixer, x = in_steps(mixer), x[:, :1]
    parameters = dict(mixer.named_parameters())

    def call(x, *values):
        cache = type(before)(*(part.clone() for part in before))
        y = functional_call(mixer, dict(zip(parameters, values, strict=True)), (x, cache), options)
        assert not any(part.requires_grad or torch.equal(part, old) for part, old in zip(cache, before, strict=True))
        return y[PADDED] if way == "mask" else y

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("mixer_class", [Mamba, Mamba2])
def test_no_gradient_passes_through_a_cache(mixer_class):
    """The second of two calls gives no gradient to inputs of the first, and more calls can follow."""
    mixer = mixer_class(32, d_state=3)
    cache, pieces = mixer.allocate_cache(1), [torch.randn(1, 3, 32, requires_grad=True) for _ in range(3)]
    outputs = [mixer(piece, cache) for piece in pieces[:2]]
    outputs.append(mixer.step(pieces[2][:, 0], cache))
    outputs[1].sum().backward()
    assert [piece.grad is not None for piece in pieces] == [False, True, False]
    sum(outputs[i].sum() for i in (0, 2)).backward()
    assert all(piece.grad.any() for piece in pieces)


@torch.no_grad()
def test_padding_does_not_move_a_cache_whatever_the_bias_of_the_steps():
    mixer, x = Mamba(4, d_state=3).double(), torch.randn(1, 6, 4, dtype=torch.float64)
    mixer.ssm.dt_proj.bias.fill_(30)
    mask = torch.tensor([[True, True, False, False, True, False]])
    padded, alone = (type(c)(*(t.double() for t in c)) for c in (mixer.allocate_cache(1) for _ in range(2)))
    mixer(x, padded, mask)
    mixer(x[mask][None], alone)
    assert torch.allclose(padded.ssm_state, alone.ssm_state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mixer_class", [Mamba, Mamba2])
def test_a_cache_of_half_precision_keeps_its_state_wide(mixer_class):
    conv_state, ssm_state = mixer_class(32, d_state=3, dtype=torch.bfloat16).allocate_cache(2)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    assert not conv_state.any()
    assert not ssm_state.any()


@pytest.mark.parametrize("mixer_class", [BiMamba, BiMamba2])
def test_decays_of_half_precision_are_not_rounded(mixer_class):
    mixer = mixer_class(32, dtype=torch.bfloat16)
    ssm, other = mixer.forward_ssm, mixer.backward_ssm
    if mixer_class is BiMamba:
        decays = mixer.scan_inputs(torch.randn(1, 3, 32, dtype=torch.bfloat16))["A"]
    else:
        decays = ssm.arguments()["A"], other.arguments()["A"]
    for A, one in zip(decays, (ssm, other), strict=True):
        assert A.dtype == torch.float32
        assert torch.equal(A, -one.A_log.float().exp())


def test_the_range_and_the_floor_of_the_first_steps():
    def steps(**options):
        return F.softplus(SelectiveSSM(400, 3, 4, 2, **options).dt_proj.bias)

    dt = steps(dt_min=0.01, dt_max=0.03)
    assert 0.00999 < dt.min() < 0.0105
    assert 0.029 < dt.max() < 0.03001
    assert torch.allclose(steps(dt_min=1e-6, dt_max=1e-5), torch.full((400,), 1e-4), rtol=1e-3)
    assert torch.allclose(steps(dt_min=1e-3, dt_max=2e-3, dt_init_floor=0.01), torch.full((400,), 0.01), rtol=1e-3)


def test_inner_widths_and_ranks():
    """d_inner is rounded down, the default rank is rounded up; a given rank is used."""
    assert Mamba(10, expand=1.59).out_proj.weight.shape == (10, 15)
    for mixer_class, name in ((Mamba, "ssm"), (BiMamba, "backward_ssm")):
        for given, rank in ((None, 2), (5, 5)):
            ssm = mixer_class(17, d_state=3, dt_rank=given).get_submodule(name)
            assert ssm.dt_proj.weight.shape == (34, rank)
            assert ssm.x_proj.weight.shape == (rank + 6, 34)
    assert MambaBlock(17, 3, 4, 2, 5).mixer.ssm.dt_rank == 5


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_a_block_has_the_eps_of_its_norm(called):
    """As one call and step by step, with an eps above the mean square."""
    block = MambaBlock(16, 3, 4, 2, norm_eps=0.1).double()
    x = 0.1 * torch.randn(2, 5, 16).double()
    want = x + block.mixer(F.rms_norm(x, (16,), block.norm.weight, 0.1))
    block = hooked(block) if called else block
    assert torch.allclose(block(x), want)
    cache = type(block.mixer.allocate_cache(2))(*(part.double() for part in block.mixer.allocate_cache(2)))
    assert torch.allclose(torch.stack([block.step(one, cache) for one in x.unbind(1)], 1), want)


def test_gated_convolution_written_out(relative_error):
    """The mean of silu of a causal and of an anticausal convolution, times silu of the gate."""
    mixer = GatedConv(6, 3, 2).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    u, z = F.linear(x, mixer.in_proj.weight).split(12, -1)
    directions = [
        F.silu(F.conv1d(F.pad(u.mT, pad), weight, conv.bias, groups=12)).mT
        for conv, pad, weight in (
            (mixer.forward_conv, (2, 0), mixer.forward_conv.weight),
            (mixer.backward_conv, (0, 2), mixer.backward_conv.weight.flip(-1)),
        )
    ]
    want = F.linear(sum(directions) / 2 * F.silu(z), mixer.out_proj.weight)
    assert relative_error(mixer(x), want) < 1e-12
