"""Parameter groups and the learning rate of every update."""

import math

import pytest
import timm
import torch

import vim  # noqa: F401  (registers the models)
from vim.console.errors import ConfigError
from vim.training.optim import OptimConfig, ScheduleConfig, create_optimizer, create_schedule


def decayed_names(model):
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.05), total_batch=64)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            groups[names.pop(id(p))] = group["weight_decay"]
    assert not names  # every parameter is in one group
    return {name for name, decay in groups.items() if decay == 0.05}


def test_vectors_and_what_the_model_names_have_no_weight_decay():
    decayed = decayed_names(timm.create_model("vim_nano", depth=1, num_classes=3))
    block = "blocks.0.mixer."
    ssm = ("conv1d.weight", "x_proj.weight", "dt_proj.weight")
    want = {f"{block}{direction}_ssm.{name}" for direction in ("forward", "backward") for name in ssm}
    assert decayed == want | {
        f"{block}in_proj.weight",
        f"{block}out_proj.weight",
        "patch_embed.proj.weight",
        "head.weight",
    }


def test_layer_decay_lowers_the_rate_of_lower_layers():
    model = timm.create_model("vim_nano", depth=2, num_classes=3)
    optimizer = create_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5), total_batch=64)
    create_schedule(optimizer, ScheduleConfig(epochs=2, warmup_epochs=0), 1)  # applies the layer-wise factors
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    got = {name: rates[id(p)] for name, p in model.named_parameters()}
    layers = ["patch_embed.proj.weight", "blocks.0.norm.weight", "blocks.1.mixer.in_proj.weight", "head.weight"]
    # timm assigns the final norm to the last block.
    assert [got[name] for name in layers] == [1 / 8, 1 / 4, 1 / 2, 1]
    assert got["pos_embed"] == got["cls_token"] == 1 / 8


@pytest.mark.parametrize(("lr_batch", "want"), [(None, 0.1), (512, 0.1 * 1024 / 512), (2048, 0.05)])
def test_the_rate_scales_with_the_total_batch(lr_batch, want):
    optimizer = create_optimizer(torch.nn.Linear(2, 2), OptimConfig(lr=0.1, lr_batch=lr_batch), total_batch=1024)
    assert {group["lr"] for group in optimizer.param_groups} == {want}


def test_arguments_reach_the_optimizer():
    config = OptimConfig(name="sgd", kwargs={"momentum": 0.5})
    assert create_optimizer(torch.nn.Linear(2, 2), config, 64).defaults["momentum"] == 0.5


def test_unknown_optimizer_and_argument():
    with pytest.raises(ConfigError, match=r"no optimizer 'admw' in timm; did you mean .*'adamw'"):
        create_optimizer(torch.nn.Linear(2, 2), OptimConfig(name="admw"), 64)
    with pytest.raises(ConfigError, match=r"optim.kwargs do not fit adamw: .*'beta'"):
        create_optimizer(torch.nn.Linear(2, 2), OptimConfig(kwargs={"beta": 1}), 64)


def test_step_decay_drops_the_rate_at_the_right_updates():
    config = ScheduleConfig(epochs=10, warmup_epochs=1, warmup_lr=0.1, steps=[2.5, 8])
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = create_schedule(optimizer, config, updates_per_epoch=4)
    rates = []
    for update in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(update + 1)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, *[0.5] * 6, *[0.05] * 22, *[0.005] * 8])


@pytest.mark.parametrize("warmup_epochs", [0, 1.5, 1.6, 5])
def test_every_update_has_the_rate_of_the_closed_form(warmup_epochs):
    config = ScheduleConfig(epochs=10, warmup_epochs=warmup_epochs, warmup_lr=1e-4, min_lr=1e-3)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = create_schedule(optimizer, config, updates_per_epoch=6)
    warmup, total = round(6 * warmup_epochs), 60
    for update in range(total):
        if update < warmup:
            want = 1e-4 + (0.5 - 1e-4) * update / warmup
        else:
            want = 1e-3 + (0.5 - 1e-3) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(want, rel=1e-9)
        schedule.step_update(update + 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_equal_rates_make_a_constant_schedule():
    config = ScheduleConfig(epochs=3, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-5)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1e-5)
    schedule = create_schedule(optimizer, config, updates_per_epoch=4)
    for update in range(12):
        schedule.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
