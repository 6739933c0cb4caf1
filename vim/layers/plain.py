"""When a layer may hand a module's weights to a kernel instead of calling the module."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .norm import RMSNorm

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, RMSNorm)


def is_plain(module: nn.Module, *, bias: bool | None = None) -> bool:
    """Whether a call of the module is its class's forward on its own tensors and nothing else.

    Not so, and the module must be called: one that is wrapped or replaced (LoRA, quantisation), parametrised (another
    class), with hooks of any kind (old weight norms and pruning are some, too), with another forward (accelerate), or
    with weights that are a tensor class of their own.

    bias: whether it must have one; None where that is all the same.
    """
    own = module.__dict__
    weight, own_bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return (
        type(module) in PLAIN
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and "forward" not in own
        and (bias is None or (own_bias is not None) == bias)
        # In an export or a functional call a parameter has another type, but not this method.
        and (type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__"))
        and not _has_any_global_hook()
    )
