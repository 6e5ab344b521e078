"""Large-kernel convolutions as plain functions of tensors, behind one chooser of backends.

All are cross-correlations, as in torch, with stride 1 and outputs as large as the inputs. Kernel taps that no input can
reach are cut off first. A dilated convolution is that of the interleaved maps between whose entries there are no holes.
Outputs come in the memory format that the backend has made: of a contiguous map it may be channels_last.
"""

import contextlib
import functools
import importlib.util
import math
import numbers
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_function

from . import dft, direct, fft, reference
from .context import Keep, has_tensor_cores, in_format, is_channels_last, is_exporting, is_transformed

__all__ = [
    'available_backends',
    'causal_conv1d',
    'choose_backend',
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
if importlib.util.find_spec('triton') is not None:
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


# Costs in units of one multiply-add of a direct depthwise convolution, fitted on CPUs (benchmarks/README.md). All
# backends use all cores, so that their number drops out; the ratios are what matters.
_DENSE = 0.5  # a multiply-add of a direct dense convolution of maps, whose channels are filled up to whole vectors of
_VECTOR = 16
_BFLOAT16 = 0.5  # direct of dense maps in bfloat16, relative to float32, on processors with instructions for it
_TRANSFORM = 125.0  # one point of one real transform, in fft, of dense sequences ...
_TRANSFORM_2D = 180.0  # ... of dense maps, whose spectra are reordered
_TRANSFORM_DEPTHWISE, _TRANSFORM_ROW = 102.0, 45.0  # ... of depthwise maps and sequences
_REORDER = 110.0  # moving one entry between channels_last and the contiguous format of fft
_ENTRY, _SPECTRUM = 50.0, 25.0  # moving one entry of a map or kernel, and one number of a spectrum, in dft
_BACKWARD = {'direct': 2.5, 'fft': 1.4, 'dft': 0.9}  # relative to a forward pass
# Depthwise 2D on a GPU, in the same unit, fitted on an H100 (benchmarks/README.md). torch's kernels for channels_last
# have fast forms for few taps and slow ones for all others; batches share launches.
_GPU_LAST_FEW_TAPS, _GPU_LAST = 0.5, 5.0  # direct in channels_last, relative to contiguous
_GPU_TRANSFORM = 42.0
_GPU_PRODUCT = {2: 0.012, 4: 0.07}  # a multiply-add of toeplitz on tensor cores, by bytes of a number
_GPU_ROW, _GPU_ENTRY, _GPU_BAND = 11.0, 5.0, 6.0  # a row of a tile and tap, an entry of a map, an entry of a band
_GPU_LAUNCHES = {'direct': 0.0, 'fft': 2e8, 'toeplitz': 1e8}
_GPU_BACKWARD = {'direct': 6.0, 'fft': 1.2, 'toeplitz': 2.2}
_GPU_BACKWARD_FEW_TAPS = 3.3
# Dense convolutions on a GPU, in the same unit. Small ones take the time of their launches: of a forward pass, and of
# both passes. Tensor cores want channels in whole blocks.
_GPU_DENSE = {2: 0.011, 4: 0.022}  # a multiply-add of direct, by bytes of a number, with channels filled up to
_GPU_BLOCK_IN, _GPU_BLOCK_OUT = 32, 64
_GPU_DENSE_STEP = {2: 8e5, 4: 1.8e6}  # a tap and block of input channels of direct, which follow one another
_GPU_DENSE_SEQUENCE = 2.5  # direct for sequences, relative to maps
_GPU_DENSE_TRANSFORM, _GPU_DENSE_TRANSFORM_2D = 38.0, 58.0  # one point of one real transform, in fft
_GPU_DENSE_PRODUCT, _GPU_DENSE_ENTRY, _GPU_DENSE_SPECTRUM = 0.09, 20.0, 10.0  # in dft: see _ENTRY
_GPU_DENSE_LAUNCHES = {'direct': (2e8, 8e8), 'fft': (7e8, 2.4e9), 'dft': (6e8, 2e9)}
_GPU_DENSE_BACKWARD = {'direct': 2.8, 'fft': 1.05, 'dft': 1.17}


def choose_backend(
    x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], depthwise: bool, device: Optional[str] = None
) -> str:
    """Name of the backend that takes a convolution: the one with the smallest estimate of multiply-adds.

    A direct convolution spends one per output channel, input channel of a filter, output and tap that falls on the map
    (of a dense one: and tap). In the frequency domain, all inputs, outputs and kernels are transformed (the kernels
    once for the batch, sequences in the parts that `fft` takes), and each complex product of a frequency costs four.
    Training adds the backward pass, which costs the frequency domain less. `dft` is for dense maps, `toeplitz` for
    depthwise ones on a GPU.

    Args:
        x: Input, (B, I, *spatial).
        weight: Kernel, (O, I, *taps), or (I, 1, *taps) if depthwise.
        left: Zeros to the left of the input, one number per spatial dimension.
        depthwise: One filter per channel.
        device: Type of device to choose for; None for that of x.
    """
    if depthwise and x.ndim == 3:  # a map of one row
        x, weight, left = x.unsqueeze(2), weight.unsqueeze(2), (0, *left)
    device = x.device.type if device is None else device
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if device == 'cuda' and torch.version.hip is None:
        return (_choose_on_gpu if depthwise else _choose_dense_on_gpu)(x, weight, left, trained)
    if device not in ('cpu', 'meta'):  # nothing is known of Fourier transforms elsewhere, in time or in numbers
        return 'direct'
    return _choose_on_cpu(x, weight, left, depthwise, trained)


def _choose_on_cpu(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], depthwise: bool, trained: bool) -> str:
    """What `choose_backend` does on a CPU; the batch counts only for kernels, which it shares."""
    batch, out_chs, in_chs = max(x.shape[0], 1), weight.shape[0], weight.shape[1]
    shape, taps = x.shape[2:], weight.shape[2:]
    maps = 2 * out_chs if depthwise else x.shape[1] + out_chs
    kernels = out_chs * in_chs / batch
    dense = not depthwise and x.ndim == 4
    size = [fft.cyclic_len(n, k, p) for n, k, p in zip(shape, taps, left)]
    points = _count_points(shape, size, depthwise)
    multiply_adds = 1
    for n, k, p in zip(shape, taps, left):
        multiply_adds *= n * k if dense else _taps_on_map(n, k, p)
    for chs in (out_chs, in_chs):
        multiply_adds *= -(-chs // _VECTOR) * _VECTOR if dense else chs
    products = 0 if depthwise else 2 * out_chs * in_chs
    if depthwise:
        transform = _TRANSFORM_ROW if shape[0] == taps[0] == 1 else _TRANSFORM_DEPTHWISE
    else:
        transform = _TRANSFORM_2D if dense else _TRANSFORM
    costs = {
        'direct': multiply_adds * (_DENSE if dense else 1),
        'fft': points * (transform * (maps + kernels) + products),
    }
    if x.ndim == 3 and not depthwise and kernels > maps and costs['direct'] > shape[0] * maps * _TRANSFORM:
        # parts shorten the transforms of the kernels, and do not cost less than those of the sequences
        parts, points = fft.plan_parts(batch, in_chs, out_chs, shape[0], taps[0])
        costs['fft'] = points * (_TRANSFORM * (parts * maps + kernels) + parts * products)
    if x.ndim == 4 and is_channels_last(x):
        costs['fft'] += maps * x.shape[2] * x.shape[3] * _REORDER
    if dense:
        if direct.MULTIPLIES_BFLOAT16 and x.dtype == torch.bfloat16:
            costs['direct'] *= _BFLOAT16
        costs['dft'] = fft.count_bins(size) * 4 * out_chs * in_chs
        for count, sides in ((maps, shape), (kernels, taps)):
            each = dft.count_products(sides, size) + _ENTRY * math.prod(sides) + _SPECTRUM * 2 * fft.count_bins(size)
            costs['dft'] += count * each
    return _cheapest(costs, _BACKWARD if trained else {})


def _choose_on_gpu(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], trained: bool) -> str:
    """What `choose_backend` does for depthwise maps on a GPU, where the whole batch counts: it shares the launches."""
    (height, width), (taps_h, taps_w), size = x.shape[2:], weight.shape[2:], x.element_size()
    maps = x.shape[0] * x.shape[1]
    taps_on_map = _taps_on_map(height, taps_h, left[0])
    backward = dict(_GPU_BACKWARD) if trained else {}
    costs = {
        'direct': float(maps * taps_on_map * _taps_on_map(width, taps_w, left[1])),
        'fft': _GPU_LAUNCHES['fft'],
    }
    cyclic = [fft.cyclic_len(n, k, p) for n, k, p in zip(x.shape[2:], weight.shape[2:], left)]
    points = _count_points(x.shape[2:], cyclic, True)
    costs['fft'] += points * _GPU_TRANSFORM * (2 * maps + weight.shape[0])
    last = is_channels_last(x)
    if last:
        few = max(taps_h, taps_w) <= (7 if size == 2 else 5)
        costs['direct'] *= _GPU_LAST_FEW_TAPS if few else _GPU_LAST
        if trained and few:
            backward['direct'] = _GPU_BACKWARD_FEW_TAPS
    able = x.device.type != 'cuda' or has_tensor_cores(x.device)  # a GPU that is only asked about has what it takes
    # its kernels are compiled for each width: sequences, whose lengths vary, go to the others
    is_map = not height == taps_h == 1
    if 'toeplitz' in _BACKENDS and size in _GPU_PRODUCT and able and is_map and not is_transformed():
        # the tiles of ops.toeplitz, which cannot be asked without Triton
        block = min(max(16, 1 << (width - 1).bit_length()), 64)
        depth = block if width <= block else -(-(block - 1 + taps_w) // block) * block
        rows = maps * taps_on_map * -(-width // block)
        costs['toeplitz'] = _GPU_LAUNCHES['toeplitz'] + rows * (block * depth * _GPU_PRODUCT[size] + _GPU_ROW)
        costs['toeplitz'] += _GPU_BAND * weight.shape[0] * taps_h * block * depth
        costs['toeplitz'] += _GPU_ENTRY * (2 if last else 1) * maps * height * width
    return _cheapest(costs, backward)


def _choose_dense_on_gpu(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], trained: bool) -> str:
    """What `choose_backend` does for dense convolutions on a GPU, most of which take the time of their launches."""
    batch, (out_chs, in_chs), shape, taps = x.shape[0], weight.shape[:2], x.shape[2:], weight.shape[2:]
    size = [fft.cyclic_len(n, k, p) for n, k, p in zip(shape, taps, left)]
    maps, kernels = batch * (in_chs + out_chs), out_chs * in_chs
    number = 2 if x.element_size() == 2 else 4
    multiply_add = _GPU_DENSE[number] * (1.0 if x.ndim == 4 else _GPU_DENSE_SEQUENCE)
    steps = math.prod(taps) * -(-in_chs // _GPU_BLOCK_IN)
    out_blocks = -(-out_chs // _GPU_BLOCK_OUT)
    points = _count_points(shape, size, False)
    transform = _GPU_DENSE_TRANSFORM_2D if x.ndim == 4 else _GPU_DENSE_TRANSFORM
    costs = {
        'direct': steps * batch * math.prod(shape) * out_blocks * _GPU_BLOCK_IN * _GPU_BLOCK_OUT * multiply_add,
        'fft': points * transform * (maps + kernels),
    }
    if x.ndim == 4:
        costs['dft'] = fft.count_bins(size) * 4 * out_chs * in_chs * batch * _GPU_DENSE_PRODUCT
        for count, sides in ((maps, shape), (kernels, taps)):
            entries = _GPU_DENSE_ENTRY * math.prod(sides) + _GPU_DENSE_SPECTRUM * 2 * fft.count_bins(size)
            costs['dft'] += count * (dft.count_products(sides, size) * _GPU_DENSE_PRODUCT + entries)
    for name, cost in costs.items():
        # the launches of a pass run ahead of the GPU: it takes the longer of the two
        factor = 1 + _GPU_DENSE_BACKWARD[name] if trained else 1
        least = steps * _GPU_DENSE_STEP[number] if name == 'direct' else 0.0
        costs[name] = max(cost * factor, least, _GPU_DENSE_LAUNCHES[name][trained])
    return _cheapest(costs, {})


def _cheapest(costs: Dict[str, float], backward: Dict[str, float]) -> str:
    """Name of the smallest cost, each with that of its backward pass relative to it; direct if none is known."""
    best, least = 'direct', float('inf')
    for name, cost in costs.items():
        cost *= 1 + backward.get(name, 0.0)
        if cost < least:
            best, least = name, cost
    return best


def _count_points(shape: Sequence[int], size: Sequence[int], depthwise: bool) -> int:
    """Points of a transform to cyclic lengths in `fft`, which takes a depthwise map of one row as a sequence."""
    points = 1
    for n in size[1:] if depthwise and shape[0] == size[0] == 1 else size:
        points *= fft.fast_len(n)
    return points


def _taps_on_map(n: int, k: int, left: int) -> int:
    """Taps that fall on a map of n entries, summed over its n outputs: all of them, less a triangle at each end."""
    taps = n * k
    for off in (left, k - 1 - left):
        rows = min(off, n)
        taps -= rows * (2 * off + 1 - rows) // 2
    return taps


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
            weight, keep = weight.to(dtype), keep and functools.partial(_keep_rounded, keep, dtype)
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


def _keep_rounded(keep: Keep, dtype: torch.dtype, key: Hashable, numbers: int, compute: Callable[[], Any]) -> Any:
    """What a kernel's `keep` does for the same kernel rounded to another dtype."""
    return keep((dtype, key), numbers, compute)


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
