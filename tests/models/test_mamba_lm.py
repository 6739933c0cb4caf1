"""MambaLM against golden numbers from the authors' code, and generation against the model called again and again."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from vim.models.mamba_lm import MambaLM, native_name, official_name, pad_left, sample


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def config(golden_folder):
    return json.loads((golden_folder / "ssm_mamba_lm.json").read_text())["config"]


@pytest.fixture
def published(golden, tmp_path, request):
    """The golden model as its authors publish one."""
    fixtures = request.path.parent.parent / "fixtures"
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(fixtures)))
    torch.save(golden("ssm_mamba_lm", "param."), folder / "pytorch_model.bin")
    return folder


def tiny(**options):
    model = MambaLM(50, 16, 2, d_state=4, **options).eval()
    with torch.no_grad():  # a model that has been trained a little: logits that differ
        for block in model.blocks:
            block.mixer.out_proj.weight.mul_(3)
        model.embedding.weight.mul_(20)
    return model


def test_golden(golden, relative_error, published):
    model, t = MambaLM.from_pretrained(published), golden("ssm_mamba_lm")
    assert model.head.weight is model.embedding.weight
    ids = t["in.ids"]
    logits = model(ids)
    assert (logits - t["out.logits"]).abs().max() < 2e-5 * t["out.logits"].abs().max()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(loss, t["out.loss"][0])
    loss.backward()
    gradients = dict(model.named_parameters())
    wanted = golden("ssm_mamba_lm", "grad.")
    assert {native_name(name) for name in wanted} == set(gradients)
    for name, want in wanted.items():
        assert relative_error(gradients[native_name(name)].grad, want) < 1e-4, name
        assert official_name(native_name(name)) == name


@torch.no_grad()
def test_golden_steps_and_generation(golden, published):
    model, t = MambaLM.from_pretrained(published), golden("ssm_mamba_lm")
    ids, limit = t["in.ids"], 2e-5 * t["out.logits"].abs().max()
    cache = model.allocate_cache(2)
    steps = torch.stack([model.step(one, cache) for one in ids.unbind(1)], 1)
    assert (steps - t["out.step_logits"]).abs().max() < limit
    cache = model.allocate_cache(2)
    parts = torch.cat([model(part, cache) for part in ids.split([11, 1, 11], 1)], 1)
    assert (parts - t["out.logits"]).abs().max() < limit
    assert model.generate(ids[:, :11], 16).tolist() == t["out.greedy_ids"].tolist()


@torch.no_grad()
def uncached(model, prompt, new):
    """The likeliest tokens, by the whole sequence for each."""
    ids = torch.tensor(prompt)[None]
    for _ in range(new):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt) :]


def test_generation_equals_the_model_called_on_all_before():
    """Also for prompts of different lengths, of which each is as if it were alone."""
    model = tiny()
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8]]
    made = model.generate(prompts, 9)
    for prompt, tokens in zip(prompts, made, strict=True):
        assert tokens.tolist() == uncached(model, prompt, 9).tolist()
    assert len({tuple(row) for row in made.tolist()}) == 3
    streamed = torch.stack(list(model.stream(prompts, 9)), 1)
    assert_close(streamed, made)


@torch.no_grad()
def test_a_mask_leaves_out_what_stands_in_front():
    model = tiny()
    ids = torch.randint(50, (1, 6))
    padded = torch.cat((torch.randint(50, (1, 4)), ids), 1)
    mask = torch.arange(10)[None] >= 4
    cache, own = model.allocate_cache(1), model.allocate_cache(1)
    assert_close(model(padded, cache, mask)[:, 4:], model(ids, own), atol=1e-5, rtol=1e-5)
    for one, other in zip(cache, own, strict=True):
        assert_close(tuple(one), tuple(other), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_packed_sequences():
    """Each in its row as if alone."""
    model = tiny()
    parts = [torch.randint(50, (1, n)) for n in (4, 1, 6)]
    row = torch.cat(parts, 1)
    seq_idx = torch.tensor([[7] * 4 + [2] + [7] * 6])
    want = torch.cat([model(part) for part in parts], 1)
    assert_close(model(row, seq_idx=seq_idx), want, atol=1e-5, rtol=1e-5)


def test_a_sequence_that_has_ended():
    model = tiny()
    alone = model.generate([[3, 4], [9]], 12)
    eos = alone[0, 2].item()
    made = model.generate([[3, 4], [9]], 12, eos=eos)
    first = alone[0].tolist().index(eos)
    assert made[0, : first + 1].tolist() == alone[0, : first + 1].tolist()
    assert set(made[0, first:].tolist()) == {eos}
    one = model.generate([[3, 4]], 12, eos=eos)
    assert one.shape == (1, first + 1)


def test_sampling():
    """Frequencies of what is drawn, against probabilities worked out by hand."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(1)

    def frequencies(**options):
        drawn = sample(logits, generator=generator, **options)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    limit = {"atol": 0.015, "rtol": 0}
    assert_close(frequencies(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), **limit)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert_close(frequencies(temperature=0.5), squares / squares.sum(), **limit)
    assert_close(frequencies(temperature=1.0, top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **limit)
    assert_close(frequencies(temperature=1.0, top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), **limit)
    assert_close(frequencies(temperature=1.0, top_p=0.4), torch.tensor([1.0, 0, 0, 0]), **limit)
    both = torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    assert_close(frequencies(temperature=1.0, top_k=9, top_p=0.9), both, **limit)
    assert (sample(logits, 0.0) == 0).all()
    model = tiny()
    one, two = (
        model.generate([[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    again = model.generate([[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert_close(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(tie, tmp_path):
    model = MambaLM(53, 16, 2, d_state=4, tie_embeddings=tie, vocab_multiple=16)
    assert model.embedding.weight.shape == (64, 16)
    model.save_pretrained(tmp_path / "lm")
    again = MambaLM.from_pretrained(tmp_path / "lm", dtype=torch.bfloat16)
    assert again.head.weight.dtype == torch.bfloat16
    again = MambaLM.from_pretrained(tmp_path / "lm")
    ids = torch.randint(53, (2, 7))
    assert_close(again(ids), model(ids), atol=0, rtol=0)
    assert again(ids).shape == (2, 7, 53)
    assert (again.head.weight is again.embedding.weight) == tie
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == ["config.json", "model.safetensors"]


def test_a_checkpoint_of_transformers(tmp_path):
    model = tiny(vocab_multiple=1)
    names = {"embedding.weight": "backbone.embeddings.weight"}
    weights = {names.get(k, official_name(k)): v.clone() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    settings = {"model_type": "mamba", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"conv_kernel": 4, "expand": 2}))
    ids = torch.randint(50, (1, 5))
    assert_close(MambaLM.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "d_intermediate = 64; only 0 is Mamba's first version"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "the layer 'Mamba2'; only 'Mamba1' is known"),
        ({"ssm_cfg": {"dt_rank": 3}}, "options of ssm_cfg that are not known: dt_rank"),
        ({"hidden_size": 16, "model_type": "mamba2"}, "of a 'mamba2'"),
    ],
)
def test_other_models_are_refused(published, changes, message):
    settings = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=message):
        MambaLM.from_pretrained(published)


def test_hostile_weights_are_not_run(published):
    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"backbone.embedding.weight": Hostile()}, published / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        MambaLM.from_pretrained(published)


def test_bad_prompts_and_options():
    model = tiny()
    with pytest.raises(ValueError, match=r"a token each, got lengths \[2, 0\]"):
        model.generate([[1, 2], []], 3)
    with pytest.raises(ValueError, match=r"prompts must be \(batch, length\) with tokens in them, got \(1, 0\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate([[1]], 0)
    for options, message in (
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([[1]], 3, **options)
    ids, mask = pad_left([[1, 2], [3, 4]], torch.device("cpu"))
    assert (ids.tolist(), mask) == ([[1, 2], [3, 4]], None)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_gpu_generates_what_a_cpu_does(batch):
    """With a CUDA graph, by kernels for few sequences and for many; a second call has a cache of its own."""
    model = tiny()
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8], [1, 2], [40], [30, 20, 10]][:batch]
    want = model.generate(prompts, 12)
    model.cuda()
    for _ in range(2):
        assert model.generate(prompts, 12).tolist() == want.tolist()
    half = model.to(torch.bfloat16).generate(prompts, 12)
    assert half.shape == (batch, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_kernels_that_overlap_in_a_graph_change_nothing(batch):
    """Bit by bit what they give one after the other, at a size where each fills the chip."""
    torch.manual_seed(0)
    model = MambaLM(1000, depth=6, device="cuda").to(torch.bfloat16).eval()
    ids = torch.randint(1000, (60, batch), device="cuda")
    with torch.inference_mode():
        alone, captured = model.allocate_cache(batch), model.allocate_cache(batch)
        step = model._stepper(ids[0], captured)
        for token in ids:
            assert torch.equal(step(token), model.step(token, alone))
