"""Whether a layer may pass a module's weights to a kernel instead of calling the module."""

from torch import nn
from torch.nn.modules import module as every_module
from torch.utils.module_tracker import ModuleTracker

from .norm import RMSNorm

HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, RMSNorm)


def is_plain(module: nn.Module, *, bias: bool | None = None, tracked: bool = False) -> bool:
    """Whether calling the module runs only the forward of its class, on its own tensors.

    A module must be called if it is wrapped or replaced (LoRA, quantisation), parametrised (another class), has hooks
    of any kind (also from old weight norms and pruning), another forward (accelerate), or weights of a tensor subclass.

    bias: whether the module must have a bias; None accepts both.
    tracked: whether a module is plain, too, if the only hooks are those of FLOP counters, which note what is called.
    """
    own = module.__dict__
    weight, own_bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return (
        type(module) in PLAIN
        and runs_its_class(module, tracked=tracked)
        and (bias is None or (own_bias is not None) == bias)
        # During an export or a functional call a parameter has another type, but without this method.
        and (type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__"))
    )


def runs_its_class(module: nn.Module, *, tracked: bool = False) -> bool:
    """Whether calling the module runs only the forward of its class: there are no hooks and no other forward.

    tracked: whether the hooks of FLOP counters are allowed; see `is_plain`.
    """
    own = module.__dict__
    return (
        not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and "forward" not in own
        and (not every_module._has_any_global_hook() or (tracked and _only_trackers()))
    )


def _only_trackers() -> bool:
    """Whether all hooks on all modules are those of a ModuleTracker."""
    every = (getattr(every_module, f"_global_{kind}_hooks") for kind in HOOKS)
    return all(isinstance(getattr(h, "__self__", None), ModuleTracker) for hooks in every for h in hooks.values())
