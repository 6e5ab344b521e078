"""Convolution in the frequency domain.

Exact up to rounding for any kernel, at a cost that hardly depends on the number of taps. Half precision inputs are
transformed in float32.
"""

import functools
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .context import Keep, is_channels_last, is_trained, is_transformed, to_channels_last

__all__ = ['correlate', 'count_bins', 'cyclic_len', 'fast_len', 'plan_parts']

_AT_HAND = 2**20  # numbers of the spectra of depthwise maps that are convolved at a time


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """y[t] = bias + sum_k w[k] x[t + k - left] with x zero outside its support, for every t in it.

    Args:
        x: Input, (B, I, *spatial) in one or two spatial dimensions.
        weight: Kernel, (O, I, *taps), or (I, 1, *taps) if depthwise; no more than 2 * spatial - 1 taps.
        bias: Bias, (O,), or None.
        left: Zeros to the left of the input, one number per spatial dimension.
        depthwise: One filter per channel.
        keep: Keeps what is computed from the kernel alone, for a constant kernel in inference.

    Returns:
        Output, (B, O, *spatial), in the dtype of x.
    """
    if depthwise and x.ndim == 4 and x.shape[2] == weight.shape[2] == 1:  # of one row: a transform less
        return correlate(x.squeeze(2), weight.squeeze(2), bias, left[1:], depthwise, keep).unsqueeze(2)
    compute = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    y = _correlate_in_parts(x.to(compute), weight.to(compute), left, depthwise, keep)
    if bias is not None:
        y = y + bias.to(compute).reshape(1, -1, *[1] * (y.ndim - 2))
    elif left[-1] == 0 and is_trained(x, weight):  # a view made in an autograd.Function, which refuses changes in place
        y = y.clone()
    # in the format that the layers around it expect
    return to_channels_last(y, x.dtype) if is_channels_last(x) else y.to(x.dtype)


def cyclic_len(n: int, taps: int, left: int) -> int:
    """Shortest cyclic length for which no wrapped entry meets an output that is kept."""
    return n + max(left, taps - 1 - left)


def count_bins(size: Sequence[int]) -> int:
    """Complex numbers in the spectrum of a real map of the given cyclic lengths."""
    return math.prod(size[:-1]) * (size[-1] // 2 + 1)


def fast_len(n: int) -> int:
    """A length >= n whose real transform is fast: even and without prime factors above 7.

    Multiples of four take some 15 % less time a point than others: one that is near is preferred.
    """
    even, four = _smooth_multiple(n, 2), _smooth_multiple(n, 4)
    return four if four <= 1.1 * even else even


def _smooth_multiple(n: int, factor: int) -> int:
    """Smallest multiple of a factor that is >= n and has no prime factor above 7."""
    n += -n % factor
    while True:
        rest = n
        for p in (2, 3, 5, 7):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += factor


def plan_parts(batch: int, in_chs: int, out_chs: int, length: int, taps: int) -> Tuple[int, int]:
    """In how many parts a long sequence is best convolved with a dense kernel.

    A part of S outputs needs transforms of S + taps - 1 points. Parts cost more transforms of the sequences, but
    shorten those of the out_chs x in_chs kernels, which outnumber the sequences of a small batch.

    Args:
        batch: Sequences.
        in_chs: Input channels.
        out_chs: Output channels.
        length: Steps of a sequence.
        taps: Taps of the kernel.

    Returns:
        Number of parts, and points of a transform.
    """
    # each search takes a tenth of a millisecond; compilers trace it instead of calling it
    search = _search_parts if torch.compiler.is_compiling() else _searched_parts
    return search(batch, in_chs, out_chs, length, taps)


def _search_parts(batch: int, in_chs: int, out_chs: int, length: int, taps: int) -> Tuple[int, int]:
    best, least = (1, 0), float('inf')
    for parts in range(1, 17):  # spelled out: torch.compile of the oldest supported torch knows no min(key=...)
        points = fast_len(-(-length // parts) + taps - 1)
        cost = points * (batch * parts * (in_chs + out_chs) + out_chs * in_chs)
        if parts > 1:
            cost *= 1.1  # a part is also a copy: worth it for a tenth
        if cost < least:
            best, least = (parts, points), cost
    return best


_searched_parts = functools.lru_cache(maxsize=256)(_search_parts)


def _correlate_in_parts(
    x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], depthwise: bool, keep: Optional[Keep]
) -> torch.Tensor:
    parts = 1
    if x.ndim == 3 and not depthwise:
        parts, _ = plan_parts(x.shape[0], x.shape[1], weight.shape[0], x.shape[2], weight.shape[2])
    if parts == 1:
        return _apply(x, weight, left, x.shape[2:], depthwise, keep)
    length, taps = x.shape[2], weight.shape[2]
    outputs = -(-length // parts)
    x = F.pad(x, (left[0], parts * outputs + taps - 1 - left[0] - length))
    x = torch.stack([x.narrow(2, i * outputs, outputs + taps - 1) for i in range(parts)], 1)
    y = _apply(x.flatten(0, 1), weight, (0,), (outputs,), depthwise, keep)
    return y.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2)[..., :length].contiguous()


def _apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    left: Tuple[int, ...],
    outputs: Sequence[int],
    depthwise: bool,
    keep: Optional[Keep],
) -> torch.Tensor:
    """The first outputs, as many as given for each spatial dimension, of a correlation with `left` zeros before x."""
    # lengths for which no wrapped entry meets an output that is kept
    size = [fast_len(max(n + p, m + k - 1 - p)) for n, m, k, p in zip(x.shape[2:], outputs, weight.shape[2:], left)]
    group = _group_channels(x, size) if depthwise else None
    if is_trained(x, weight):
        return _Correlate.apply(x, weight, size, left, outputs, depthwise, group)

    def of_kernel() -> torch.Tensor:
        return _transform(weight, size, depthwise, conj=True)

    numbers, key = 2 * count_bins(size) * weight.shape[:2].numel(), ('fft', weight.shape, weight.dtype, *size)
    w_c = of_kernel() if keep is None else keep(key, numbers, of_kernel)
    pairs = zip(_split(x, group, 1), _split(w_c, group, 0))
    return _cat(
        [_multiply(_transform(part, size, depthwise), w, size, left, outputs, depthwise) for part, w in pairs], 1
    )


def _group_channels(x: torch.Tensor, size: Sequence[int]) -> Optional[int]:
    """How many channels of depthwise maps are best convolved at a time, None for all of them.

    As many whose spectra stay in memory that is at hand: on a CPU, a large allocation is of new pages, whose first
    touch may take several times as long as the transforms.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or is_transformed():
        return None
    group = max(_AT_HAND // (2 * count_bins(size) * x.shape[0]), 1)
    return group if group < x.shape[1] else None


def _split(x: torch.Tensor, group: Optional[int], dim: int) -> Sequence[torch.Tensor]:
    """Groups along the dimension of channels; of a copy if x is in channels_last format, where they lie in pieces."""
    return [x] if group is None else x.contiguous().split(group, dim)


def _cat(parts: List[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _multiply(
    x_f: torch.Tensor,
    w_c: torch.Tensor,
    size: List[int],
    left: Tuple[int, ...],
    outputs: Sequence[int],
    depthwise: bool,
) -> torch.Tensor:
    """Outputs, from the spectrum of the input and the conjugate one of the kernel."""
    y_f = x_f * w_c[:, 0] if depthwise else torch.bmm(x_f, w_c.mT)
    return _window(_inverse(y_f, size, depthwise), [-p for p in left], outputs)


class _Correlate(torch.autograd.Function):
    # products with a conjugated factor (bmm of .mH) take up to twice as long: conjugates are made on the way

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        size: List[int],
        left: Tuple[int, ...],
        outputs: Sequence[int],
        depthwise: bool,
        group: Optional[int],
    ):
        w_c = _transform(weight, size, depthwise, conj=True)
        maps, spectra = [], []
        for part, w in zip(_split(x, group, 1), _split(w_c, group, 0)):
            x_f = _transform(part, size, depthwise)
            maps.append(_multiply(x_f, w, size, left, outputs, depthwise))
            spectra += [x_f] if ctx.needs_input_grad[1] else []
        kept = [x if ctx.needs_input_grad[1] else None]
        kept += [weight, w_c] if ctx.needs_input_grad[0] else [None, None]
        ctx.save_for_backward(*kept, *spectra)
        ctx.config = x.shape[2:], weight.shape[2:], size, left, depthwise, group
        return _cat(maps, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        shape, taps, size, left, depthwise, group = ctx.config
        x, weight, w_c, *spectra = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted: spectra that lead back to their signals
            spectra = [] if x is None else [_transform(part, size, depthwise) for part in _split(x, group, 1)]
            w_c = None if weight is None else _transform(weight, size, depthwise, conj=True)
        kernels = None if w_c is None else _split(w_c, group, 0)
        grads_x, grads_w = [], []
        for i, part in enumerate(_split(grad, group, 1)):
            grad_f = _transform(part, size, depthwise, conj=not depthwise)  # conjugate for the matrix products
            if kernels is not None:  # dx[s] = sum_k w[k] dy[s - k + left]
                w = kernels[i]
                spectrum = grad_f * w[:, 0].conj() if depthwise else torch.bmm(grad_f, w).conj()
                grads_x.append(_window(_inverse(spectrum, size, depthwise), left, shape))
            if spectra:  # dw[k] = sum_t dy[t] x[t + k - left]
                x_f = spectra[i]
                spectrum = (grad_f.conj() * x_f).sum(0).unsqueeze(1) if depthwise else torch.bmm(grad_f.mT, x_f)
                grads_w.append(_window(_inverse(spectrum, size, depthwise), [-p for p in left], taps))
        grad_x, grad_w = _cat(grads_x, 1) if grads_x else None, _cat(grads_w, 0) if grads_w else None
        return grad_x, grad_w, None, None, None, None, None


def _transform(x: torch.Tensor, size: List[int], depthwise: bool, conj: bool = False) -> torch.Tensor:
    """(A, B, *spatial) -> spectrum (A, B, *bins), or (bins, A, B) for the matrix products of a dense convolution."""
    spectrum = torch.fft.rfftn(x, s=size, dim=list(range(2, x.ndim)))
    if conj:
        spectrum = spectrum.conj()
    return spectrum.resolve_conj() if depthwise else spectrum.flatten(2).permute(2, 0, 1).contiguous()


def _inverse(spectrum: torch.Tensor, size: List[int], depthwise: bool) -> torch.Tensor:
    """Inverse of _transform: (A, B, *size)."""
    if not depthwise:  # a view: the transform reads it in place
        spectrum = spectrum.permute(1, 2, 0).unflatten(2, size[:-1] + [size[-1] // 2 + 1])
    return torch.fft.irfftn(spectrum, s=size, dim=list(range(2, spectrum.ndim)))


def _window(x: torch.Tensor, start: Sequence[int], length: Sequence[int]) -> torch.Tensor:
    """Entries start ... start + length - 1 of a periodic signal in each spatial dimension; start may be negative."""
    for dim, (s, n) in enumerate(zip(start, length), start=2):
        if s < 0:
            x = torch.cat([x.narrow(dim, x.shape[dim] + s, min(-s, n)), x.narrow(dim, 0, max(n + s, 0))], dim)
        else:
            x = x.narrow(dim, s, n)
    return x
