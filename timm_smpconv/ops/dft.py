"""Convolution in the frequency domain whose transforms are matrix products.

For short signals a product with a matrix of cosines and sines beats a fast Fourier transform: it runs at the speed of
matrix products, takes any length, skips entries that are zero or not wanted, shifts at no cost, and leaves its result
in the order in which it is used. Spectra are planar: real parts, then imaginary parts.
"""

import math
from typing import List, Optional, Sequence, Tuple

import torch

from . import direct, fft
from .context import full_precision, is_channels_last, is_transformed

__all__ = ['correlate', 'count_bins', 'count_products', 'cyclic_len']


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
) -> torch.Tensor:
    """See `fft.correlate` for the arguments; depthwise convolutions, which multiply little, go there."""
    if depthwise:
        return fft.correlate(x, weight, bias, left, depthwise)
    if x.shape[0] == 0:
        return direct.correlate(x, weight, bias, left, depthwise)
    compute = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    with full_precision(x):  # a spectrum does not survive half precision
        y = _correlate(x.to(compute), weight.to(compute), left)
        if bias is not None:
            y = y + bias.to(compute)
    y = y.permute(-2, -1, *range(y.ndim - 2))  # B, O, *spatial
    last = is_channels_last(x)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def cyclic_len(n: int, taps: int, left: int) -> int:
    """Shortest cyclic length for which no wrapped entry meets an output that is kept."""
    return n + max(left, taps - 1 - left)


def count_bins(size: Sequence[int]) -> int:
    """Complex numbers in the spectrum of a real map of the given cyclic lengths."""
    return math.prod(size[:-1]) * (size[-1] // 2 + 1)


def count_products(shape: Sequence[int], size: Sequence[int]) -> int:
    """Multiply-adds of the transform of one map, (H, W), to a spectrum of the given cyclic lengths."""
    return 2 * shape[0] * (shape[1] * (size[1] // 2 + 1) + 2 * count_bins(size))


def _correlate(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...]) -> torch.Tensor:
    """(B, I, *spatial), (O, I, *taps) -> (*spatial, B, O)."""
    shape = list(x.shape[2:])
    size = [cyclic_len(n, k, p) for n, k, p in zip(shape, weight.shape[2:], left)]
    dims = list(range(2, x.ndim))
    x_f = _transform(x.permute(*dims, 0, 1), size)
    w_f = _transform(weight.permute(*dims, 1, 0), size)
    product = _product if is_transformed() else _Product.apply
    y_f = product(x_f, w_f, 1, -1)
    return _inverse(y_f, size, shape, left).unflatten(-1, (x.shape[0], weight.shape[0]))


def _wave(
    rows: torch.Tensor, columns: torch.Tensor, size: int, like: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of 2 pi row column / size."""
    phase = torch.outer(rows, columns).remainder(size).double() * (2 * math.pi / size)
    return phase.cos().to(like), phase.sin().to(like)


def _transform(x: torch.Tensor, size: List[int]) -> torch.Tensor:
    """(*spatial, A, B) -> planar spectrum (2, bins, A, B) of the real signals; half of it, as they are real."""
    device = x.device
    # along the last dimension, real to complex: rows of cosines, then rows of sines
    n, bins = x.shape[-3], torch.arange(size[-1] // 2 + 1, device=device)
    cos, sin = _wave(bins, torch.arange(n, device=device), size[-1], x)
    along = torch.cat([cos, -sin])
    x_f = torch.bmm(along.expand(x.shape[:-3].numel(), -1, -1), x.reshape(-1, n, x.shape[-2:].numel()))
    if x.ndim == 4:  # along the first, complex to complex: an entry is a row of real and a row of imaginary parts
        n = x.shape[0]
        cos, sin = _wave(torch.arange(size[0], device=device), torch.arange(n, device=device), size[0], x)
        across = torch.cat([torch.stack([cos, sin], 2).flatten(1), torch.stack([-sin, cos], 2).flatten(1)])
        x_f = across @ x_f.reshape(2 * n, -1)
    return x_f.reshape(2, -1, x.shape[-2], x.shape[-1])


def _inverse(y_f: torch.Tensor, size: List[int], shape: List[int], left: Tuple[int, ...]) -> torch.Tensor:
    """(2, bins, A, B) -> signals (*spatial, A * B): entries -left ... -left + shape - 1 of each dimension."""
    device, columns = y_f.device, y_f.shape[-2:].numel()
    bins = torch.arange(size[-1] // 2 + 1, device=device)
    if len(size) == 2:
        steps = torch.arange(shape[0], device=device) - left[0]
        cos, sin = _wave(steps, torch.arange(size[0], device=device), size[0], y_f)
        across = torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 1).flatten(0, 1) / size[0]
        y_f = across @ y_f.reshape(2 * size[0], -1)
    cos, sin = _wave(torch.arange(shape[-1], device=device) - left[-1], bins, size[-1], y_f)
    # a bin stands for its mirror image too, which the first and (of an even length) the last do not have
    share = torch.where((bins == 0) | (2 * bins == size[-1]), 1.0, 2.0).to(y_f) / size[-1]
    along = torch.cat([cos * share, -sin * share], 1)
    y = torch.bmm(along.expand(math.prod(shape[:-1]), -1, -1), y_f.reshape(-1, 2 * len(bins), columns))
    return y.reshape(*shape, columns)


def _product(a: torch.Tensor, b: torch.Tensor, sign_a: int, sign_b: int) -> torch.Tensor:
    """Matrix products a b of planar complex (2, bins, *, *); a sign of -1 stands for the conjugate of its factor."""
    real = torch.baddbmm(torch.bmm(a[0], b[0]), a[1], b[1], alpha=-sign_a * sign_b)
    imag = torch.baddbmm(torch.bmm(a[0], b[1]), a[1], b[0], beta=sign_b, alpha=sign_a)
    return torch.stack([real, imag])


class _Product(torch.autograd.Function):
    """`_product` with gradients that are such products too, without sums and copies in between."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor, sign_a: int, sign_b: int) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.signs = sign_a, sign_b
        y = a.new_empty(2, a.shape[1], a.shape[2], b.shape[3])
        torch.bmm(a[0], b[0], out=y[0])
        torch.bmm(a[0], b[1], out=y[1])
        y[0].baddbmm_(a[1], b[1], alpha=-sign_a * sign_b)
        y[1].baddbmm_(a[1], b[0], beta=sign_b, alpha=sign_a)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        a, b = ctx.saved_tensors
        sign_a, sign_b = ctx.signs
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _Product.apply(grad, b.mT, sign_a, -sign_a * sign_b)
        if ctx.needs_input_grad[1]:
            grad_b = _Product.apply(a.mT, grad, -sign_a * sign_b, sign_b)
        return grad_a, grad_b, None, None
