"""Depthwise 2D convolution as products with banded Toeplitz matrices, in Triton, for GPUs.

For one channel and one row of the kernel, the convolution along the width is a product with a matrix that has the taps
of that row on its diagonals: y[m, j] = sum_i x[m, i] T[i, j] with T[i, j] = w[i - j + left]. Images and rows are the
dimension m. So tensor cores do the work, at the price of multiplying the zeros outside the band too. The gradient of
the input is a convolution with the flipped kernel; that of the weight is the product of the maps, G[i, j] = sum_m
x[m, i] dy[m, j] for each row of the kernel, summed along its diagonals.

Sums are in float32. Importing this module needs Triton, which comes with torch for CUDA. Without a GPU the kernels run
in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), which is for tests.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import direct
from .context import Keep, has_tensor_cores, is_channels_last, is_transformed

__all__ = ['applies', 'correlate']


@triton.jit
def _correlate_kernel(
    x,  # (batch, channels, height, width), contiguous, as is y
    bands,  # (channels, taps_h, BLOCK_W, depth): see _bands
    bias,
    y,
    batch,
    channels,
    height,
    taps_h,
    left_h,
    tiles_b,
    tiles_h,
    tiles_w,
    WIDTH: tl.constexpr,  # known to the compiler, which then sees how rows are aligned
    LEAD: tl.constexpr,
    DEPTH: tl.constexpr,
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
    j = tl.arange(0, BLOCK_W)
    band_row = (BLOCK_W - 1 - j) * DEPTH
    offset = (image.to(tl.int64) * channels + channel) * height * WIDTH

    # only the rows of the kernel that fall on the map
    tap_begin = tl.maximum(left_h - first_row - (BLOCK_H - 1), 0)
    tap_end = tl.minimum(left_h - first_row + height, taps_h)
    total = tl.zeros((BLOCK_B * BLOCK_H, BLOCK_W), dtype=tl.float32)
    # one loop over taps and parts of a band, so that loads run ahead of products
    parts: tl.constexpr = DEPTH // BLOCK_K
    for step in range(tap_begin * parts, tap_end * parts):
        tap = step // parts
        source = row + tap - left_h
        on_map = (image < batch) & (source >= 0) & (source < height)
        i = step % parts * BLOCK_K + tl.arange(0, BLOCK_K)
        col = first_col - LEAD + i
        a = tl.load(
            x + (offset + source * WIDTH)[:, None] + col[None, :],
            mask=on_map[:, None] & ((col >= 0) & (col < WIDTH))[None, :],
            other=0.0,
        )
        band = bands + (channel.to(tl.int64) * taps_h + tap) * BLOCK_W * DEPTH
        b = tl.load(band + i[:, None] + band_row[None, :])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    col = first_col + j
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
    tiles_i,
    tiles_t,
    WIDTH: tl.constexpr,
    LEAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One channel and BLOCK_T rows of the kernel: products of BLOCK_I columns of x with BLOCK_J columns of grad.

    Columns of x are counted from those of grad less LEAD, so that a diagonal is the same tap in each tile of columns.
    """
    tile = tl.program_id(0)
    ti = tl.arange(0, BLOCK_T * BLOCK_I)
    i = tile % tiles_i * BLOCK_I + ti % BLOCK_I - LEAD
    first_tap = tile // tiles_i % tiles_t * BLOCK_T
    tap = first_tap + ti // BLOCK_I
    channel = tile // tiles_i // tiles_t
    j = tl.arange(0, BLOCK_J)
    first_row = tl.maximum(left_h - first_tap - (BLOCK_T - 1), 0)
    rows = tl.minimum(left_h - first_tap + height, height) - first_row
    total = tl.zeros((BLOCK_T * BLOCK_I, BLOCK_J), dtype=tl.float32)
    for first_col in range(0, WIDTH, BLOCK_J):
        col_x, col_grad = first_col + i, first_col + j
        for begin in range(0, batch * rows, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            image, row = m // rows, first_row + m % rows
            offset = ((image.to(tl.int64) * channels + channel) * height + row) * WIDTH
            known = image < batch
            source = row[:, None] + (tap - left_h)[None, :]
            a = tl.load(
                x + offset[:, None] + ((tap - left_h) * WIDTH + col_x)[None, :],
                mask=known[:, None] & (source >= 0) & (source < height) & ((col_x >= 0) & (col_x < WIDTH))[None, :],
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
        out + ((channel.to(tl.int64) * taps_h + tap)[:, None] * BLOCK_J + j[None, :]) * taps_w + k,
        total,
        mask=(tap < taps_h)[:, None] & (k >= 0) & (k < taps_w),
    )


@triton.jit
def _transpose_kernel(x, y, rows, cols, tiles_r, tiles_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of matrices, (batch, rows, cols) -> (batch, cols, rows)."""
    tile = tl.program_id(0)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tile // tiles_c
    r = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offset = (tile // tiles_r).to(tl.int64) * rows * cols
    known = (r < rows)[:, None] & (c < cols)[None, :]
    values = tl.load(x + offset + r[:, None] * cols + c[None, :], mask=known)
    tl.store(y + offset + c[:, None] * rows + r[None, :], tl.trans(values), mask=tl.trans(known))


# the interpreter multiplies bfloat16 wrongly; float32 holds those products exactly
_INTERPRETED = not isinstance(_correlate_kernel, triton.JITFunction)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _correlate_blocks(batch: int, width: int, taps_w: int, left_w: int, dtype: torch.dtype) -> Dict[str, Any]:
    """Constants of the kernel that convolves: what one program computes, and how. Measured on an H100."""
    block_b, block_w = min(triton.next_power_of_2(batch), 64), _block(width)
    lead = _lead(width, left_w)
    block_k = min(block_w, 32) if dtype == torch.float32 else block_w
    depth = block_w
    if width > block_w:
        depth = triton.cdiv(lead - left_w + block_w - 1 + taps_w, block_k) * block_k
    return dict(
        WIDTH=width,
        LEAD=lead,
        DEPTH=depth,
        UPCAST=_INTERPRETED,
        # float32 on tensor cores has 10 bits (tf32); with each number as a sum of two such it has 21
        PRECISION='tf32x3',
        BLOCK_B=block_b,
        BLOCK_H=128 // block_b,
        BLOCK_W=block_w,
        BLOCK_K=block_k,
        num_warps=8 if dtype == torch.float32 and block_w > 16 else 4,
        num_stages=3,
    )


def _weight_grad_blocks(width: int, left_w: int, dtype: torch.dtype) -> Dict[str, Any]:
    """Constants of the kernel of the weight's gradient. Measured on an H100."""
    block, single = _block(width), dtype == torch.float32
    one_tile = width <= block
    return dict(
        WIDTH=width,
        LEAD=_lead(width, left_w),
        UPCAST=_INTERPRETED,
        PRECISION='ieee',  # without tensor cores: they would want this layout rearranged in float32
        BLOCK_T=4 if one_tile and not single else 1,
        BLOCK_I=block,
        BLOCK_J=block,
        BLOCK_M=16 if single else 64,
        num_warps=4,
        num_stages=2 if one_tile or single else 3,
    )


def _lead(width: int, left_w: int) -> int:
    """Columns of the input left of a tile's own that its band begins with, a multiple of 16 for wide loads.

    0 if one tile has all columns.
    """
    return 0 if width <= _block(width) else triton.cdiv(left_w, 16) * 16


def _bands(weight: torch.Tensor, lead: int, left_w: int, block_w: int, depth: int) -> torch.Tensor:
    """For each row of the kernel, (C, 1, kh, kw), the matrix with its taps on the diagonals: (C, kh, block_w, depth).

    Entry (block_w - 1 - j, i) is the tap i - j - lead + left_w, or zero: the weight of column i of the input under a
    tile for column j of the tile. In memory, and not made from taps by each program: that takes longer than products.
    """
    before = block_w - 1 + lead - left_w
    rows = F.pad(weight[:, 0], (before, depth + block_w - 1 - before - weight.shape[3]))
    return rows.unfold(2, depth, 1).contiguous()


def _block(width: int) -> int:
    """Columns of a tile: a power of two, not less than 16, which is the least that tensor cores take."""
    return min(max(triton.next_power_of_2(width), 16), 64)


def applies(x: torch.Tensor, depthwise: bool) -> bool:
    """Whether these kernels can take a convolution of x: depthwise, 2D, not float64, on tensor cores or interpreted.

    The transforms of torch.func would not see through them.
    """
    if not depthwise or x.ndim != 4 or x.dtype not in _DTYPES or is_transformed():
        return False
    return (_INTERPRETED and x.device.type == 'cpu') or has_tensor_cores(x.device)


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
    return _Correlate.apply(x, weight.to(x.dtype), bias, list(left))


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the memory format of x, channels_last or contiguous."""
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _transpose(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Copies x to y, of which one is channels_last and the other contiguous; torch's own copy takes longer."""
    batch, channels, height, width = x.shape
    rows, cols = (channels, height * width) if x.is_contiguous() else (height * width, channels)
    tiles = triton.cdiv(rows, 64), triton.cdiv(cols, 64)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _transpose_kernel[(batch * tiles[0] * tiles[1],)](x, y, rows, cols, *tiles, BLOCK_R=64, BLOCK_C=64)
    return y


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    if not is_channels_last(x):
        return x.contiguous()
    return _transpose(x, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _launch_correlate(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], left: Sequence[int]
) -> torch.Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = _correlate_blocks(batch, width, weight.shape[3], left[1], x.dtype)
    tiles = [triton.cdiv(n, blocks[f'BLOCK_{axis}']) for n, axis in ((batch, 'B'), (height, 'H'), (width, 'W'))]
    bands = _bands(weight, blocks['LEAD'], left[1], blocks['BLOCK_W'], blocks['DEPTH'])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _correlate_kernel[(channels * tiles[0] * tiles[1] * tiles[2],)](
            _contiguous(x),
            bands,
            bias if bias is None else bias.contiguous(),
            y,
            batch,
            channels,
            height,
            weight.shape[2],
            left[0],
            *tiles,
            HAS_BIAS=bias is not None,
            **blocks,
        )
    return _transpose(y, _like(x)) if is_channels_last(x) else y


def _launch_weight_grad(x: torch.Tensor, grad: torch.Tensor, taps: Sequence[int], left: Sequence[int]) -> torch.Tensor:
    batch, channels, height, width = x.shape
    blocks = _weight_grad_blocks(width, left[1], x.dtype)
    block = blocks['BLOCK_I']
    columns = width if width <= block else blocks['LEAD'] - left[1] + block - 1 + taps[1]
    tiles = triton.cdiv(columns, block), triton.cdiv(taps[0], blocks['BLOCK_T'])
    # a column of products has each tap once: no two products meet in one entry
    out = torch.zeros(channels, taps[0], block, taps[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _weight_grad_kernel[(channels * tiles[0] * tiles[1],)](
            _contiguous(x),
            _contiguous(grad),
            out,
            batch,
            channels,
            height,
            *taps,
            *left,
            *tiles,
            **blocks,
        )
    return out.sum(2).unsqueeze(1).to(x.dtype)


# operators of their own, so that torch.compile leaves them whole
_correlate_op = torch.library.custom_op('timm_smpconv::toeplitz_correlate', _launch_correlate, mutates_args=())
_weight_grad_op = torch.library.custom_op('timm_smpconv::toeplitz_weight_grad', _launch_weight_grad, mutates_args=())


@_correlate_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], left: List[int]) -> torch.Tensor:
    return _like(x)


@_weight_grad_op.register_fake
def _(x: torch.Tensor, grad: torch.Tensor, taps: List[int], left: List[int]) -> torch.Tensor:
    return x.new_empty(x.shape[1], 1, *taps)


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left: List[int]):
        ctx.save_for_backward(x, weight)
        ctx.left, ctx.bias_dtype = left, None if bias is None else bias.dtype
        # elsewhere without the dispatcher, which takes longer than a small convolution
        launch = _correlate_op if torch.compiler.is_compiling() else _launch_correlate
        return launch(x, weight, bias, left)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        taps = list(weight.shape[2:])
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            right = [k - 1 - p for k, p in zip(taps, ctx.left)]
            grad_x = _Correlate.apply(grad, weight.flip(2, 3), None, right)
        if ctx.needs_input_grad[1]:
            grad_w = _WeightGrad.apply(x, grad, taps, ctx.left)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_w, grad_bias, None


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad, taps: List[int], left: List[int]):
        ctx.save_for_backward(x, grad)
        ctx.left = left
        launch = _weight_grad_op if torch.compiler.is_compiling() else _launch_weight_grad
        return launch(x, grad, taps, left)

    @staticmethod
    def backward(ctx, grad_w):
        # linear in both maps: what meets it in a second backward pass takes the weight's place
        x, grad = ctx.saved_tensors
        grad_x = grad_grad = None
        if ctx.needs_input_grad[0]:
            right = [k - 1 - p for k, p in zip(grad_w.shape[2:], ctx.left)]
            grad_x = _Correlate.apply(grad, grad_w.flip(2, 3), None, right)
        if ctx.needs_input_grad[1]:
            grad_grad = _Correlate.apply(x, grad_w, None, ctx.left)
        return grad_x, grad_grad, None, None
