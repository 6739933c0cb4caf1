"""Configurations of language models: defaults for missing options, saved configurations, and failed saves."""

import json
from pathlib import Path

import pytest
import torch

from vim.models import mamba_lm
from vim.models.lm_checkpoint import arguments_of
from vim.models.mamba_lm import MambaLM

SIZES = {"vocab_size": 50, "d_model": 16, "depth": 2}
USUAL = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": None, "norm_eps": 1e-5}  # of Mamba and of both libraries
FLAGS = {"residual_in_fp32": True, "tie_embeddings": True, "bias": False, "conv_bias": True, "rms_norm": True}


@pytest.mark.parametrize(
    ("config", "vocab_multiple"),
    [
        ({"d_model": 16, "n_layer": 2}, 8),
        ({"d_model": 16, "n_layer": 2, "ssm_cfg": None}, 8),
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2}, 1),
    ],
    ids=["authors", "authors, null", "transformers"],
)
def test_what_is_left_out_is_what_the_library_of_the_checkpoint_takes(config, vocab_multiple):
    assert arguments_of(config | {"vocab_size": 50}) == SIZES | USUAL | FLAGS | {"vocab_multiple": vocab_multiple}


@pytest.mark.parametrize(
    "options",
    [{}, {"dt_rank": 3, "residual_in_fp32": False, "tie_embeddings": False}, {"rms_norm": False, "bias": True}],
    ids=str,
)
def test_a_saved_configuration_has_no_options_but_the_authors(options, tmp_path, request):
    """Their code refuses any other option. The configuration of the golden model has all of theirs."""
    MambaLM(50, 16, 1, **options).save_pretrained(tmp_path)
    known = json.loads((request.path.parent.parent / "fixtures" / "ssm_mamba_lm.json").read_text())["config"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) <= set(known)
    assert set(saved["ssm_cfg"]) <= {"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}


def test_a_save_that_fails_leaves_the_older_weights(tmp_path, monkeypatch):
    model = MambaLM(50, 16, 1)
    model.save_pretrained(tmp_path)

    def on_a_full_disk(weights, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(mamba_lm, "save_file", on_a_full_disk)
    with pytest.raises(OSError, match="no space left"):
        MambaLM(50, 16, 1).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(MambaLM.from_pretrained(tmp_path).embedding.weight, model.embedding.weight)
