"""MambaLM against golden numbers from the authors' code, and generation against repeated calls of the model."""

import fnmatch
import json
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from lm_by_hand import TRANSFORMERS, by_hand, write_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from vim.layers.rename import rename
from vim.models.lm_checkpoint import NATIVE_NAMES, official_name
from vim.models.mamba_lm import MambaLM, pad_left, sample


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def config(golden_folder):
    return json.loads((golden_folder / "ssm_mamba_lm.json").read_text())["config"]


@pytest.fixture
def published(golden, tmp_path, request):
    """The golden model in the format of the authors' repositories."""
    fixtures = request.path.parent.parent / "fixtures"
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(fixtures)))
    torch.save(golden("ssm_mamba_lm", "param."), folder / "pytorch_model.bin")
    return folder


def tiny(d_state=4):
    """A model that generates varied text, depending on what came before.

    With tied embeddings it would repeat its last token, whatever mask, cache or eos do.
    """
    model = MambaLM(50, 16, 2, d_state=d_state, tie_embeddings=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight.mul_(22)
        model.embedding.weight.mul_(20)
        model.head.weight[50:].mul_(10)  # rows outside the vocabulary, which would win
    return model


def assert_varied(made):
    """All rows differ, and each has at least five different tokens."""
    rows = made.tolist()
    assert len({tuple(row) for row in rows}) == len(rows)
    assert min(len(set(row)) for row in rows) >= 5, rows


def test_initial_weights():
    """Embeddings have std 0.02; output projections are those of a block divided by sqrt(depth)."""
    one, nine = (MambaLM(1000, 64, depth) for depth in (1, 9))
    for model, bound in ((one, 128**-0.5), (nine, 128**-0.5 / 3)):
        assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for block in model.blocks:
            assert block.mixer.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    spared = {
        name for name, _ in one.named_parameters() if any(map(partial(fnmatch.fnmatch, name), one.no_weight_decay()))
    }
    assert spared == {
        "norm.weight",
        "blocks.0.norm.weight",
        *(f"blocks.0.mixer.ssm.{n}" for n in ("A_log", "D", "dt_proj.bias")),
    }


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
    ours = {name: rename(NATIVE_NAMES, name) for name in wanted}
    assert set(ours.values()) == set(gradients)
    for name, want in wanted.items():
        assert relative_error(gradients[ours[name]].grad, want) < 1e-4, name
        assert official_name(ours[name]) == name


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
    """Greedy tokens, each from a call on the whole sequence."""
    ids = torch.tensor(prompt)[None]
    for _ in range(new):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt) :]


def test_generation_equals_the_model_called_on_all_before():
    """Also for prompts of different lengths, each of which behaves as if it were alone."""
    model = tiny()
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8]]
    made = model.generate(prompts, 9)
    for prompt, tokens in zip(prompts, made, strict=True):
        assert tokens.tolist() == uncached(model, prompt, 9).tolist()
    assert_varied(made)
    zeros, _ = pad_left(prompts, torch.device("cpu"))
    assert not torch.equal(model.generate(zeros, 9), made)  # padding must not act as a token
    streamed = torch.stack(list(model.stream(prompts, 9)), 1)
    assert_close(streamed, made)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(["....######"], id="in front"),
        pytest.param(["######....", "##"], id="behind, then a turn"),
        pytest.param(["##..#.###.", "..###"], id="in the midst, then a turn with it in front"),
        pytest.param(["#####", "...", "#.#"], id="a turn without tokens"),
    ],
)
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(turns):
    """At any place, next to a row without padding; outputs and the cache after the call."""
    model = tiny()
    cache, alone, whole = (model.allocate_cache(n) for n in (2, 1, 1))
    for turn in turns:
        ids = torch.randint(50, (2, len(turn)))
        mask = torch.tensor([[letter == "#" for letter in turn], [True] * len(turn)])
        logits = model(ids, cache, mask)
        assert_close(logits[1:], model(ids[1:], whole), atol=1e-5, rtol=1e-5)
        if mask[0].any():
            assert_close(logits[0][mask[0]], model(ids[0][mask[0]][None], alone)[0], atol=1e-5, rtol=1e-5)
    for both, *single in zip(cache, alone, whole, strict=True):
        for part, *rows in zip(both, *single, strict=True):
            assert_close(part, torch.cat(rows), atol=1e-5, rtol=1e-5)


def test_masks_that_mean_nothing():
    model, ids = tiny(), torch.randint(50, (2, 5))
    with pytest.raises(ValueError, match=r"mask must be bool and .* = \(2, 5\), got torch.int64, \(2, 5\)"):
        model(ids, mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"got torch.bool, \(5,\)"):
        model(ids, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask and seq_idx do not go together; give padding its own seq_idx"):
        model(ids, mask=ids >= 0, seq_idx=torch.zeros_like(ids))


@torch.no_grad()
def test_packed_sequences():
    """Each sequence of a row behaves as if it were alone."""
    model = tiny()
    parts = [torch.randint(50, (1, n)) for n in (4, 1, 6)]
    row = torch.cat(parts, 1)
    seq_idx = torch.tensor([[7] * 4 + [2] + [7] * 6])
    want = torch.cat([model(part) for part in parts], 1)
    assert_close(model(row, seq_idx=seq_idx), want, atol=1e-5, rtol=1e-5)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adapter(torch.nn.Module):
    """A layer with a parallel branch, as in LoRA."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.beside = layer, torch.nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.beside(x)


@torch.no_grad()
def test_a_step_calls_layers_that_are_more_than_their_weights():
    """Adapters, parametrisations and hooks act the same in steps and in one call."""
    model, ids = tiny(), torch.randint(50, (2, 7))

    def steps():
        cache = model.allocate_cache(2)
        return torch.stack([model.step(one, cache) for one in ids.unbind(1)], 1)

    before = steps()
    mixer = model.blocks[0].mixer
    mixer.in_proj = Adapter(mixer.in_proj)
    assert_close(steps(), model(ids), atol=1e-5, rtol=1e-5)
    torch.nn.utils.parametrize.register_parametrization(mixer.out_proj, "weight", Doubled())
    assert_close(steps(), model(ids), atol=1e-5, rtol=1e-5)
    hook = model.blocks[1].norm.register_forward_hook(lambda *of: of[-1] + 1)
    assert_close(steps(), model(ids), atol=1e-5, rtol=1e-5)
    hook.remove()
    mixer.in_proj = mixer.in_proj.layer
    torch.nn.utils.parametrize.remove_parametrizations(mixer.out_proj, "weight", leave_parametrized=False)
    assert_close(steps(), before, atol=0, rtol=0)


def test_a_sequence_that_has_ended():
    """It repeats eos while another one runs unchanged; generation stops when all have ended."""
    model = tiny()
    alone = model.generate([[3, 4], [9]], 12)
    assert_varied(alone)
    ended, running = alone.tolist()
    eos = next(token for token in ended if token not in running)
    until = ended[: ended.index(eos) + 1]
    assert 1 < len(until) < 10
    assert model.generate([[3, 4], [9]], 12, eos=eos).tolist() == [until + (12 - len(until)) * [eos], running]
    assert model.generate([[3, 4]], 12, eos=eos).tolist() == [until]


def test_sampling():
    """Frequencies of the samples against probabilities computed by hand."""
    logits, places = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])), torch.tensor([2, 0, 3, 1])
    rows = torch.cat((logits.repeat(20_000, 1), logits[places].repeat(20_000, 1) + 3))
    generator = torch.Generator().manual_seed(1)

    def frequencies(**options):
        """Frequencies in the first rows. The other rows, permuted and shifted, must have the same."""
        drawn = sample(rows, generator=generator, **options).split(20_000)
        first, others = (torch.bincount(part, minlength=4) / 20_000 for part in drawn)
        assert_close(others, first[places], atol=0.03, rtol=0)
        return first

    limit = {"atol": 0.015, "rtol": 0}
    assert_close(frequencies(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), **limit)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert_close(frequencies(temperature=0.5), squares / squares.sum(), **limit)
    assert_close(frequencies(temperature=1.0, top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **limit)
    assert_close(frequencies(temperature=1.0, top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), **limit)
    first = torch.tensor([1.0, 0, 0, 0])  # its probability after temperature is 0.68, after top_k 0.62
    for temperature, top_k, top_p in ((1.0, None, 0.4), (0.5, None, 0.6), (1.0, 2, 0.6)):
        assert_close(frequencies(temperature=temperature, top_k=top_k, top_p=top_p), first, **limit)
    both = torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    assert_close(frequencies(temperature=1.0, top_k=9, top_p=0.9), both, **limit)
    assert sample(rows, 0.0).unique_consecutive().tolist() == [0, 1]
    even = sample(torch.full((20_000, 2), 40.0).bfloat16(), 1.0, generator=generator)
    assert even.float().mean().item() == pytest.approx(0.5, abs=0.02), "noise in half precision is equal too often"
    even = sample(torch.zeros(1000, 4), 1.0, top_p=0.5, generator=generator)
    assert len(even.unique()) == 2, "two of four have half together"
    model = tiny()
    greedy = model.generate([[1, 2], [3]], 9)
    assert_varied(greedy)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert_close(model.generate([[1, 2], [3]], 9, temperature=9.0, **options), greedy)
    one, two = (
        model.generate([[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    again = model.generate([[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert_close(one, again)
    assert not torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(tie, tmp_path):
    model = MambaLM(53, 16, 2, d_state=4, tie_embeddings=tie, vocab_multiple=16)
    assert model.embedding.weight.shape == (64, 16)
    model.save_pretrained(tmp_path / "lm")
    again = MambaLM.from_pretrained(tmp_path / "lm", dtype=torch.bfloat16)
    assert again.head.weight.dtype == torch.bfloat16
    assert MambaLM.from_pretrained(tmp_path / "lm", device="meta").head.weight.is_meta
    again = MambaLM.from_pretrained(tmp_path / "lm")
    assert not any(module.training for module in again.modules())
    ids = torch.randint(53, (2, 7))
    assert_close(again(ids), model(ids), atol=0, rtol=0)
    assert again(ids).shape == (2, 7, 53)
    assert (again.head.weight is again.embedding.weight) == tie
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "lm" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "without it transformers does not load the file"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_norm_epsilon": 0.3},
        {"time_step_rank": 3},
        {"intermediate_size": 40},
        {"intermediate_size": 37},
        {"expand": 3, "intermediate_size": 48},
        {"hidden_act": "swish", "conv_kernel": 2},
        {"use_bias": True},
        {"use_conv_bias": False},
    ],
    ids=str,
)
def test_a_checkpoint_of_transformers(changes, tmp_path, relative_error):
    """In one call, step by step, and after saving in the authors' format."""
    weights, options = write_transformers(tmp_path / "lm", **changes)
    ids = torch.randint(50, (2, 9))
    want = by_hand(weights, options, ids)
    model = MambaLM.from_pretrained(tmp_path / "lm")
    assert relative_error(model(ids), want) < 1e-5
    cache = model.allocate_cache(2)
    steps = torch.stack([model.step(one, cache) for one in ids.unbind(1)], 1)
    assert relative_error(steps, want) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert_close(MambaLM.from_pretrained(tmp_path / "saved")(ids), model(ids), atol=0, rtol=0)


def test_a_checkpoint_without_a_head(tmp_path):
    """From transformers' MambaModel, whose names have no prefix `backbone.`."""
    write_transformers(tmp_path / "lm")
    ids = torch.randint(50, (1, 5))
    want = MambaLM.from_pretrained(tmp_path / "lm")(ids)
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    bare = {name.removeprefix("backbone."): value for name, value in weights.items()}
    save_file(bare, tmp_path / "lm" / "model.safetensors")
    assert_close(MambaLM.from_pretrained(tmp_path / "lm")(ids), want, atol=0, rtol=0)


def test_a_residual_stream_in_the_dtype_of_the_weights(tmp_path):
    write_transformers(tmp_path / "lm", residual_in_fp32=False)
    model, ids = MambaLM.from_pretrained(tmp_path / "lm", dtype=torch.bfloat16), torch.randint(50, (1, 40))
    seen = []
    for module in (*model.blocks, model.norm):
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    narrow = model(ids)
    model.step(ids[:, 0], model.allocate_cache(1))  # a step calls the norm by itself
    assert seen == [torch.bfloat16] * 4
    model.residual_in_fp32 = True
    assert not torch.equal(model(ids), narrow)
    assert model.config["residual_in_fp32"] is False
    model.save_pretrained(tmp_path / "saved")
    assert MambaLM.from_pretrained(tmp_path / "saved").residual_in_fp32 is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, r"has hidden_act = 'gelu'; MambaLM .* takes only 'silu' or 'swish'"),
        ({"use_bias": True}, r"config.json: 4 missing \(backbone.layers.0.mixer.in_proj.bias, .* \.\.\.\)$"),
        ({"use_conv_bias": None}, "use_conv_bias = None; it must be true or false"),
        ({"rms_norm": False}, "rms_norm = False; .* only True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4}; .* only None"),
        ({"model_type": "falcon_mamba"}, "model_type = 'falcon_mamba'; .* only 'mamba'"),
        ({"time_step_rank": 0}, "time_step_rank = 0; it must be 'auto' or a whole number of at least 1"),
        ({"expand": -1}, "expand = -1; it must be a number above 0"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small'; it must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'; it must be true or false"),
        ({"n_layer": 3}, "n_layer = 3; .* only 2"),
        ({"tie_word_embeddings": False}, r"do not fit config.json: 1 missing \(lm_head.weight\)$"),
        ({"num_hidden_layers": 3}, r"config.json: 10 missing \(backbone.layers.2.norm.weight, .* \.\.\.\)$"),
        ({"num_hidden_layers": 1}, r"config.json: 10 unexpected \(backbone.layers.1.mixer.A_log, .* \.\.\.\)$"),
        ({"state_size": 5}, r"4 of another shape or dtype \(backbone.layers.0.mixer.A_log \(32, 4\) torch.float32 for"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_transformers_could_say_and_a_mamba_lm_is_not(changes, message, tmp_path):
    write_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS | changes))
    with pytest.raises(ValueError, match=message) as error:
        MambaLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_options_that_nobody_knows(tmp_path):
    write_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS | {"made_by": "us"}))
    with pytest.warns(UserWarning, match="options that are ignored: made_by"):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "d_intermediate = 64; .* takes only 0"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]"),
        ({"rms_norm": False}, r"config.json: 3 missing \(backbone.layers.0.norm.bias, .*, backbone.norm_f.bias\)$"),
        ({"rms_norm": 0}, "rms_norm = 0; it must be true or false"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer = 'Mamba2'; .* takes only 'Mamba1'"),
        ({"ssm_cfg": {"bias": "yes"}}, "ssm_cfg.bias = 'yes'; it must be true or false"),
        ({"ssm_cfg": {"conv_bias": False}}, r"config.json: 2 unexpected \(backbone.layers.0.mixer.conv1d.bias, "),
        ({"ssm_cfg": {"rank": 3}}, "unknown options: ssm_cfg.rank"),
        ({"ssm_cfg": 3}, "ssm_cfg = 3; it must be a table"),
        ({"layers": 3}, "unknown options: layers"),
        ({"n_layer": None}, "n_layer = None; it must be a whole number of at least 1"),
        ({"hidden_size": 16, "model_type": "mamba2"}, "model_type = 'mamba2'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_models_are_refused(published, changes, message):
    settings = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=message):
        MambaLM.from_pretrained(published)


def test_options_of_the_authors(published, tmp_path, relative_error):
    """ssm_cfg.dt_rank is used; options for initial values are ignored."""
    settings = json.loads((published / "config.json").read_text())
    model = MambaLM.from_pretrained(published)
    settings["ssm_cfg"] |= {"dt_rank": model.blocks[0].mixer.ssm.dt_rank, "dt_min": 0.01, "use_fast_path": False}
    (published / "config.json").write_text(json.dumps(settings))
    ids = torch.randint(50, (1, 5))
    assert_close(MambaLM.from_pretrained(published)(ids), model(ids), atol=0, rtol=0)


def shard(folder, name="model.safetensors"):
    """Split the weights of a folder into three files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    files = [f"{stem}-{i}-of-3.{suffix}" for i in range(3)]
    places = {key: files[i % 3] for i, key in enumerate(weights)}
    for file in files:
        part = {key: weights[key] for key, place in places.items() if place == file}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files, places


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, ann/lm. Returns: the folder of its files, and the list of requested files."""

    def download(repository, allow_patterns):
        assert repository == "ann/lm"
        for path in sorted((tmp_path / "repository").iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                asked.append(path.name)
                shutil.copy(path, tmp_path / "cache")
        return str(tmp_path / "cache")

    asked = []
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "repository", asked


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(name, hub):
    """From a folder and from the hub, without requests for other files."""
    folder, asked = hub
    write_transformers(folder)
    ids = torch.randint(50, (1, 5))
    want = MambaLM.from_pretrained(folder)(ids)
    files, _ = shard(folder, name)
    for other in ("flax_model.msgpack", "tokenizer.json"):
        (folder / other).touch()
    assert_close(MambaLM.from_pretrained(folder)(ids), want, atol=0, rtol=0)
    assert_close(MambaLM.from_pretrained("ann/lm")(ids), want, atol=0, rtol=0)
    assert set(asked) == {"config.json", "tokenizer.json", f"{name}.index.json", *files}


def test_of_two_kinds_of_weights_the_safe_ones_are_taken(hub):
    """From a folder and from the hub, without requests for the other kind."""
    folder, asked = hub
    write_transformers(folder)
    ids = torch.randint(50, (1, 5))
    want = MambaLM.from_pretrained(folder)(ids)
    (folder / "pytorch_model.bin").write_bytes(b"others")
    for source in (folder, "ann/lm"):
        assert_close(MambaLM.from_pretrained(source)(ids), want, atol=0, rtol=0)
    assert set(asked) == {"config.json", "model.safetensors"}


def test_shards_that_are_not_whole(tmp_path):
    write_transformers(tmp_path)
    files, places = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    name = next(iter(places))

    def fails(message, error=ValueError, weight_map=None):
        index.write_text(json.dumps({"weight_map": places if weight_map is None else weight_map}))
        with pytest.raises(error, match=message) as caught:
            MambaLM.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    fails(f"does not hold the weights that .*json lists: {name}", weight_map=places | {name: files[1]})
    fails("names files of other folders: ../model", weight_map=places | {name: "../model-0-of-3.safetensors"})
    fails("weight_map must be a table of file names", weight_map=places | {name: 3})
    (tmp_path / files[2]).rename(tmp_path / "elsewhere")
    fails(rf"1 of 3 shards are missing in .*: {files[2]}", FileNotFoundError)
    (tmp_path / files[2]).write_bytes((tmp_path / "elsewhere").read_bytes()[:-9])
    fails(f"{files[2]} is damaged: ")


def test_what_is_no_checkpoint(published, tmp_path, monkeypatch):
    def fails(source, message, error=ValueError):
        with pytest.raises(error, match=message) as caught:
            MambaLM.from_pretrained(source)
        assert "\n" not in str(caught.value)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {name: vim_nano}")
    fails(tmp_path / "run", "there is no config.json in .*run; a language model needs config", FileNotFoundError)
    (tmp_path / "run" / "config.json").write_text('{"architecture": "vim_nano", "num_classes": 10}')
    fails(tmp_path / "run", "config.json has no vocab_size; give that of a Mamba language model")
    for content, message in (
        (b'{"d_model": 16,', "is damaged: Expecting"),
        (b"\xff\xfe{}", "is damaged: .*utf-8"),
        (b"[" * 100_000, "is damaged: "),
        (b"[1]", "is damaged: it must hold a table, got list"),
    ):
        (tmp_path / "run" / "config.json").write_bytes(content)
        fails(tmp_path / "run", message)
    weights = published / "pytorch_model.bin"
    fails(weights, "is a file; give its folder", NotADirectoryError)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails(published, "is damaged, or holds more than weights")
    torch.save([torch.zeros(2)], weights)
    fails(published, "must hold only weights by name")
    weights.unlink()
    fails(published, "there are no weights in .*published", FileNotFoundError)

    fails(tmp_path / "no" / "where", "there is no .*where; give a folder with config.json and model", FileNotFoundError)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = r"there is no ann/lm here, and the hub does not have it \(.*refused\); give a folder with config.json"
    fails("ann/lm", message, FileNotFoundError)


def test_weights_that_say_two_things(tmp_path):
    write_transformers(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["backbone.embeddings.weight"]
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights of head and embedding differ, but config.json says .* tied"):
        MambaLM.from_pretrained(tmp_path)
    save_file(weights | {"backbone.embedding.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"backbone.embedding.* and backbone.embedding.* are the same weight"):
        MambaLM.from_pretrained(tmp_path)
    save_file(weights | {"backbone.embeddings.weight": embedding.to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embeddings.weight \(50, 16\) torch.int8 for \(50, 16\)"):
        MambaLM.from_pretrained(tmp_path)


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny().save_pretrained("~/lm")
    assert (tmp_path / "lm" / "config.json").exists()
    MambaLM.from_pretrained("~/lm")


def test_hostile_weights_are_not_run(published, capsys):
    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"backbone.embedding.weight": Hostile()}, published / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or holds more than weights"):
        MambaLM.from_pretrained(published)
    assert capsys.readouterr().out == ""


def test_bad_prompts_and_options():
    model = tiny()
    with pytest.raises(ValueError, match=r"each prompt must have a token, got lengths \[2, 0\]"):
        model.generate([[1, 2], []], 3)
    with pytest.raises(ValueError, match=r"prompts must be \(batch, length\) and not empty, got \(1, 0\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate([[1]], 0)
    for prompts in ([[1], [3, 50]], torch.tensor([[1, 50]])):
        with pytest.raises(ValueError, match=r"prompts hold the token 50, but the model knows 0 \.\. 49"):
            model.generate(prompts, 3)
    with pytest.raises(ValueError, match=r"hold the token -1"):
        model.generate([[-1]], 3)
    with pytest.raises(ValueError, match=r"prompts must hold whole numbers, got torch.float32"):
        model.generate([[1.5]], 3)
    for options, message in (
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, got inf"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([[1]], 3, **options)
    assert model.generate([[1]], 3, temperature=1.0, top_k=50, top_p=1).shape == (1, 3)
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"logits are NaN: weights are NaN, or torch.float32 overflows"):
        model.generate([[1], [7]], 3)
    ids, mask = pad_left([[1, 2], [3, 4]], torch.device("cpu"))
    assert (ids.tolist(), mask) == ([[1, 2], [3, 4]], None)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_gpu_generates_what_a_cpu_does(batch):
    """With a CUDA graph, by the kernels for few and for many sequences; a second call has a new cache."""
    model = tiny(d_state=24)  # compiles fastest, see test_triton_gpu.py
    prompts = [[3], [7, 1, 4, 9, 2], [5, 5, 8], [1, 2], [40], [30, 20, 10]][:batch]
    want = model.generate(prompts, 12)
    assert_varied(want)
    eos = want[0, 3].item()
    ended = model.generate(prompts, 12, eos=eos)
    model.cuda()
    for _ in range(2):
        assert model.generate(prompts, 12).tolist() == want.tolist()
    assert model.generate(prompts, 12, temperature=9.0, top_k=1).tolist() == want.tolist()
    assert model.generate(prompts, 12, eos=eos).tolist() == ended.tolist()
    half = model.to(torch.bfloat16).generate(prompts, 12)
    assert half.shape == (batch, 12)
    assert half.max() < 50


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_kernels_that_overlap_in_a_graph_change_nothing(batch):
    """Overlapping kernels give bit-identical results to sequential ones, at a size where each fills the GPU."""
    torch.manual_seed(0)
    model = MambaLM(1000, depth=6, device="cuda").to(torch.bfloat16).eval()
    ids = torch.randint(1000, (60, batch), device="cuda")
    with torch.inference_mode():
        alone, captured = model.allocate_cache(batch), model.allocate_cache(batch)
        step = model._stepper(ids[0], captured)
        for token in ids:
            assert torch.equal(step(token), model.step(token, alone))
