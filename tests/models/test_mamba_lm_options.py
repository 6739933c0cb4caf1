"""Language models with LayerNorm, and with other biases than the usual ones, in the authors' format."""

import fnmatch

import pytest
import torch
import torch.nn.functional as F
from lm_by_hand import by_hand, write_authors
from torch.testing import assert_close

from vim.layers import LayerNorm, RMSNorm
from vim.models.mamba_lm import MambaLM

MODELS = {
    "usual": (True, {}),
    "layer norm": (False, {}),
    "biases": (True, {"bias": True}),
    "no conv bias": (True, {"conv_bias": False}),
    "layer norm, biases": (False, {"bias": True, "conv_bias": True}),
    "layer norm, no conv bias": (False, {"bias": False, "conv_bias": False}),
    "all": (False, {"bias": True, "conv_bias": False, "d_state": 3, "d_conv": 2, "expand": 1.5, "dt_rank": 2}),
    "initial values": (False, {"dt_min": 0.01, "dt_max": 0.2, "dt_init": "constant", "dt_scale": 2.0}),
}
every_model = pytest.mark.parametrize(("rms_norm", "ssm_cfg"), MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@torch.no_grad()
@every_model
def test_a_checkpoint_of_the_authors(rms_norm, ssm_cfg, tmp_path, relative_error):
    """In one call, in pieces, step by step, and after saving."""
    weights, options = write_authors(tmp_path / "lm", rms_norm=rms_norm, ssm_cfg=ssm_cfg)
    ids = torch.randint(50, (2, 9))
    want = by_hand(weights, options, ids, rms_norm)
    model = MambaLM.from_pretrained(tmp_path / "lm")
    assert {type(module) for module in (model.norm, *(block.norm for block in model.blocks))} == {
        RMSNorm if rms_norm else LayerNorm
    }
    assert relative_error(model(ids), want) < 1e-5
    cache = model.allocate_cache(2)
    outputs = [model(part, cache) for part in ids[:, :5].split([4, 1], 1)]
    outputs += [model.step(one, cache).unsqueeze(1) for one in ids[:, 5:].unbind(1)]
    assert relative_error(torch.cat(outputs, 1), want) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert_close(MambaLM.from_pretrained(tmp_path / "saved")(ids), model(ids), atol=0, rtol=0)
    half = MambaLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert (half(ids) - want).norm() < 0.1 * want.norm()


@torch.no_grad()
@every_model
def test_generation(rms_norm, ssm_cfg, tmp_path):
    """Greedy, from prompts of different lengths: each as by hand, with the whole sequence before each token."""
    weights, options = write_authors(tmp_path, rms_norm=rms_norm, ssm_cfg=ssm_cfg)
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8]]
    made = MambaLM.from_pretrained(tmp_path).generate(prompts, 7)
    for prompt, tokens in zip(prompts, made.tolist(), strict=True):
        ids = list(prompt)
        for _ in range(7):
            ids.append(by_hand(weights, options, torch.tensor([ids]), rms_norm)[0, -1].argmax().item())
        assert tokens == ids[len(prompt) :]
    assert len({tuple(row) for row in made.tolist()}) > 1


def test_gradients(tmp_path, relative_error):
    weights, options = write_authors(tmp_path, rms_norm=False, ssm_cfg={"bias": True})
    model = MambaLM.from_pretrained(tmp_path).double()
    ids = torch.randint(50, (2, 8))
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    for logits in (model(ids), by_hand(leaves, options, ids, rms_norm=False)):
        F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]).backward()
    own = {name.replace("ssm.", "").replace("blocks", "layers"): p for name, p in model.named_parameters()}
    theirs = {name.replace("embeddings", "embedding").replace("norm_f", "norm"): p for name, p in leaves.items()}
    assert own.keys() == theirs.keys()
    for name, p in own.items():
        assert relative_error(p.grad, theirs[name].grad) < 1e-9, name


@torch.no_grad()
def test_padding_and_packed_sequences_with_a_layer_norm_and_biases(tmp_path):
    write_authors(tmp_path, rms_norm=False, ssm_cfg={"bias": True})
    model = MambaLM.from_pretrained(tmp_path).double()
    ids = torch.randint(50, (1, 9))
    mask = torch.tensor([[False, True, True, False, True, True, True, False, True]])
    assert_close(model(ids, mask=mask)[mask][None], model(ids[mask][None]))
    packed = model(ids, seq_idx=torch.tensor([[0] * 3 + [1] * 6]))
    assert_close(packed, torch.cat([model(part) for part in ids.split([3, 6], 1)], 1))


def test_initial_biases_and_what_does_not_decay():
    """0 for projections and norms, as the authors do; the convolution's are PyTorch's."""
    model = MambaLM(50, 64, 2, bias=True, rms_norm=False)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") and "dt_proj" not in name}
    assert len(biases) == 2 * 4 + 1
    for name, p in biases.items():
        assert p.any() == ("conv1d" in name), name
    patterns = model.no_weight_decay()
    spared = {name for name in biases if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert spared == {"norm.bias", "blocks.0.norm.bias", "blocks.1.norm.bias"}


@pytest.mark.gpu
@pytest.mark.parametrize(("rms_norm", "ssm_cfg"), [MODELS["layer norm, biases"], MODELS["no conv bias"]])
def test_a_gpu_generates_what_a_cpu_does(rms_norm, ssm_cfg, tmp_path):
    """With a CUDA graph, although a block's step is not fused."""
    write_authors(tmp_path, rms_norm=rms_norm, ssm_cfg=ssm_cfg | {"d_state": 24})  # see test_triton_gpu.py
    model = MambaLM.from_pretrained(tmp_path)
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8]]
    want = model.generate(prompts, 12)
    assert model.cuda().generate(prompts, 12).tolist() == want.tolist()
