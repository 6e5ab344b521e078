"""Convolution in the frequency domain whose transforms are matrix products.

For short signals a product with a matrix of cosines and sines beats a fast Fourier transform: it runs at the speed of
matrix products, takes any length, skips entries that are zero or not wanted, shifts at no cost, and leaves its result
in the order in which it is used. Spectra are planar: real parts, then imaginary parts.
"""

import functools
import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

from . import fft
from .context import Keep, full_precision, is_channels_last, is_trained, is_transformed, to_channels_last

__all__ = ['correlate', 'count_products']

_Matrices = List[torch.Tensor]  # one for each dimension of the signals

# MKL, which torch's own matrix products of float32 go to on x86, is slow where a small matrix meets a long one, and
# without AVX-512 on an AMD EPYC: oneDNN takes a third to a half of its time there
_ONEDNN = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """See `fft.correlate` for the arguments; depthwise convolutions, which multiply little, go there."""
    if depthwise:
        return fft.correlate(x, weight, bias, left, depthwise, keep)
    compute = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    with full_precision(x):  # a spectrum does not survive half precision
        y = _correlate(x.to(compute), weight.to(compute), left, keep)
        if bias is not None:
            y = y + bias.to(compute)
    y = y.permute(-2, -1, *range(y.ndim - 2))  # B, O, *spatial
    return to_channels_last(y, x.dtype) if is_channels_last(x) else y.to(x.dtype).contiguous()


def count_products(shape: Sequence[int], size: Sequence[int]) -> int:
    """Multiply-adds of the transform of one map, (H, W), to a spectrum of the given cyclic lengths."""
    return 2 * shape[0] * (shape[1] * (size[1] // 2 + 1) + 2 * fft.count_bins(size))


def _correlate(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], keep: Optional[Keep]) -> torch.Tensor:
    """(B, I, *spatial), (O, I, *taps) -> (*spatial, B, O)."""
    shape, taps = list(x.shape[2:]), list(weight.shape[2:])
    size = [fft.cyclic_len(n, k, p) for n, k, p in zip(shape, taps, left)]
    dims = list(range(2, x.ndim))

    def of_kernel() -> torch.Tensor:
        # filters before channels: the gradient comes back in an order that the product which rendered the kernel takes
        return _transform(weight.permute(*dims, 0, 1), _matrices(_forward_matrices, weight, taps, size))

    key, numbers = ('dft', weight.shape, weight.dtype, *size), 2 * fft.count_bins(size) * weight.shape[:2].numel()
    w_f = of_kernel() if keep is None else keep(key, numbers, of_kernel)
    forward = _matrices(_forward_matrices, weight, shape, size)
    inverse = _matrices(_inverse_matrices, weight, shape, size, left)
    product = _product if is_transformed() else _Product.apply
    y_f = product(_transform(x.permute(*dims, 0, 1), forward), w_f, 1, -1)
    return _inverse(y_f, inverse, shape).unflatten(-1, (x.shape[0], weight.shape[0]))


def _is_eager(x: torch.Tensor) -> bool:
    """Whether no compiler, transform or tensor of a special kind wants to see torch's own operations."""
    return not torch.compiler.is_compiling() and not is_transformed() and type(x.detach()) is torch.Tensor


_MAX_KEPT = 2**19  # numbers of the matrices of a shape that are kept
_Like = Tuple[torch.dtype, torch.device]


def _matrices(make: Callable[..., _Matrices], like: torch.Tensor, *sizes: Sequence[int]) -> _Matrices:
    """What a function makes of sizes, in the dtype and on the device of a tensor; constants, made once if they can be.

    On a GPU their making would take longer than their use: it is some hundred launches.
    """
    arguments = (*(tuple(size) for size in sizes), (like.dtype, like.device))
    if not _is_eager(like):
        return make(*arguments)
    if like.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():  # values that only a replay computes
        return make(*arguments)
    # photographs may all have different sizes
    if sum(4 * n * cyclic for n, cyclic in zip(sizes[0], sizes[1])) > _MAX_KEPT:
        return make(*arguments)
    return _made_once(make, *arguments)


@functools.lru_cache(maxsize=192)  # of 64 shapes: of maps, of kernels, and back
def _made_once(make: Callable[..., _Matrices], *arguments: Any) -> _Matrices:
    with torch.inference_mode(False):  # they serve training too
        made = make(*arguments)
    if made[0].device.type == 'cuda':  # and other streams, which do not wait for this one
        torch.cuda.current_stream(made[0].device).synchronize()
    return made


def _wave(
    rows: torch.Tensor, columns: torch.Tensor, size: int, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of 2 pi row column / size."""
    phase = torch.outer(rows, columns).remainder(size).double() * (2 * math.pi / size)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def _forward_matrices(shape: Sequence[int], size: Sequence[int], like: _Like) -> _Matrices:
    """Of the transform of signals of a shape to spectra of cyclic lengths: along the last dimension, then the first."""
    dtype, device = like
    steps = functools.partial(torch.arange, device=device)
    # real to complex: rows of cosines, then rows of sines
    cos, sin = _wave(steps(size[-1] // 2 + 1), steps(shape[-1]), size[-1], dtype)
    matrices = [torch.cat([cos, -sin])]
    if len(size) == 2:  # complex to complex: an entry is a row of real and a row of imaginary parts
        cos, sin = _wave(steps(size[0]), steps(shape[0]), size[0], dtype)
        matrices.append(torch.cat([torch.stack([cos, sin], 2).flatten(1), torch.stack([-sin, cos], 2).flatten(1)]))
    return matrices


def _inverse_matrices(shape: Sequence[int], size: Sequence[int], left: Tuple[int, ...], like: _Like) -> _Matrices:
    """Of the transform back, to the entries -left ... -left + shape - 1: along the last dimension, then the first."""
    dtype, device = like
    steps = functools.partial(torch.arange, device=device)
    bins = steps(size[-1] // 2 + 1)
    cos, sin = _wave(steps(shape[-1]) - left[-1], bins, size[-1], dtype)
    # a bin stands for its mirror image too, which the first and (of an even length) the last do not have
    share = torch.where((bins == 0) | (2 * bins == size[-1]), 1.0, 2.0).to(dtype) / size[-1]
    matrices = [torch.cat([cos * share, -sin * share], 1)]
    if len(size) == 2:
        cos, sin = _wave(steps(shape[0]) - left[0], steps(size[0]), size[0], dtype)
        matrices.append(torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 1).flatten(0, 1) / size[0])
    return matrices


def _transform(x: torch.Tensor, matrices: _Matrices) -> torch.Tensor:
    """(*spatial, A, B) -> planar spectrum (2, bins, A, B) of the real signals; half of it, as they are real."""
    along, n = matrices[0], x.shape[-3]
    x_f = torch.bmm(along.expand(x.shape[:-3].numel(), -1, -1), x.reshape(-1, n, x.shape[-2:].numel()))
    if x.ndim == 4:
        x_f = _multiply(matrices[1], x_f.reshape(2 * x.shape[0], -1))
    return x_f.reshape(2, -1, x.shape[-2], x.shape[-1])


def _inverse(y_f: torch.Tensor, matrices: _Matrices, shape: Sequence[int]) -> torch.Tensor:
    """(2, bins, A, B) -> signals (*spatial, A * B)."""
    along, columns = matrices[0], y_f.shape[-2:].numel()
    if len(shape) == 2:
        y_f = _multiply(matrices[1], y_f.reshape(matrices[1].shape[1], -1))
    y = torch.bmm(along.expand(math.prod(shape[:-1]), -1, -1), y_f.reshape(-1, along.shape[1], columns))
    return y.reshape(*shape, columns)


def _multiply(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """matrix @ x for a constant small matrix and a long x, (k, n)."""
    if (
        _ONEDNN
        and torch.backends.mkldnn.enabled
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and x.numel() > 0
        and _is_eager(x)
    ):
        return _Multiply.apply(matrix, x) if is_trained(x, matrix) else _linear(matrix, x.t())
    return matrix @ x


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.linear by oneDNN, through the operation that torch's own compiler puts in its place."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], '')


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(matrix)
        return _linear(matrix, x.t())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return None, _multiply(ctx.saved_tensors[0].t(), grad)


def _product(a: torch.Tensor, b: torch.Tensor, sign_a: int, sign_b: int) -> torch.Tensor:
    """Matrix products a b^T of planar complex (2, bins, *, *); a sign of -1 stands for the conjugate of its factor."""
    (a_re, a_im), (b_re, b_im) = a.unbind(), b.mT.unbind()
    real = torch.baddbmm(torch.bmm(a_re, b_re), a_im, b_im, alpha=-sign_a * sign_b)
    imag = torch.baddbmm(torch.bmm(a_re, b_im), a_im, b_re, beta=sign_b, alpha=sign_a)
    return torch.stack([real, imag])


class _Product(torch.autograd.Function):
    """`_product` with gradients that are such products too, without sums and copies in between."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor, sign_a: int, sign_b: int) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.signs = sign_a, sign_b
        b = b.mT  # before its sizes are read: of another order of symbols torch 2.6 cannot tell that they are equal
        y = a.new_empty(2, a.shape[1], a.shape[2], b.shape[3])
        (a_re, a_im), (b_re, b_im), (real, imag) = a.unbind(), b.unbind(), y.unbind()
        torch.bmm(a_re, b_re, out=real)
        torch.bmm(a_re, b_im, out=imag)
        real.baddbmm_(a_im, b_im, alpha=-sign_a * sign_b)
        imag.baddbmm_(a_im, b_re, beta=sign_b, alpha=sign_a)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        a, b = ctx.saved_tensors
        sign_a, sign_b = ctx.signs
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _Product.apply(grad, b.mT, sign_a, -sign_a * sign_b)
        if ctx.needs_input_grad[1]:
            grad_b = _Product.apply(grad.mT, a.mT, sign_b, -sign_a * sign_b)
        return grad_a, grad_b, None, None
