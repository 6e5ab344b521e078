"""Inference on a batch in parts."""

from itertools import chain
from typing import Callable

import torch
from torch import nn

from .cache import wants_gradients
from .plain import is_plain

__all__ = ['by_parts']

# Allocations of tens of MiB come fresh from the system at each call and are cleared page by page, which can take as
# long as the convolution that fills them; maps of this size are reused and stay in the cache.
_MAX_BYTES = 10 * 2**20


def by_parts(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, numel: int
) -> torch.Tensor:
    """Applies a function to a batch, on a CPU where no gradient is wanted in parts that keep its largest map small.

    Args:
        module: What the function calls: where a part of it has to see the whole batch, it does.
        fn: Function that treats the samples of a batch alike and apart from each other.
        x: Batch, (B, ...).
        numel: Elements of the largest map of one sample.

    Returns:
        fn(x).
    """
    if isinstance(x, torch.Tensor) and x.device.type == 'cpu' and not wants_gradients(chain((x,), module.parameters())):
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            size = max(_MAX_BYTES // (max(numel, 1) * x.element_size()), 1)
            if size < x.shape[0] and is_plain(module):
                return torch.cat([fn(part) for part in x.split(size)])
    return fn(x)
