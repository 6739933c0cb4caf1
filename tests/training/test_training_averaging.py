"""The EMA of the weights equals timm's, bit for bit."""

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

from vim.training.averaging import AveragedWeights


@pytest.mark.parametrize("warmup", [False, True])
def test_the_ema_equals_timms_bit_for_bit(warmup):
    """With batch norm, whose counters are copied, and with every way a run changes weights."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours, timms = (kind(model, 0.7, use_warmup=warmup) for kind in (AveragedWeights, ModelEmaV3))
    for update in range(1, 6):
        if update == 4:
            model.load_state_dict(saved)
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in (ours, timms):
            average.update(model, update if warmup else None)
        for name, tensor in timms.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], tensor), name
            assert "running" not in name or not torch.equal(tensor, saved[name])
    assert ours.module.bn1.num_batches_tracked == 2
