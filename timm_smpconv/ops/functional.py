"""Large-kernel convolutions as plain functions of tensors.

All are cross-correlations, as in torch, with stride 1 and outputs as large as the inputs. Kernel taps that no input can
reach are cut off first. A dilated convolution is that of the interleaved maps between whose entries there are no holes.
Outputs come in the memory format that the backend has made: of a contiguous map it may be channels_last.
"""

import contextlib
import functools
import numbers
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_function

from . import dft, direct, fft, reference
from .chooser import choose_backend
from .context import HAS_TRITON, Keep, in_format, is_channels_last, is_exporting, is_transformed

__all__ = [
    'available_backends',
    'causal_conv1d',
    'conv1d',
    'conv2d',
    'depthwise_causal_conv1d',
    'depthwise_conv1d',
    'depthwise_conv2d',
    'to_fast_format',
    'use_backend',
]


def _toeplitz(*args: Any) -> torch.Tensor:
    from . import toeplitz  # needs Triton, which not every build of torch comes with

    return toeplitz.correlate(*args)


_BACKENDS: Dict[str, Callable[..., torch.Tensor]] = {
    'reference': reference.correlate,
    'direct': direct.correlate,
    'fft': fft.correlate,
    'dft': dft.correlate,
}
if HAS_TRITON:
    _BACKENDS['toeplitz'] = _toeplitz
# a plain global and no context variable, which torch.compile of the oldest supported torch cannot follow
_forced: Optional[str] = None


def available_backends() -> List[str]:
    """Names that `use_backend` takes; 'toeplitz' is among them where Triton is installed."""
    return list(_BACKENDS)


@contextlib.contextmanager
def use_backend(name: Optional[str]) -> Iterator[None]:
    """Within the context all convolutions of this package use one backend; None returns the choice to the chooser.

    For tests and measurements: it holds for all threads.

    Raises:
        ValueError: The name is not one of `available_backends()`.
    """
    if name is not None and name not in _BACKENDS:
        raise ValueError(f'Unknown backend {name!r}: expected one of {", ".join(_BACKENDS)}, or None.')
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    dilation: Tuple[int, int] = (1, 1),
    keep: Any = None,
) -> torch.Tensor:
    """Depthwise convolution with zero padding k // 2, times the dilation.

    Args:
        x: Input, (B, C, H, W) or (C, H, W).
        weight: Kernel, (C, 1, kh, kw), kh and kw odd.
        bias: Bias, (C,).
        dilation: Distance of neighbouring taps, (rows, columns), or one number for both but in TorchScript.
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, C, H, W) or (C, H, W).

    Raises:
        ValueError: Shapes that do not fit, an empty map, an even kernel size or a dilation below 1.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('depthwise_conv2d', x, weight, bias, ndim=4, depthwise=True)
        dilation = _as_pair('depthwise_conv2d', dilation)
        if not is_exporting():
            return _convolve(x, weight, bias, dilation, True, False, keep)
    padding = [weight.shape[2] // 2 * dilation[0], weight.shape[3] // 2 * dilation[1]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    dilation: Tuple[int, int] = (1, 1),
    keep: Any = None,
) -> torch.Tensor:
    """Dense convolution with zero padding k // 2, times the dilation.

    Args:
        x: Input, (B, I, H, W) or (I, H, W).
        weight: Kernel, (O, I, kh, kw), kh and kw odd.
        bias: Bias, (O,).
        dilation: Distance of neighbouring taps, (rows, columns), or one number for both but in TorchScript.
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, O, H, W) or (O, H, W).

    Raises:
        ValueError: Shapes that do not fit, an empty map, an even kernel size or a dilation below 1.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('conv2d', x, weight, bias, ndim=4, depthwise=False)
        dilation = _as_pair('conv2d', dilation)
        if not is_exporting():
            return _convolve(x, weight, bias, dilation, False, False, keep)
    padding = [weight.shape[2] // 2 * dilation[0], weight.shape[3] // 2 * dilation[1]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, keep: Any = None
) -> torch.Tensor:
    """Dense causal convolution: output t sees inputs <= t, the last tap multiplies the present sample.

    Args:
        x: Input, (B, I, L) or (I, L).
        weight: Kernel, (O, I, K), K of any parity and larger or smaller than L.
        bias: Bias, (O,).
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, O, L) or (O, L).

    Raises:
        ValueError: Shapes that do not fit, or an empty sequence.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('causal_conv1d', x, weight, bias, ndim=3, depthwise=False, causal=True)
        if not is_exporting():
            return _convolve(x, weight, bias, (1,), False, True, keep)
    return F.conv1d(F.pad(x, [weight.shape[2] - 1, 0]), weight, bias)


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def depthwise_causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, keep: Any = None
) -> torch.Tensor:
    """Depthwise causal convolution: output t sees inputs <= t, the last tap multiplies the present sample.

    Args:
        x: Input, (B, C, L) or (C, L).
        weight: Kernel, (C, 1, K), K of any parity and larger or smaller than L.
        bias: Bias, (C,).
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, C, L) or (C, L).

    Raises:
        ValueError: Shapes that do not fit, or an empty sequence.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('depthwise_causal_conv1d', x, weight, bias, ndim=3, depthwise=True, causal=True)
        if not is_exporting():
            return _convolve(x, weight, bias, (1,), True, True, keep)
    return F.conv1d(F.pad(x, [weight.shape[2] - 1, 0]), weight, bias, groups=weight.shape[0])


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, keep: Any = None
) -> torch.Tensor:
    """Dense convolution of sequences with zero padding K // 2.

    Args:
        x: Input, (B, I, L) or (I, L).
        weight: Kernel, (O, I, K), K odd.
        bias: Bias, (O,).
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, O, L) or (O, L).

    Raises:
        ValueError: Shapes that do not fit, an empty sequence or an even kernel size.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('conv1d', x, weight, bias, ndim=3, depthwise=False)
        if not is_exporting():
            return _convolve(x, weight, bias, (1,), False, False, keep)
    return F.conv1d(x, weight, bias, padding=[weight.shape[2] // 2])


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def depthwise_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, keep: Any = None
) -> torch.Tensor:
    """Depthwise convolution of sequences with zero padding K // 2.

    Args:
        x: Input, (B, C, L) or (C, L).
        weight: Kernel, (C, 1, K), K odd.
        bias: Bias, (C,).
        keep: `layers.KernelCache().keep(weight)`, for a constant kernel in inference; None in TorchScript.

    Returns:
        Output, (B, C, L) or (C, L).

    Raises:
        ValueError: Shapes that do not fit, an empty sequence or an even kernel size.
        TypeError: Integers, or two dtypes outside autocast.
    """
    if not torch.jit.is_scripting():
        _check('depthwise_conv1d', x, weight, bias, ndim=3, depthwise=True)
        if not is_exporting():
            return _convolve(x, weight, bias, (1,), True, False, keep)
    return F.conv1d(x, weight, bias, padding=[weight.shape[2] // 2], groups=weight.shape[0])


@register_notrace_function  # looks at shapes, which symbolic tracing cannot follow
def to_fast_format(x: torch.Tensor) -> torch.Tensor:
    """Feature map in the memory format in which networks of these convolutions are fast.

    channels_last for maps, (B, C, H, W). For sequences, (B, C, L), that which they have on a GPU, contiguous on a CPU.
    """
    if not torch.jit.is_scripting():  # on its own: what follows is not to be compiled
        if not is_exporting() and not is_transformed():
            if x.ndim == 4 and x.device.type in ('cpu', 'cuda'):
                return x.contiguous(memory_format=torch.channels_last)
            if x.ndim == 3 and x.device.type == 'cpu':
                return x.contiguous()
    return x


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    dilation: Sequence[int],
    depthwise: bool,
    causal: bool,
    keep: Optional[Keep],
) -> torch.Tensor:
    """What a convolution does once its shapes are found to fit."""
    if x.ndim < weight.ndim:
        return _convolve(x.unsqueeze(0), weight, bias, dilation, depthwise, causal, keep).squeeze(0)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # there is no autocast on meta
        dtype = torch.get_autocast_dtype(x.device.type)
        if weight.dtype not in (dtype, torch.float64):  # which autocast leaves alone
            weight, keep = weight.to(dtype), keep and functools.partial(_keep_as, keep, dtype)
        if x.dtype != torch.float64:
            x = x.to(dtype)
    if 0 in x.shape[2:]:
        raise ValueError(f'Expected an input of one step or pixel at least, got shape {tuple(x.shape)}.')
    if weight.dtype != x.dtype:
        raise TypeError(
            f'Expected an input and a kernel of the same dtype, got {x.dtype} and {weight.dtype}: cast one of them, '
            f'or use torch.autocast.'
        )
    bias = None if bias is None else bias.to(x.dtype)
    if _is_left_whole(x, weight, bias):
        return _correlate_op(x, weight, bias, list(dilation), depthwise, causal, is_channels_last(x))
    if keep is not None:  # the same kernel may be that of several operations
        keep = functools.partial(_keep_as, keep, (depthwise, causal))
    return _correlate_dilated(x, weight, bias, dilation, depthwise, causal, keep)


def _correlate_dilated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    dilation: Sequence[int],
    depthwise: bool,
    causal: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """Makes maps of their own of entries that see each other, between which there are no holes."""
    if max(dilation) == 1:
        return _correlate(x, weight, bias, depthwise, causal, keep)
    (height, width), in_chs, out_chs = x.shape[2:], x.shape[1], weight.shape[0]
    rows, columns = (min(d, n) for d, n in zip(dilation, (height, width)))  # farther moves no tap onto the map
    last = is_channels_last(x)
    size, batch = (-(-height // rows), -(-width // columns)), x.shape[0] * rows * columns
    pad = (0, size[1] * columns - width, 0, size[0] * rows - height)
    if torch.compiler.is_compiling() or any(pad):  # compiled, for sizes of both kinds
        x = F.pad(x, pad)
    maps = x.reshape(x.shape[0], in_chs, size[0], rows, size[1], columns)
    # each copied once, in the memory format of x
    if last:
        maps = maps.permute(0, 3, 5, 2, 4, 1).reshape(batch, *size, in_chs).permute(0, 3, 1, 2)
    else:
        maps = maps.permute(0, 3, 5, 1, 2, 4).reshape(batch, in_chs, *size)
    y = _correlate(maps, weight, bias, depthwise, causal, keep).reshape(x.shape[0], rows, columns, out_chs, *size)
    if last:
        y = y.permute(0, 4, 1, 5, 2, 3).reshape(x.shape[0], *x.shape[2:], out_chs).permute(0, 3, 1, 2)
    else:
        y = y.permute(0, 3, 4, 1, 5, 2).reshape(x.shape[0], out_chs, *x.shape[2:])
    fmt = torch.channels_last if last else torch.contiguous_format
    return y if y.shape[2:] == (height, width) else y[:, :, :height, :width].contiguous(memory_format=fmt)


def _correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    depthwise: bool,
    causal: bool,
    keep: Optional[Keep],
) -> torch.Tensor:
    """Cuts off the taps that no input can reach, and passes on to a backend."""
    if depthwise and x.ndim == 3:  # a sequence is a map of one row
        return _correlate(x.unsqueeze(2), weight.unsqueeze(2), bias, depthwise, causal, keep).squeeze(2)
    for dim in range(2, x.ndim):
        taps, reach = weight.shape[dim], x.shape[dim] - 1
        if causal:
            weight = weight.narrow(dim, taps - min(taps, reach + 1), min(taps, reach + 1))
        elif taps // 2 > reach:
            weight = weight.narrow(dim, taps // 2 - reach, 2 * reach + 1)
    left = tuple([taps - 1 if causal else taps // 2 for taps in weight.shape[2:]])
    if x.shape[0] == 0:  # nothing to transform
        return direct.correlate(x, weight, bias, left, depthwise, keep)
    return _BACKENDS[_forced or choose_backend(x, weight, left, depthwise)](x, weight, bias, left, depthwise, keep)


def _is_left_whole(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> bool:
    """Whether torch.compile is to see one operator, which chooses when it is called.

    In inference on a CPU. Traced, the choice would be compiled anew for every size of input, and transforms that no
    compiler makes faster with it. (torch 2.6 would put the operator into exports too.)
    """
    if not torch.compiler.is_compiling() or not hasattr(torch.compiler, 'is_exporting'):
        return False
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _forced is None and not trained and not is_transformed() and x.device.type == 'cpu'


def _correlate_whole(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    dilation: List[int],
    depthwise: bool,
    causal: bool,
    last: bool,
) -> torch.Tensor:
    return in_format(_correlate_dilated(x, weight, bias, dilation, depthwise, causal), last)


_correlate_op = torch.library.custom_op('timm_smpconv::correlate', _correlate_whole, mutates_args=())


@_correlate_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    dilation: List[int],
    depthwise: bool,
    causal: bool,
    last: bool,
) -> torch.Tensor:
    return in_format(x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:]), last)


def _keep_as(keep: Keep, use: Hashable, key: Hashable, numbers: int, compute: Callable[[], Any]) -> Any:
    """What a kernel's `keep` does for another use of the same kernel, such as rounded to another dtype."""
    return keep((use, key), numbers, compute)


def _as_pair(name: str, dilation: Any) -> Tuple[int, int]:
    pair = to_2tuple(dilation)
    if len(pair) != 2 or not all(isinstance(d, numbers.Integral) and d >= 1 for d in pair):
        raise ValueError(f'{name} expects a dilation of one positive number, or (rows, columns), got {dilation}.')
    return pair


def _check(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    ndim: int,
    depthwise: bool,
    causal: bool = False,
) -> None:
    if torch.jit.is_tracing():  # sizes are tensors, of whose values a trace warns
        return
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(
            f'{name} expects floating-point numbers, got an input of {x.dtype}, a kernel of {weight.dtype}.'
        )
    if x.ndim not in (ndim, ndim - 1) or weight.ndim != ndim:
        raise ValueError(
            f'{name} expects a {ndim}D input, or a {ndim - 1}D one without a batch, and a {ndim}D kernel, '
            f'got shapes {tuple(x.shape)} and {tuple(weight.shape)}.'
        )
    channels = x.shape[1 - ndim]
    if depthwise and (weight.shape[1] != 1 or weight.shape[0] != channels):
        taps = 'kh, kw' if ndim == 4 else 'K'
        raise ValueError(
            f'{name} expects a kernel of shape ({channels}, 1, {taps}) for {channels} channels, '
            f'got an input of shape {tuple(x.shape)} and a kernel of shape {tuple(weight.shape)}.'
        )
    if not depthwise and weight.shape[1] != channels:
        raise ValueError(f'{name} expects {weight.shape[1]} input channels, got an input of shape {tuple(x.shape)}.')
    if 0 in weight.shape[2:]:
        raise ValueError(f'{name} expects a kernel of one tap at least, got shape {tuple(weight.shape)}.')
    if not causal and not all(taps % 2 for taps in weight.shape[2:]):
        raise ValueError(f'{name} expects an odd kernel size, got {tuple(weight.shape[2:])}.')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'{name} expects a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}.')
