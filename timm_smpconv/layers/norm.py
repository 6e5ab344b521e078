"""Batch norms, and how they fold into the convolutions beside them."""

from typing import Optional, Tuple

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.models import register_notrace_module
from torch import nn
from torch.nn.utils import skip_init
from torchvision.ops.misc import FrozenBatchNorm2d

from ..ops.context import to_float64
from .folding import compute_weights, like_module

__all__ = [
    'NORMS',
    'NORMS_WITH_ACT',
    'AffineNorm',
    'SequenceNorm',
    'can_take_norm',
    'fold_norm_into_next',
    'fold_norm_into_previous',
    'is_foldable',
    'norm_to_conv',
]


class SequenceNorm(nn.BatchNorm1d):
    """An nn.BatchNorm1d that takes maps too, as which it is faster in training on a GPU."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2 or input.dim() > 4:
            raise ValueError(f'Expected (B, C), (B, C, L) or (B, C, H, W), got {input.dim()} dimensions.')


@register_notrace_module
class AffineNorm(nn.BatchNorm2d):
    """A batch norm with nothing next to it to fold into: deploys as a depthwise 1x1 convolution."""

    def fuse(self) -> nn.Module:
        """The equivalent convolution."""
        return norm_to_conv(self)


# what timm makes of batch norms: synchronised between processes (convert_sync_batchnorm), frozen (freeze)
NORMS = (nn.BatchNorm1d, SequenceNorm, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
NORMS_WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that, in eval mode, is a scale and a shift of each channel and nothing else."""
    return isinstance(norm, NORMS) and not isinstance(norm, NORMS_WITH_ACT) and norm.running_var is not None


def _scale_shift(norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a batch norm in eval mode, in float64 so that folding adds no rounding of its own.

    Raises:
        RuntimeError: It has no running statistics.
    """
    if norm.running_var is None:
        raise RuntimeError(f'Only batch norms with running statistics can be folded into a convolution, got {norm}.')
    compute_weights(norm)
    scale = (to_float64(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = to_float64(norm.weight) * scale
    shift = -to_float64(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + to_float64(norm.bias)


def fold_norm_into_previous(
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    norm: nn.Module,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias (float64) of norm(conv(x)) for a convolution with the given weight (O, ...) and bias (O,)."""
    scale, shift = _scale_shift(norm)
    if bias is not None:
        shift = shift + to_float64(bias) * scale
    # in place: the kernel of a long sequence takes 100 MB
    exact = to_float64(weight) if weight.dtype != torch.float64 else weight.clone()
    return exact.mul_(scale.reshape(-1, *[1] * (weight.ndim - 1))), shift


def fold_norm_into_next(norm: nn.Module, conv: nn.Module) -> None:
    """Folds a norm into the 1x1 convolution with a bias that follows it, in place; trainable if one of them is.

    Raises:
        RuntimeError: Its weight or bias is computed in each call (parametrizations, pruning), or it has no bias.
    """
    if not can_take_norm(conv):
        raise RuntimeError(
            f'A norm can only be folded into a convolution with a weight and bias of its own, got {conv}.'
        )
    scale, shift = _scale_shift(norm)
    weight = to_float64(conv.weight.data)
    conv.bias.data = (to_float64(conv.bias.data) + weight.flatten(1) @ shift).to(conv.weight)
    conv.weight.data = (weight * scale.reshape(1, -1, *[1] * (weight.ndim - 2))).to(conv.weight)
    if any(p.requires_grad for p in norm.parameters()):
        conv.requires_grad_(True)


def can_take_norm(conv: nn.Module) -> bool:
    """Whether a norm before it can be folded into a convolution: it has a weight and a bias, which nothing computes."""
    return all(conv._parameters.get(name) is not None for name in ('weight', 'bias'))


def norm_to_conv(norm: nn.Module) -> nn.Module:
    """A batch norm of maps as a depthwise 1x1 convolution."""
    scale, shift = _scale_shift(norm)
    like = norm.running_var if norm.weight is None else norm.weight
    channels = len(scale)
    conv = skip_init(nn.Conv2d, channels, channels, 1, groups=channels, device=like.device, dtype=like.dtype)
    conv.weight.data, conv.bias.data = scale.to(like).reshape(-1, 1, 1, 1), shift.to(like)
    return like_module(conv, norm)
