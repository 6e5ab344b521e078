"""Parts of a network that are replaced by others of the same effect."""

from typing import Type

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ['check_part', 'compute_weights', 'like_module']

# what computes a weight before each call: pruning, and norms of weights as they were before parametrizations
_COMPUTING_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)


def like_module(new: nn.Module, old: nn.Module) -> nn.Module:
    """A module that takes the place of another, as that one is: in train mode or not, frozen or not."""
    return new.train(old.training).requires_grad_(any(p.requires_grad for p in old.parameters()))


def check_part(module: nn.Module, part: nn.Module, *kinds: Type[nn.Module]) -> None:
    """Checks that a part about to be folded is what it was built as, and no adapter around it, which would be lost.

    Weights that hooks compute before each call, as torch's pruning does, are brought up to date.

    Raises:
        RuntimeError: It is something else.
    """
    if not isinstance(part, kinds):
        raise RuntimeError(
            f'{type(module).__name__} cannot be reparameterized: expected one of its parts to be a '
            f'{" or ".join(kind.__name__ for kind in kinds)}, got {type(part).__name__}. Merge it into what it has '
            f'replaced, or put that back.'
        )
    compute_weights(part)


def compute_weights(module: nn.Module) -> None:
    """Brings weights up to date that hooks compute before each call: pruning, and norms of weights."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTING_HOOKS):  # else the weight would be that of the last call
            hook(module, ())
