"""What an operation has to know of where it is called."""

import contextlib
import importlib.util
from typing import Any, Callable, ContextManager, Hashable

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = [
    'HAS_TRITON',
    'Keep',
    'full_precision',
    'has_tensor_cores',
    'in_format',
    'is_channels_last',
    'is_exporting',
    'is_trained',
    'is_transformed',
    'to_channels_last',
    'to_float64',
]

HAS_TRITON = importlib.util.find_spec('triton') is not None  # not every build of torch comes with it

# keep(key, numbers, compute): the result of compute(), which depends on a kernel and a key alone and holds about so
# many real numbers; from an earlier call if the kernel is as it was then
Keep = Callable[[Hashable, int, Callable[[], Any]], Any]


def full_precision(x: torch.Tensor) -> ContextManager[None]:
    """A context without autocast on the device of x."""
    kind = x.device.type  # torch 2.6 does not compile a question like is_meta in a backward pass
    return contextlib.nullcontext() if kind == 'meta' else torch.autocast(kind, enabled=False)  # meta has none


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the CPU if its device (mps) has no float64."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


@torch.compiler.assume_constant_result
def has_tensor_cores(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU that multiplies bfloat16 and tf32: of compute capability 8.0 or later."""
    return device.type == 'cuda' and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def is_exporting() -> bool:
    """Whether the call is being exported or traced: that wants the plain convolution, and has tensors for sizes."""
    if torch.jit.is_tracing() or (hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()):
        return True
    return not torch.compiler.is_compiling() and get_proxy_mode() is not None  # of make_fx


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, ...) or forward-mode AD is at work: they see through torch's own operations."""
    # the question that torch.autograd.Function asks; and whether there is a forward_ad.dual_level()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_trained(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a backward pass may follow that is ours, and not that of a transform of torch.func."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and not is_transformed()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x, (B, C, H, W), is in the channels_last memory format and in no other; no under torch.func.

    A sequence, (B, C, L), is if it is as a map of one row.
    """
    if x.ndim not in (3, 4) or is_transformed():  # vmap has no memory formats
        return False
    last = (x if x.ndim == 4 else x.unsqueeze(2)).is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def is_part_of_channels_last(x: torch.Tensor) -> bool:
    """Whether x is some channels, rows or columns of a map, (B, C, H, W), in the channels_last memory format."""
    if x.ndim != 4 or torch.compiler.is_compiling() or is_exporting() or is_transformed():
        return False
    if x.stride(1) != 1 or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return False
    batch, _, row, column = x.stride()
    return column >= x.shape[1] > 1 and row >= column * x.shape[3] and batch >= row * x.shape[2]


def to_channels_last(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W) or, as a map of one row, (B, C, L) in the channels_last memory format and a dtype."""
    if x.ndim == 3:
        return to_channels_last(x.unsqueeze(2), dtype).squeeze(2)
    return x.to(dtype=dtype, memory_format=torch.channels_last)


def in_format(x: torch.Tensor, last: bool) -> torch.Tensor:
    """(B, C, H, W) or (B, C, L) in channels_last, or contiguous."""
    return to_channels_last(x, x.dtype) if last else x.contiguous()
