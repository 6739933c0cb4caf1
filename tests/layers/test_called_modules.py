"""Modules in a layer that are wrapped, hooked, parametrised or replaced are called; plain ones feed the kernels."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from vim.layers import S4, S4D, S4ND, BiMamba, BiMamba2, GatedConv, Mamba, Mamba2, MambaBlock, RMSNorm
from vim.layers.plain import is_plain
from vim.models.adventurer import Adventurer
from vim.models.arm import ARM
from vim.models.vision_mamba import VisionMamba


def adventurer() -> Adventurer:
    return Adventurer(img_size=24, patch_size=8, embed_dim=16, depth=1, d_state=5, head_dim=8, num_classes=3)


LAYERS = {  # on a GPU 24 states compile fastest: see test_triton_gpu.py
    "mamba": lambda: Mamba(16, d_state=24),
    "mamba, other biases": lambda: Mamba(16, d_state=24, bias=True, conv_bias=False),
    "bimamba": lambda: BiMamba(16, d_state=24),
    "mamba2": lambda: Mamba2(16, d_state=5, head_dim=8),
    "mamba2, other biases": lambda: Mamba2(16, d_state=5, head_dim=8, bias=True, conv_bias=False),
    "bimamba2": lambda: BiMamba2(16, d_state=5, head_dim=8),
    "gated conv": lambda: GatedConv(16),
    "s4d": lambda: S4D(16, 6, bidirectional=True),
    "s4": lambda: S4(16, 6, bidirectional=True),
    "s4nd": lambda: S4ND(16, 6),
    "image": lambda: VisionMamba(img_size=(24, 16), patch_size=8, embed_dim=16, depth=1, num_classes=3),
    "image, overlapping": lambda: VisionMamba(
        img_size=24, patch_size=8, patch_stride=4, embed_dim=16, depth=1, mixer="mamba", num_classes=3
    ),
    "image, rows and columns": lambda: ARM(img_size=24, patch_size=8, embed_dim=16, depth=1, d_state=24, num_classes=3),
    "image, heading and gate": adventurer,
}
SHAPES = {
    "s4nd": (2, 5, 3, 16),
    "image": (2, 3, 24, 16),
    "image, overlapping": (2, 3, 24, 24),
    "image, rows and columns": (2, 3, 24, 24),
    "image, heading and gate": (2, 3, 24, 24),
}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


@pytest.fixture(params=LAYERS)
def layer_and_input(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return LAYERS[request.param]().double().eval(), torch.randn(SHAPES.get(request.param, (2, 9, 16))).double()


def weighted(layer: nn.Module) -> list[nn.Module]:
    """All modules that a layer could bypass."""
    found = [module for module in layer.modules() if isinstance(module, WEIGHTED)]
    assert found
    return found


class LoRA(nn.Module):
    """A Linear with an added low-rank term, as in LoRA adapters."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype) / 10)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype) / 10)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def with_adapters(layer: nn.Module) -> nn.Module:
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child))
    return layer


def test_adapters_on_every_linear(layer_and_input, relative_error):
    """Outputs equal those with the product added to the weight. Every adapter tensor has a gradient."""
    layer, x = layer_and_input
    adapted = with_adapters(copy.deepcopy(layer))
    for name, module in layer.named_modules():
        if type(module) is nn.Linear:
            adapter = adapted.get_submodule(name)
            module.weight.data += (adapter.up @ adapter.down).detach()
    y = adapted(x)
    assert relative_error(y, layer(x)) < 1e-12
    y.square().sum().backward()
    tensors = {name: p for name, p in adapted.named_parameters() if name.endswith((".up", ".down"))}
    assert len(tensors) == 2 * sum(type(module) is nn.Linear for module in layer.modules())
    for name, p in tensors.items():
        assert p.grad is not None, name
        assert p.grad.any(), name


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_fire_on_every_module(kind, layer_and_input, relative_error):
    layer, x = layer_and_input
    want, seen = layer(x), []
    for module in weighted(layer):
        getattr(module, f"register_{kind}_hook")(lambda module, *_: seen.append(id(module)))
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert relative_error(y, want) < 1e-12
    assert set(seen) == {id(module) for module in weighted(layer)}


def test_a_hook_for_all_modules_fires_on_every_one(layer_and_input):
    layer, x = layer_and_input
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(id(module)))
    try:
        layer(x)
    finally:
        handle.remove()
    assert {id(module) for module in weighted(layer)} <= set(seen)


def test_a_block_calls_its_norms_and_mlp_if_they_are_hooked_or_replaced(relative_error):
    torch.manual_seed(0)
    model, x = adventurer().double().eval(), torch.randn(2, 3, 24, 24).double()
    block, want, seen = model.blocks[0], model(x), {}
    for name in ("norm", "norm_mlp", "mlp"):
        block.get_submodule(name).register_forward_hook(lambda module, _, y, name=name: seen.update({name: y}))
    assert relative_error(model(x), want) < 1e-12
    assert {name: tuple(y.shape) for name, y in seen.items()} == dict.fromkeys(("norm", "norm_mlp", "mlp"), (2, 10, 16))
    block.mlp = nn.Sequential(block.mlp)
    assert relative_error(model(x), want) < 1e-12


def scale_of_its_own(module: nn.Module) -> None:
    """Replace `forward` of the instance, as accelerate does; the class stays."""
    module.forward = lambda u, forward=module.forward: 1.5 * forward(u)


def scale_of_its_class(module: nn.Module) -> None:
    """Replace `forward` by a subclass of Linear, as some adapters do."""
    kind = type(module)
    module.__class__ = type("Scaled", (kind,), {"forward": lambda self, u: 1.5 * kind.forward(self, u)})


@pytest.mark.parametrize("scale", [scale_of_its_own, scale_of_its_class])
def test_another_forward_is_called(scale, layer_and_input, relative_error):
    layer, x = layer_and_input
    folded = copy.deepcopy(layer)
    for module, other in zip(weighted(layer), weighted(folded), strict=True):
        scale(module)
        for p in other.parameters():
            p.data *= 1.5
    assert relative_error(layer(x), folded(x)) < 1e-12


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def test_parametrised_weights_are_the_same_folded(layer_and_input, relative_error):
    layer, x = layer_and_input
    folded = copy.deepcopy(layer)
    for module, other in zip(weighted(layer), weighted(folded), strict=True):
        parametrize.register_parametrization(module, "weight", Scaled())
        other.weight.data *= 1.5
    y = layer(x)
    assert relative_error(y, folded(x)) < 1e-12
    y.sum().backward()
    assert all(module.parametrizations.weight.original.grad.any() for module in weighted(layer))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_normed_weights_are_the_same_folded(norm, layer_and_input, relative_error):
    layer, x = layer_and_input
    folded = copy.deepcopy(layer)
    for module, other in zip(weighted(layer), weighted(folded), strict=True):
        norm(module).eval()
        with torch.no_grad():
            if norm is parametrizations.weight_norm:
                module.parametrizations.weight.original0 *= 1.5
            other.weight.copy_(module.weight)
    assert relative_error(layer(x), folded(x)) < 1e-12


def test_pruned_weights_follow_their_originals(layer_and_input, relative_error):
    """The pruning hook recomputes the weight at each call, so it follows an optimizer step."""
    layer, x = layer_and_input
    for module in weighted(layer):
        prune.random_unstructured(module, "weight", 0.3)
        module.weight_orig.data *= 1.5
    y = layer(x)
    for module in weighted(layer):
        prune.remove(module, "weight")
    assert relative_error(y, layer(x)) < 1e-12


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation(layer_and_input):
    layer, x = layer_and_input
    layer, x = layer.float(), x.float()
    want, got = layer(x), quantize_dynamic(layer, {nn.Linear}, torch.qint8)(x)
    assert 1e-5 < (got - want).norm() / want.norm() < 0.05


@torch.no_grad()
def test_called_modules_under_autocast(layer_and_input):
    layer, x = layer_and_input
    layer, x = layer.float(), x.float()
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        hooked(layer)
        got = layer(x)
    assert got.dtype == plain.dtype
    assert (got - want).norm() / want.norm() < 2e-2


def test_a_replaced_linear_brings_its_bias(relative_error):
    """in_proj and x_proj have no bias; a Linear with a bias in their place adds it."""
    torch.manual_seed(0)
    for mixer, name in ((Mamba(16), "ssm.x_proj"), (Mamba2(16, head_dim=8), "in_proj")):
        old = mixer.double().get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features, dtype=torch.float64)
        new.weight.data = old.weight.data
        x = torch.randn(2, 9, 16).double()
        without = mixer(x)
        old.register_forward_hook(lambda module, inputs, y, bias=new.bias: y + bias)
        want = mixer(x)
        assert relative_error(want, without) > 1e-3
        mixer.set_submodule(name, new)
        assert relative_error(mixer(x), want) < 1e-12


def test_weights_of_a_tensor_class_of_their_own_are_not_handed_out():
    """Tensor subclasses, as of torchao or sharding: kernels read only plain memory."""
    linear = nn.Linear(4, 4)
    assert is_plain(linear)
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    assert not is_plain(linear)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_called_modules_on_a_gpu(name, relative_error):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().cuda(), torch.randn(SHAPES.get(name, (2, 9, 16)), device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = []
        for _ in range(2):
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
            hooked(layer)
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-4


# Caches and packed sequences


def hooked(layer: nn.Module) -> list[nn.Module]:
    """Add a hook to each module that a layer could bypass. Returns: the list of modules called so far."""
    seen: list[nn.Module] = []
    for module in layer.modules():
        if isinstance(module, (*WEIGHTED, RMSNorm)):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_called_modules_in_steps_and_pieces(name, d_conv, relative_error):
    torch.manual_seed(0)
    options = {"d_state": 5, "d_conv": d_conv}
    mixer = (Mamba(16, **options) if name == "mamba" else Mamba2(16, **options, head_dim=8)).double()
    x = torch.randn(3, 12, 16).double()
    want = mixer(x)
    seen = hooked(with_adapters(mixer))
    for module in mixer.modules():
        if isinstance(module, LoRA):
            module.up.zero_()
    cache = type(mixer.allocate_cache(3))(*(t.double() for t in mixer.allocate_cache(3)))
    pieces = [mixer(part, cache) for part in x[:, :9].split([1, 2, 6], 1)]
    pieces += [mixer.step(x[:, i], cache).unsqueeze(1) for i in (9, 10, 11)]
    assert relative_error(torch.cat(pieces, 1), want) < 1e-12
    assert len(seen) == 6 * len(set(seen))


@torch.no_grad()
def test_called_modules_in_the_step_of_a_block(relative_error):
    torch.manual_seed(0)
    block = with_adapters(MambaBlock(16, 4, 3, 2))
    x = torch.randn(2, 5, 16)
    want = block(x)
    seen = hooked(block)
    cache = block.mixer.allocate_cache(2)
    steps = torch.stack([block.step(one, cache) for one in x.unbind(1)], 1)
    assert relative_error(steps, want) < 1e-5
    assert len(seen) == 5 * 6, "norm, four Linears and a convolution at each step"


@pytest.mark.parametrize("name", ["norm", "mixer.in_proj", "mixer.ssm.conv1d", "mixer.ssm.x_proj", "mixer.ssm.dt_proj"])
@torch.no_grad()
def test_one_hook_is_enough_for_the_step_of_a_block(name):
    block, seen = MambaBlock(16, 4, 3, 2), []
    block.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(1))
    block.step(torch.randn(2, 16), block.mixer.allocate_cache(2))
    assert seen == [1]


class Halved(Mamba):
    """Another mixer with all attributes of Mamba."""

    def forward(self, *inputs):
        return super().forward(*inputs) / 2

    def step(self, *inputs):
        return super().step(*inputs) / 2


@torch.no_grad()
def test_a_step_of_a_block_calls_a_mixer_of_another_class(relative_error):
    torch.manual_seed(0)
    block, x = MambaBlock(16, 4, 3, 2), torch.randn(2, 5, 16)
    plain = block(x)
    other = Halved(16, 4, 3, 2)
    other.load_state_dict(block.mixer.state_dict())
    block.mixer = other
    cache = other.allocate_cache(2)
    steps = torch.stack([block.step(one, cache) for one in x.unbind(1)], 1)
    assert relative_error(steps, x + (plain - x) / 2) < 1e-5


@pytest.mark.parametrize("mixer_class", [Mamba, BiMamba])
@torch.no_grad()
def test_a_convolution_with_options_of_its_own_is_called(mixer_class, relative_error):
    """Dilation equals zeros between the taps; padding gives the same as in a wrapped convolution."""
    torch.manual_seed(0)
    mixer, x = mixer_class(8).double(), torch.randn(2, 9, 8).double()
    name = "ssm.conv1d" if mixer_class is Mamba else "backward_ssm.conv1d"
    whole = mixer.get_submodule(name)
    whole.weight[..., 1:3] = 0
    want = mixer(x)
    gaps = nn.Conv1d(16, 16, 2, dilation=3, groups=16).double()
    gaps.load_state_dict({"weight": whole.weight[..., ::3], "bias": whole.bias})
    mixer.set_submodule(name, gaps)
    assert relative_error(mixer(x), want) < 1e-12
    found = []
    for wrap in (lambda module: module, nn.Sequential):
        torch.manual_seed(1)
        mixer.set_submodule(name, wrap(nn.Conv1d(16, 16, 6, padding=1, groups=16).double()))
        found.append(mixer(x))
    assert relative_error(*found) < 1e-12
    mixer.set_submodule(name, nn.Conv1d(16, 16, 4, stride=2, groups=16).double())
    with pytest.raises((ValueError, RuntimeError), match=r"\b9\b"):  # it leaves out steps
        mixer(x)


@pytest.mark.parametrize("names", [("ssm",), ("forward_ssm",), ("backward_ssm",), ("forward_ssm", "backward_ssm")])
@torch.no_grad()
def test_a_convolution_without_a_bias_is_as_with_one_of_zeros(names, relative_error):
    """The bias is missing in the forward, the backward or both directions."""
    torch.manual_seed(0)
    mixer, x = (Mamba if names == ("ssm",) else BiMamba)(8).double(), torch.randn(2, 9, 8).double()
    for name in names:
        mixer.get_submodule(name).conv1d.bias.zero_()
    want = mixer(x)
    for name in names:
        mixer.get_submodule(name).conv1d.bias = None
    assert relative_error(mixer(x), want) < 1e-12


@torch.no_grad()
def test_called_convolutions_of_packed_sequences(relative_error):
    """A seq_idx that returns later starts another sequence; the cache belongs to the first one."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 16).double()
    seq_idx = torch.tensor([[0, 0, 0, 1, 0, 0, 2, 2, 2, 2, 2, 3], [7] * 12])
    mixer, both = Mamba(16, d_state=5).double(), BiMamba(16, d_state=5).double()

    def outputs() -> list[torch.Tensor]:
        cache = type(mixer.allocate_cache(2))(*(t.double() for t in mixer.allocate_cache(2)))
        pieces = [mixer(x[:, a:b], cache, seq_idx=seq_idx[:, a:b]) for a, b in ((0, 2), (2, 7), (7, 12))]
        return [torch.cat(pieces, 1), *cache, mixer(x, seq_idx=seq_idx), both(x, seq_idx=seq_idx)]

    want = outputs()
    seen = hooked(mixer), hooked(both)
    for got, expected in zip(outputs(), want, strict=True):
        assert relative_error(got, expected) < 1e-12
    assert all(seen)
    half = BiMamba(16, d_state=5).double()
    want = half(x, seq_idx=seq_idx)
    half.backward_ssm.conv1d.register_forward_hook(lambda *_: None)  # forward_ssm stays plain
    half.backward_ssm.dt_proj.register_forward_hook(lambda *_: None)
    assert relative_error(half(x, seq_idx=seq_idx), want) < 1e-12


# The fast path


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("mixer", ["bimamba", "mamba", "bimamba2", "mamba2", "none"])
def test_plain_modules_feed_the_kernels_in_exports_and_compiled(mixer):
    """The graph has no ATen convolution, neither the short ones nor the patch embedding."""
    model = VisionMamba(img_size=32, patch_size=16, embed_dim=16, depth=1, mixer=mixer, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    found = operators(torch.export.export(model, (x,)))
    assert any("vim_kernels.causal_conv1d" in name for name in found)
    assert not any("aten.conv" in name for name in found)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch.compile(model, fullgraph=True, backend=backend)(x)
    assert any("causal_conv1d" in name for name in graphs[0])
    assert not any(name.endswith("conv1d") and "causal" not in name for name in graphs[0])
    torch._dynamo.reset()
    seen = hooked(model)
    assert any("aten.conv" in name for name in operators(torch.export.export(model, (x,))))
    assert seen
