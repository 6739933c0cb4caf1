"""Models from a configuration: weights from any file, and their preprocessing."""

import pytest
import timm
import torch

import vim  # noqa: F401  (registers the models)
from vim.console.errors import ConfigError
from vim.data import DataConfig
from vim.timm_models.config import LoadedModelConfig, ModelConfig
from vim.timm_models.create import create_model
from vim.timm_models.input import at_size, check_size, resolve_input
from vim.timm_models.name import needs_vim, timm_name


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
    (tmp_path / "config.json").write_text('{"architecture": "vim_nano"}')
    assert timm_name(str(tmp_path)) == f"local-dir:{tmp_path}"
    assert timm_name("resnet18") == "resnet18"


def test_input_comes_from_the_model_where_the_data_section_is_silent():
    kwargs = {"img_size": 28, "patch_size": 7, "in_chans": 1}
    model = timm.create_model("vim_nano", **kwargs)
    data_config = resolve_input(model, kwargs, DataConfig())
    assert data_config["input_size"] == (1, 28, 28)
    assert data_config["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert data_config["std"] == pytest.approx((sum((0.229, 0.224, 0.225)) / 3,))
    assert (data_config["interpolation"], data_config["crop_pct"]) == ("bicubic", 0.875)
    given = DataConfig(mean=(0.1,), std=(0.3,), crop_pct=1.0, interpolation="bilinear")
    data_config = resolve_input(model, kwargs, given)
    assert (data_config["mean"], data_config["std"]) == ((0.1,), (0.3,))
    assert (data_config["interpolation"], data_config["crop_pct"]) == ("bilinear", 1.0)
    with pytest.raises(ConfigError, match=r"data.mean needs one value for each of 1 channels"):
        resolve_input(model, kwargs, DataConfig(mean=(0.1, 0.2, 0.3)))


def test_the_height_comes_before_the_width():
    kwargs = {"img_size": (24, 32), "patch_size": 8, "depth": 1}
    model = timm.create_model("vim_nano", **kwargs)
    data_config = resolve_input(model, kwargs, DataConfig())
    assert model(torch.zeros(1, *data_config["input_size"])).shape == (1, 1000)
    assert data_config["input_size"] == (3, 24, 32)
    check_size(model, "vim_nano", kwargs, data_config)
    square = at_size(model, LoadedModelConfig("vim_nano", kwargs=kwargs), 24)
    assert square(torch.zeros(1, 3, 24, 24)).shape == (1, 1000)


def test_a_model_that_was_asked_to_take_any_size_does():
    name, tiny = "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    kwargs = tiny | {"strict_img_size": False}
    model = timm.create_model(name, **kwargs)
    data_config = resolve_input(model, kwargs, DataConfig(img_size=64))
    check_size(model, name, kwargs, data_config)
    assert model(torch.zeros(1, *data_config["input_size"])).shape == (1, 1000)
    with pytest.raises(ConfigError, match=r"takes images of 224 x 224 pixels, data.img_size makes them 64 x 64"):
        check_size(model, name, tiny, data_config)


def test_a_larger_test_size_of_timms_comes_with_its_crop():
    model = timm.create_model("resnet18")  # timm's configuration: test at 288 pixels with a crop of 1
    crops = {size: resolve_input(model, {}, DataConfig(img_size=size))["crop_pct"] for size in (None, 256, 288)}
    assert crops == {None: 0.95, 256: 0.95, 288: 1.0}
    assert resolve_input(model, {}, DataConfig(img_size=288, crop_pct=0.9))["crop_pct"] == 0.9


@pytest.mark.parametrize("name", ["vim_tiny", "deit_tiny_patch16_224"])
@pytest.mark.parametrize("size", [64, 320])
def test_a_model_at_another_size_equals_one_that_loads_its_weights_at_that_size(name, size, tmp_path):
    path = str(tmp_path / "weights.pth")
    model = create_model(ModelConfig(name, kwargs={"depth": 1}), 5).eval()
    torch.save(model.state_dict(), path)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    changed = at_size(model, LoadedModelConfig(name), size)
    loaded = create_model(ModelConfig(name, checkpoint=path, kwargs={"depth": 1, "img_size": size}), 5).eval()
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(changed(images), loaded(images), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in before.items())
    assert at_size(model, LoadedModelConfig(name), 224) is model


def test_models_without_tables_take_any_size_and_others_say_what_they_cannot():
    convnet = timm.create_model("resnet18")
    assert at_size(convnet, LoadedModelConfig("resnet18"), 256) is convnet
    mixer = timm.create_model("mixer_s32_224")
    assert at_size(mixer, LoadedModelConfig("mixer_s32_224"), 224) is mixer
    with pytest.raises(ConfigError, match=r"mixer_s32_224 takes images of 224 x 224 pixels and cannot change to 256"):
        at_size(mixer, LoadedModelConfig("mixer_s32_224"), 256)
    with pytest.raises(ConfigError, match=r"vim_nano cannot take images of 2 x 2 pixels: .* at least the patch_size"):
        at_size(timm.create_model("vim_nano"), LoadedModelConfig("vim_nano"), 2)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("vim_tiny", True),
        ("s4nd_tiny", True),
        ("adventurer_base.wangf3014_in1k_384", True),
        ("vit_tiny_patch16_224", False),
        ("local-dir:runs/vim_tiny", False),
    ],
)
def test_which_models_timm_has_only_with_vim(name, needs):
    assert needs_vim(name) is needs
