"""Whether a module may compute its result without calling its parts one by one."""

from torch import nn
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['has_hooks', 'is_plain']


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for the module to be called: a profiler, a counter, pruning that computes its weights.

    Hooks, of the module or of all modules, or another `forward` in place of that of its class.
    """
    own = module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module)
    own = own or module._backward_hooks or module._backward_pre_hooks
    of_all = _module._global_forward_hooks or _module._global_forward_pre_hooks
    return bool(own or of_all or _module._global_backward_hooks or _module._global_backward_pre_hooks)


def is_plain(module: nn.Module) -> bool:
    """Whether a module and all its parts are in eval mode and no part has hooks or a forward of its own.

    Otherwise each part has to be called, once and with the whole batch: batch norms in train mode update their
    statistics even if the network around them is in eval mode, those without running statistics have none but those of
    the batch, and hooks see what goes in and out.
    """
    return not any(m.training or _lacks_statistics(m) or (m is not module and has_hooks(m)) for m in module.modules())


def _lacks_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None
