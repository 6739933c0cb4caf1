"""Whether a layer may pass a module's weights to a kernel instead of calling the module."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .norm import RMSNorm

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, RMSNorm)


def is_plain(module: nn.Module, *, bias: bool | None = None) -> bool:
    """Whether calling the module runs only the forward of its class, on its own tensors.

    A module must be called if it is wrapped or replaced (LoRA, quantisation), parametrised (another class), has hooks
    of any kind (also from old weight norms and pruning), another forward (accelerate), or weights of a tensor subclass.

    bias: whether the module must have a bias; None accepts both.
    """
    own = module.__dict__
    weight, own_bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return (
        type(module) in PLAIN
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and "forward" not in own
        and (bias is None or (own_bias is not None) == bias)
        # During an export or a functional call a parameter has another type, but without this method.
        and (type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__"))
        and not _has_any_global_hook()
    )
