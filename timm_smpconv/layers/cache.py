"""Results that are computed again only when a tensor they depend on has changed."""

from typing import Callable, Optional, Sequence, Tuple

import torch

from ..ops.context import is_transformed

__all__ = ['ValueCache']


class ValueCache:
    """Keeps one result together with copies of the tensors that it was computed from.

    Values are compared, not versions: version counters miss changes through `.data`. A copy or a pickle of the cache is
    empty.
    """

    def __init__(self) -> None:
        self._entry: Optional[Tuple[object, Tuple[torch.Tensor, ...]]] = None

    @staticmethod
    def usable(tensors: Sequence[torch.Tensor]) -> bool:
        """Whether values can be read cheaply: on a CPU, not while compiling, exporting, tracing or in torch.func."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
            return False
        # neither fake tensors nor other wrappers
        return all(t.device.type == 'cpu' and type(t.detach()) is torch.Tensor for t in tensors)

    def get(self, tensors: Sequence[torch.Tensor], compute: Callable[[], object]) -> object:
        """The result of `compute()` for the current values of the tensors."""
        if self._entry is not None:
            result, copies = self._entry
            if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, copies)):
                return result
        result = compute()
        self._entry = (result, tuple(t.detach().clone() for t in tensors))
        return result

    def __getstate__(self):
        return {'_entry': None}

    def __deepcopy__(self, memo):
        return ValueCache()
