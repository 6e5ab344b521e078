"""The rule by which a convolution gets its backend: estimates of what each would cost (docs/backends.md)."""

import math
from typing import Dict, Optional, Sequence, Tuple

import torch

from . import dft, direct, fft
from .context import HAS_TRITON, has_tensor_cores, is_channels_last, is_transformed

__all__ = ['choose_backend']

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
    (of a dense one of maps: and tap). In the frequency domain, all inputs, outputs and kernels are transformed (the
    kernels once for the batch, sequences in the parts that `fft` takes), and each complex product of a frequency costs
    four.
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
    if HAS_TRITON and size in _GPU_PRODUCT and able and is_map and not is_transformed():
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
