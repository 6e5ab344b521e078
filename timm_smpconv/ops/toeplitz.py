"""Depthwise 2D convolution as products with banded Toeplitz matrices, in Triton, for GPUs.

For one channel and one row of the kernel, the convolution along the width is a product with a matrix that has the taps
of that row on its diagonals: y[m, j] = sum_i x[m, i] T[i, j] with T[i, j] = w[i - j + left]. Images and rows are the
dimension m. So tensor cores do the work, at the price of multiplying the zeros outside the band too. The gradient of
the input is a convolution with the flipped kernel; that of the weight is the product of the maps, G[i, j] = sum_m
x[m, i] dy[m, j] for each row of the kernel, summed along its diagonals.

Sums are in float32. Importing this module needs Triton, which comes with torch for CUDA. Without a GPU the kernels run
in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), which is for tests.

These kernels have run in the interpreter, and compile for GPUs; none was at hand to measure them on. So nothing chooses
them yet: ops.use_backend('toeplitz') does.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from . import direct
from .context import Keep, is_channels_last, is_transformed

__all__ = ['applies', 'correlate']


@triton.jit
def _correlate_kernel(
    x,  # (batch, channels, height, width), contiguous, as is y
    weight,  # (channels, taps_h, taps_w)
    bias,
    y,
    batch,
    channels,
    height,
    taps_h,
    taps_w,
    left_h,
    left_w,
    tiles_b,
    tiles_h,
    tiles_w,
    WIDTH: tl.constexpr,  # known to the compiler, which then sees how rows are aligned
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One channel of BLOCK_B images: BLOCK_H rows and BLOCK_W columns of the output."""
    tile = tl.program_id(0)
    first_col = tile % tiles_w * BLOCK_W
    tile = tile // tiles_w
    first_row = tile % tiles_h * BLOCK_H
    tile = tile // tiles_h
    channel = tile // tiles_b
    m = tl.arange(0, BLOCK_B * BLOCK_H)
    image = tile % tiles_b * BLOCK_B + m // BLOCK_H
    row = first_row + m % BLOCK_H
    col = first_col + tl.arange(0, BLOCK_W)
    offset = (image.to(tl.int64) * channels + channel) * height * WIDTH

    # only what falls on the map: rows of the kernel, and columns of the input under the band
    tap_begin = tl.maximum(left_h - first_row - (BLOCK_H - 1), 0)
    tap_end = tl.minimum(left_h - first_row + height, taps_h)
    col_begin = tl.maximum(first_col - left_w, 0) // 16 * 16  # aligned, for wide loads
    col_end = tl.minimum(first_col + (BLOCK_W - 1) - left_w + taps_w, WIDTH)
    total = tl.zeros((BLOCK_B * BLOCK_H, BLOCK_W), dtype=tl.float32)
    for tap in range(tap_begin, tap_end):
        source = row + tap - left_h
        on_map = (image < batch) & (source >= 0) & (source < height)
        for begin in range(col_begin, col_end, BLOCK_K):
            i = begin + tl.arange(0, BLOCK_K)
            rows = tl.load(
                x + (offset + source * WIDTH)[:, None] + i[None, :],
                mask=on_map[:, None] & (i < WIDTH)[None, :],
                other=0.0,
            )
            k = i[:, None] - col[None, :] + left_w
            band = tl.load(
                weight + (channel * taps_h + tap) * taps_w + k,
                mask=(k >= 0) & (k < taps_w),
                other=0.0,
            )
            if UPCAST:
                rows, band = rows.to(tl.float32), band.to(tl.float32)
            total = tl.dot(rows, band, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    tl.store(
        y + (offset + row * WIDTH)[:, None] + col[None, :],
        total.to(y.dtype.element_ty),
        mask=((image < batch) & (row < height))[:, None] & (col < WIDTH)[None, :],
    )


@triton.jit
def _weight_grad_kernel(
    x,  # (batch, channels, height, width), contiguous, as is grad
    grad,
    out,  # (channels, taps_h, BLOCK_J, taps_w), float32, zeros
    batch,
    channels,
    height,
    taps_h,
    taps_w,
    left_h,
    left_w,
    origin,
    tiles_i,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One channel and one row of the kernel: products of BLOCK_I columns of x with BLOCK_J columns of grad.

    Columns of x are counted from those of grad plus origin, so that a diagonal is the same tap in each tile of columns.
    """
    tile = tl.program_id(0)
    i = origin + tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    tap = tile // tiles_i % taps_h
    channel = tile // tiles_i // taps_h
    j = tl.arange(0, BLOCK_J)
    first_row = tl.maximum(left_h - tap, 0)
    rows = tl.minimum(left_h - tap + height, height) - first_row
    total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for first_col in range(0, WIDTH, BLOCK_J):
        col_x, col_grad = first_col + i, first_col + j
        for begin in range(0, batch * rows, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            image, row = m // rows, first_row + m % rows
            offset = ((image.to(tl.int64) * channels + channel) * height + row) * WIDTH
            known = image < batch
            a = tl.load(
                x + (offset + (tap - left_h) * WIDTH)[:, None] + col_x[None, :],
                mask=known[:, None] & ((col_x >= 0) & (col_x < WIDTH))[None, :],
                other=0.0,
            )
            b = tl.load(
                grad + offset[:, None] + col_grad[None, :],
                mask=known[:, None] & (col_grad < WIDTH)[None, :],
                other=0.0,
            )
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    k = i[:, None] - j[None, :] + left_w
    tl.store(
        out + ((channel * taps_h + tap) * BLOCK_J + j)[None, :] * taps_w + k,
        total,
        mask=(k >= 0) & (k < taps_w),
    )


# the interpreter multiplies bfloat16 wrongly; float32 holds those products exactly
_INTERPRETED = not isinstance(_correlate_kernel, triton.JITFunction)
# float32 on the tensor cores would have 10 bits (tf32): these products are exact to float32
_PRECISION = 'ieee'
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _correlate_blocks(batch: int, width: int, dtype: torch.dtype) -> Dict[str, Any]:
    """Constants of the kernel that convolves: what one program computes."""
    block_w = _block(width)
    rows, block_k = (64, 16) if dtype == torch.float32 else (128, block_w)
    block_b = min(triton.next_power_of_2(batch), rows)
    blocks = dict(BLOCK_B=block_b, BLOCK_H=rows // block_b, BLOCK_W=block_w, BLOCK_K=block_k)
    return dict(blocks, WIDTH=width, UPCAST=_INTERPRETED, PRECISION=_PRECISION)


def _weight_grad_blocks(width: int, dtype: torch.dtype) -> Dict[str, Any]:
    """Constants of the kernel of the weight's gradient."""
    block = _block(width)
    blocks = dict(BLOCK_I=block, BLOCK_J=block, BLOCK_M=16 if dtype == torch.float32 else 64)
    return dict(blocks, WIDTH=width, UPCAST=_INTERPRETED, PRECISION=_PRECISION)


def _block(width: int) -> int:
    """Columns of a tile: a power of two, not less than 16, which is the least that tensor cores take."""
    return min(max(triton.next_power_of_2(width), 16), 64)


def applies(x: torch.Tensor, depthwise: bool) -> bool:
    """Whether these kernels can take a convolution of x: depthwise, 2D, not float64, on a GPU or interpreted.

    The transforms of torch.func would not see through them.
    """
    on_device = x.device.type == 'cuda' or (_INTERPRETED and x.device.type == 'cpu')
    return depthwise and x.ndim == 4 and x.dtype in _DTYPES and on_device and not is_transformed()


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """See `fft.correlate` for the arguments; what the kernels cannot take goes to the direct backend."""
    if not applies(x, depthwise) or not x.numel():
        return direct.correlate(x, weight, bias, left, depthwise)
    y = _correlate(x, weight.to(x.dtype), bias, list(left))
    if is_channels_last(x):
        y = y.contiguous(memory_format=torch.channels_last)
    return y


# operators of their own, so that torch.compile leaves them whole
@torch.library.custom_op('timm_smpconv::toeplitz_correlate', mutates_args=())
def _correlate(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], left: Sequence[int]
) -> torch.Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = _correlate_blocks(batch, width, x.dtype)
    tiles = [triton.cdiv(n, blocks[f'BLOCK_{axis}']) for n, axis in ((batch, 'B'), (height, 'H'), (width, 'W'))]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _correlate_kernel[(channels * tiles[0] * tiles[1] * tiles[2],)](
            x.contiguous(),
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            y,
            batch,
            channels,
            height,
            *weight.shape[2:],
            *left,
            *tiles,
            HAS_BIAS=bias is not None,
            **blocks,
        )
    return y


@torch.library.custom_op('timm_smpconv::toeplitz_weight_grad', mutates_args=())
def _weight_grad(x: torch.Tensor, grad: torch.Tensor, taps: Sequence[int], left: Sequence[int]) -> torch.Tensor:
    batch, channels, height, width = x.shape
    blocks = _weight_grad_blocks(width, x.dtype)
    block = blocks['BLOCK_I']
    # with all columns in one tile, those of x begin at the edge of the map, else where the band begins
    origin, columns = (0, width) if width <= block else (-left[1], block + taps[1] - 1)
    tiles = triton.cdiv(columns, block)
    # a column of products has each tap once: no two products meet in one entry
    out = torch.zeros(channels, taps[0], block, taps[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _weight_grad_kernel[(channels * taps[0] * tiles,)](
            x.contiguous(),
            grad.contiguous(),
            out,
            batch,
            channels,
            height,
            *taps,
            *left,
            origin,
            tiles,
            **blocks,
        )
    return out.sum(2).unsqueeze(1).to(x.dtype)


@_correlate.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], left: List[int]) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_weight_grad.register_fake
def _(x: torch.Tensor, grad: torch.Tensor, taps: List[int], left: List[int]) -> torch.Tensor:
    return x.new_empty(x.shape[1], 1, *taps)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, left = inputs
    ctx.save_for_backward(x, weight)
    ctx.left, ctx.bias_dtype = left, None if bias is None else bias.dtype


def _backward(ctx, grad: torch.Tensor):
    x, weight = ctx.saved_tensors
    taps = list(weight.shape[2:])
    grad_x = grad_w = grad_bias = None
    if ctx.needs_input_grad[0]:
        right = [k - 1 - p for k, p in zip(taps, ctx.left)]
        grad_x = _correlate(grad, weight.flip(2, 3), None, right)
    if ctx.needs_input_grad[1]:
        grad_w = _weight_grad(x, grad, taps, ctx.left)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_w, grad_bias, None


def _setup_weight_grad_context(ctx, inputs, output) -> None:
    x, grad, _, ctx.left = inputs
    ctx.save_for_backward(x, grad)


def _weight_grad_backward(ctx, grad_w: torch.Tensor):
    # the weight's gradient is linear in both maps: what meets it in a second backward pass takes the weight's place
    x, grad = ctx.saved_tensors
    grad_x = grad_grad = None
    if ctx.needs_input_grad[0]:
        right = [k - 1 - p for k, p in zip(grad_w.shape[2:], ctx.left)]
        grad_x = _correlate(grad, grad_w.flip(2, 3), None, right)
    if ctx.needs_input_grad[1]:
        grad_grad = _correlate(x, grad_w, None, ctx.left)
    return grad_x, grad_grad, None, None


_correlate.register_autograd(_backward, setup_context=_setup_context)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_setup_weight_grad_context)
