"""Models from a configuration: weights from any file, images as the model wants them."""

import pytest
import timm
import torch

import vim  # noqa: F401  (registers the models)
from vim.data import DataConfig
from vim.training.config import ModelConfig
from vim.training.errors import ConfigError
from vim.training.model import create_model, resolve_input, timm_name


@pytest.fixture
def source(tmp_path):
    """A model of 7 classes, and a training checkpoint of it."""
    model = timm.create_model("vim_tiny", depth=1, num_classes=7)
    path = tmp_path / "source.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    return model, str(path)


def test_a_checkpoint_of_the_same_classes_comes_with_its_head(source):
    model, path = source
    loaded = create_model(ModelConfig("vim_tiny", checkpoint=path, kwargs={"depth": 1}), num_classes=7).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_other_classes_get_a_new_head_and_another_grid_a_resized_table(source):
    model, path = source
    config = ModelConfig("vim_tiny_stride8", checkpoint=path, kwargs={"depth": 1})
    loaded = create_model(config, num_classes=3).state_dict()
    assert loaded["head.weight"].shape == (3, 192)
    assert loaded["pos_embed"].shape == (1, 1 + 27 * 27, 192)
    assert torch.equal(loaded["pos_embed"][:, 0], model.pos_embed[:, 0])
    body = [name for name in loaded if name.startswith("blocks.")]
    assert body
    assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in body)


def test_unknown_names_and_arguments():
    with pytest.raises(ConfigError, match=r"no model 'vim_tinny' in timm.* did you mean 'vim_tiny'"):
        create_model(ModelConfig("vim_tinny"), 3)
    with pytest.raises(ConfigError, match=r"model.kwargs do not fit vim_nano: .*'img_sise'"):
        create_model(ModelConfig("vim_nano", kwargs={"img_sise": 32}), 3)
    with pytest.raises(ConfigError, match=r"num_classes is 5, the data set has 3"):
        create_model(ModelConfig("vim_nano", kwargs={"num_classes": 5}), 3)
    with pytest.raises(ConfigError, match=r"no file nowhere.pth"):
        create_model(ModelConfig("vim_nano", checkpoint="nowhere.pth"), 3)


def test_a_folder_with_a_configuration_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert timm_name(str(tmp_path)) == f"local-dir:{tmp_path}"
    assert timm_name("resnet18") == "resnet18"


def test_input_comes_from_the_model_where_the_data_section_is_silent():
    kwargs = {"img_size": 28, "patch_size": 7, "in_chans": 1}
    model = timm.create_model("vim_nano", **kwargs)
    data_config = resolve_input(model, kwargs, DataConfig())
    assert data_config["input_size"] == (1, 28, 28)
    assert data_config["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert (data_config["interpolation"], data_config["crop_pct"]) == ("bicubic", 0.875)
    given = DataConfig(mean=(0.1,), std=(0.3,), crop_pct=1.0, interpolation="bilinear")
    data_config = resolve_input(model, kwargs, given)
    assert (data_config["mean"], data_config["std"]) == ((0.1,), (0.3,))
    assert (data_config["interpolation"], data_config["crop_pct"]) == ("bilinear", 1.0)
    with pytest.raises(ConfigError, match=r"data.mean needs one value for each of 1 channels"):
        resolve_input(model, kwargs, DataConfig(mean=(0.1, 0.2, 0.3)))
