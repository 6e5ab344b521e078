"""Direct convolution: torch's own, in the memory format and with the gradients in which it is fast."""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .context import Keep, full_precision, is_channels_last, is_trained, is_transformed

__all__ = ['MULTIPLIES_BFLOAT16', 'correlate']

_MANY_TAPS = 100  # from which depthwise convolutions in half precision are faster in float32, conversions included
# with AVX-512, torch on contiguous maps takes less time up to so many columns of taps than on channels_last ones and
# for copies into that format, and takes two to three times as long on channels_last ones for 11 or 13 columns as for 15
_FEW_COLUMNS, _SLOW_WIDTHS, _FAST_WIDTH = 13, (11, 13), 15
_AVX512 = torch.backends.cpu.get_cpu_capability() == 'AVX512'
# with AMX, a convolution of sequences in bfloat16 came out wrong, most of it zeros (torch 2.11; 2 channels, 64 taps)
_AMX = getattr(torch.cpu, '_is_amx_tile_supported', lambda: True)()
MULTIPLIES_BFLOAT16 = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()  # not by way of float32


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """See `fft.correlate` for the arguments; depthwise sequences come as maps of one row."""
    if x.ndim == 3:
        if _AMX and x.device.type == 'cpu' and x.dtype == torch.bfloat16:
            with full_precision(x):
                bias = None if bias is None else bias.float()
                return correlate(x.float(), weight.float(), bias, left, depthwise).to(x.dtype)
        padding = (left[0], weight.shape[2] - 1 - left[0])
        if is_channels_last(x):  # a format of maps
            return F.conv2d(F.pad(x.unsqueeze(2), padding), weight.unsqueeze(2), bias).squeeze(2)
        return F.conv1d(F.pad(x, padding), weight, bias)
    right = [k - 1 - p for k, p in zip(weight.shape[2:], left)]
    if not depthwise or x.device.type != 'cpu':
        x, padding = _pad(x, left, right)
        return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1] if depthwise else 1)
    if is_trained(x, weight):
        y = _Depthwise.apply(x, weight, left, right)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    return _depthwise(x, weight, left, right, bias)


def _depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    left: Sequence[int],
    right: Sequence[int],
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Depthwise convolution of a map with zeros before its rows and columns (left) and behind them (right)."""
    # half precision is slow with many taps, which are multiplied in pairs with zeros, and in float16, and bfloat16
    # hangs except for whole vectors of channels (torch 2.15)
    if x.dtype in (torch.float16, torch.bfloat16) and (
        x.dtype == torch.float16
        or x.shape[1] % 32
        or weight.shape[2] * weight.shape[3] >= _MANY_TAPS
        or (_AMX and x.shape[2] == 1)  # a sequence
    ):
        with full_precision(x):  # autocast would undo it
            bias = None if bias is None else bias.float()
            return _depthwise(x.float(), weight.float(), left, right, bias).to(x.dtype)
    if not is_transformed() and not _is_fast_contiguous(x, weight):
        # torch is some twenty times faster than on contiguous maps
        x = x.contiguous(memory_format=torch.channels_last)
        if _AVX512 and x.dtype == torch.float32 and weight.shape[3] in _SLOW_WIDTHS:
            zeros = (_FAST_WIDTH - weight.shape[3]) // 2
            weight = F.pad(weight, (zeros, zeros))
            left, right = (left[0], left[1] + zeros), (right[0], right[1] + zeros)
    x, padding = _pad(x, left, right)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def _is_fast_contiguous(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not _AVX512 or x.dtype != torch.float32 or weight.shape[3] > _FEW_COLUMNS:
        return False
    return not torch.compiler.is_compiling() and x.is_contiguous()  # in a backward pass torch 2.6 cannot compile that


def _pad(x: torch.Tensor, left: Sequence[int], right: Sequence[int]) -> Tuple[torch.Tensor, List[int]]:
    """Leaves to torch as many zeros as are on both sides: what is returned beside a map with the others."""
    both = [min(before, behind) for before, behind in zip(left, right)]
    others = []
    for before, behind, number in zip(reversed(left), reversed(right), reversed(both)):
        others += [before - number, behind - number]
    return (F.pad(x, others) if any(others) else x), both


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution whose gradients are depthwise convolutions too: torch's own are slow for large kernels."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, left: Sequence[int], right: Sequence[int]):
        ctx.save_for_backward(x, weight)
        ctx.padding = left, right
        return _depthwise(x, weight, left, right)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_w = None
        with full_precision(grad):  # a backward pass may be called within autocast
            if ctx.needs_input_grad[0]:
                padding = [[k - 1 - p for k, p in zip(weight.shape[2:], side)] for side in ctx.padding]
                grad_x = _differentiable(grad, weight.flip(2, 3), *padding)
            if ctx.needs_input_grad[1]:
                if torch.compiler.is_compiling():  # which would spell the loop out
                    return grad_x, _weight_grad_at_once(x, grad, weight, *ctx.padding), None, None
                # the map of gradients is the kernel; one image at a time beats batch * channels groups
                total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                for image, kernel in zip(x.to(total.dtype).split(1), grad.to(total.dtype).unbind()):
                    total += _differentiable(image, kernel.unsqueeze(1), *ctx.padding).permute(1, 0, 2, 3)
                grad_w = total.to(weight.dtype)
        return grad_x, grad_w, None, None


def _differentiable(x: torch.Tensor, weight: torch.Tensor, left: Sequence[int], right: Sequence[int]) -> torch.Tensor:
    return (_Depthwise.apply if is_trained(x, weight) else _depthwise)(x, weight, left, right)


def _weight_grad_at_once(
    x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, left: Sequence[int], right: Sequence[int]
) -> torch.Tensor:
    """Gradient of a depthwise kernel by one convolution of batch * channels groups."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    images, maps = x.to(dtype).flatten(0, 1).unsqueeze(0), grad.to(dtype).flatten(0, 1).unsqueeze(1)
    images, padding = _pad(images, left, right)
    each = F.conv2d(images, maps, padding=padding, groups=maps.shape[0])[0].unflatten(0, x.shape[:2])
    return each.sum(0).unsqueeze(1).to(weight.dtype)
