"""Results that are computed again only when a tensor they depend on has changed."""

from typing import Any, Callable, Hashable, Iterable, Optional, Sequence, Tuple

import torch
from torch import nn

from ..ops.context import Keep, is_exporting, is_transformed

__all__ = ['DropsCaches', 'KernelCache', 'ValueCache', 'wants_gradients']

_MAX_NUMBERS = 2**23  # that a KernelCache keeps: 32 MiB in single precision


def wants_gradients(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Whether a backward pass may ask for the gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class ValueCache:
    """Keeps one result together with copies of the tensors that it was computed from.

    Values are compared, not versions: version counters miss changes through `.data`. A copy or a pickle of the cache is
    empty.
    """

    def __init__(self) -> None:
        self._entry: Optional[Tuple[object, Hashable, Tuple[Optional[torch.Tensor], ...]]] = None

    def clear(self) -> None:
        """Forgets the result."""
        self._entry = None

    @staticmethod
    def usable(tensors: Sequence[Optional[torch.Tensor]]) -> bool:
        """Whether values can be read cheaply: on a CPU, not while compiling, exporting, tracing or in torch.func."""
        if torch.compiler.is_compiling() or is_exporting() or is_transformed():
            return False
        # neither fake tensors nor other wrappers
        return all(t is None or (t.device.type == 'cpu' and type(t.detach()) is torch.Tensor) for t in tensors)

    def get(
        self, tensors: Sequence[Optional[torch.Tensor]], compute: Callable[[], object], settings: Hashable = ()
    ) -> object:
        """The result of `compute()` for the current values of the tensors, and of settings that are no tensors."""
        entry = self._entry  # which another thread may replace
        if entry is not None:
            result, old_settings, copies = entry
            if settings == old_settings and len(tensors) == len(copies):
                if all(_same(a, b) for a, b in zip(tensors, copies)):
                    return result
        # before computing: a value that another thread changes in the meantime is found to differ the next time
        copies = tuple(None if t is None else t.detach().clone() for t in tensors)
        with torch.inference_mode(False), torch.no_grad():  # a later call may save it for a backward pass
            result = compute()
        self._entry = (result, settings, copies)
        return result

    def __getstate__(self):  # of copies too
        return {'_entry': None}


def _same(a: Optional[torch.Tensor], b: Optional[torch.Tensor]) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.flatten(), b.flatten()
    # two numbers at a time take half as long
    if a.element_size() == 4 and a.ndim and all(_in_pairs(t) for t in (a, b)):
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _in_pairs(x: torch.Tensor) -> bool:
    whole = [x.shape[-1], x.storage_offset(), *x.stride()[:-1]]
    return x.stride(-1) == 1 and all(n % 2 == 0 for n in whole)


class KernelCache(ValueCache):
    """Keeps what the backends compute from a constant kernel in inference, such as its spectrum.

    For the input size of the last call, and where it is not very large.
    """

    def keep(self, weight: torch.Tensor) -> Optional[Keep]:
        """The argument `keep` of the operations in `ops` for a kernel; None in training and where it cannot be read."""
        if wants_gradients((weight,)) or not self.usable((weight,)):
            return None
        kept = None  # looked up when a backend asks: comparing kernels takes time

        def keep(key: Hashable, numbers: int, compute: Callable[[], Any]) -> Any:
            nonlocal kept
            if numbers > _MAX_NUMBERS:
                return compute()
            if kept is None:
                kept = self.get((weight,), dict)
            value = kept.get(key)
            if value is None:
                with torch.inference_mode(False), torch.no_grad():
                    value = compute()
                kept.clear()
                kept[key] = value
            return value

        return keep


class DropsCaches(nn.Module):
    """Mixin of modules with caches, which may be far larger than parameters.

    Going to train mode empties them, and so does a move or a cast.
    """

    def train(self, mode: bool = True):
        if mode:
            self._drop_caches()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._drop_caches()
        return super()._apply(fn, recurse)

    def _drop_caches(self) -> None:
        for value in vars(self).values():
            if isinstance(value, ValueCache):
                value.clear()
