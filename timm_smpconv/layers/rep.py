"""Blocks that train as several linear operations and deploy as one."""

from typing import Any, Dict, Hashable, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, to_2tuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn.utils import skip_init

from ..ops.context import is_exporting, is_transformed
from .cache import DropsCaches, ValueCache, wants_gradients
from .conv import SMPConv1d, SMPConv2d
from .folding import check_part, like_module
from .geometry import is_same
from .kernel import SMPKernel, with_all_taps
from .large import CausalConv1d, LargeConv2d, PointwiseConv2d, convert_large_convs
from .norm import NORMS, NORMS_WITH_ACT, SequenceNorm, fold_norm_into_previous, is_foldable
from .plain import is_plain

__all__ = ['ConvNorm', 'RepSMPConv1d', 'RepSMPConv2d']

_KERNEL_ARGS = ('num_points', 'radius', 'coord_std', 'learn_coords', 'learn_radius')


class ConvNorm(ConvNormAct):
    """timm's ConvNormAct that deploys as a convolution with a bias, followed by the activation."""

    def reparameterize(self) -> None:
        """Folds the batch norm into the convolution, in place; does nothing the second time.

        Raises:
            RuntimeError: Its convolution has been replaced by something else.
        """
        if not isinstance(self.bn, NORMS_WITH_ACT):
            return
        check_part(self, self.conv, nn.Conv2d)
        known = (nn.Conv2d.forward, PointwiseConv2d.forward, LargeConv2d.forward)
        if type(self.conv).forward not in known:  # it pads or quantises too
            raise RuntimeError(
                f'ConvNorm cannot be reparameterized: its convolution is a {type(self.conv).__name__}, which does more '
                f'than convolve. Put a Conv2d in its place.'
            )
        old, norm = self.conv, self.bn
        weight, bias = fold_norm_into_previous(old.weight.data, None if old.bias is None else old.bias.data, norm)
        dd = dict(device=old.weight.device, dtype=old.weight.dtype)
        settings = dict(stride=old.stride, padding=old.padding, dilation=old.dilation, groups=old.groups)
        pointwise = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
        make: Type[nn.Conv2d] = PointwiseConv2d
        if old.kernel_size != (1, 1) or settings != pointwise:
            make, settings['padding_mode'] = nn.Conv2d, old.padding_mode
        conv = skip_init(make, old.in_channels, old.out_channels, old.kernel_size, **settings, **dd)
        conv.weight.data, conv.bias.data = weight.to(old.weight), bias.to(old.weight)
        if isinstance(old, LargeConv2d):
            convert_large_convs(conv, min_size=1)
            conv.keeps_format = old.keeps_format
        self.conv, self.bn = like_module(conv, self), norm.act


class _RepSMPConv(DropsCaches):
    """norm(large(x)) + norm(small(x)): the two-branch block of section 3.4, one convolution once deployed.

    In eval mode, where no gradient of a parameter is wanted, it already computes as one, folded anew when a parameter
    or statistic has changed; unless a part of it has been replaced, is observed by hooks or is in train mode.
    """

    input_ndim: int  # batch and channels included

    def __init__(
        self,
        large: Union[SMPConv1d, SMPConv2d],
        small: Union[CausalConv1d, LargeConv2d],
        norm_layer: Type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        nn.init.trunc_normal_(small.weight, std=0.02)
        if small.bias is not None:
            nn.init.zeros_(small.bias)
        out_chs = small.out_channels
        self.large = large
        self.large_norm = norm_layer(out_chs, device=device, dtype=dtype)
        self.small = small
        self.small_norm = norm_layer(out_chs, device=device, dtype=dtype)
        self._folded = ValueCache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) or, in 1D, (B, in_chs, L), to out_chs channels of the same size; with B, as norms want it.

        Raises:
            ValueError: An input without B.
        """
        if not torch.jit.is_scripting():
            if x.ndim != self.input_ndim:  # batch norms could take channels for samples
                raise ValueError(f'{type(self).__name__} expects a {self.input_ndim}D input, got {tuple(x.shape)}.')
        if not torch.jit.is_scripting() and not self.training:
            if self._is_foldable():
                tensors = self._tensors()
                if ValueCache.usable(tensors) and not wants_gradients(tensors) and is_plain(self):
                    return self._folded.get(tensors, self._fold_reached, self._settings())(x)
        large, small = self.large(x), self.small(x)
        if not torch.jit.is_scripting() and self._is_faster_as_map(large):
            return self._norm_as_map(large, small)
        return self.large_norm(large) + self.small_norm(small)

    @torch.jit.unused
    def _is_faster_as_map(self, y: torch.Tensor) -> bool:
        """Whether this is a batch of sequences whose statistics are wanted on a GPU.

        There torch gives each channel of (B, C, L) to one block, so that 30 channels leave most of it idle; the kernels
        for channels_last, which sequences lack, share a channel between blocks.
        """
        if not self.training or y.ndim != 3 or y.device.type != 'cuda':
            return False
        if torch.compiler.is_compiling() or is_exporting() or is_transformed():
            return False
        return all(type(norm) in (SequenceNorm, nn.SyncBatchNorm) for norm in (self.large_norm, self.small_norm))

    @torch.jit.unused
    def _norm_as_map(self, large: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        """What forward computes of (B, C, L), as maps of one row in channels_last."""
        large, small = _to_channels_last(large.unsqueeze(2)), _to_channels_last(small.unsqueeze(2))
        y = self.large_norm(large) + self.small_norm(small)
        if y.requires_grad:  # gradients of convolutions come as sequences, with which the norms would be slow again
            y.register_hook(_to_channels_last)
        return y.squeeze(2)

    @torch.jit.unused
    def _is_foldable(self) -> bool:
        """Whether all parts are those that folding knows: neither wrapped nor replaced nor parametrized."""
        return (
            type(self.large) in (SMPConv1d, SMPConv2d)
            and type(self.large.kernel) is SMPKernel
            and type(self.small) in (CausalConv1d, LargeConv2d)
            and self._is_small_same()
            and all(type(norm) in NORMS and is_foldable(norm) for norm in (self.large_norm, self.small_norm))
        )

    @torch.jit.unused
    def _is_small_same(self) -> bool:
        kernel, small = self.large.kernel, self.small
        if (small.out_channels, small.in_channels // small.groups) != (kernel.out_chs, kernel.in_chs):
            return False
        if isinstance(self.small, CausalConv1d):
            return self.large.causal and self.small.is_causal()
        return is_same(self.small) and to_2tuple(self.small.dilation) == to_2tuple(self.large.dilation)

    @torch.jit.unused
    def _tensors(self) -> Tuple[Optional[torch.Tensor], ...]:
        """All tensors that the folded convolution depends on."""
        # not parameters(), which sharded modules lack
        tensors = [*self.large.kernel.tensors(), self.large.bias, self.small.weight, self.small.bias]
        for norm in (self.large_norm, self.small_norm):
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return tuple(tensors)

    @torch.jit.unused
    def _settings(self) -> Hashable:
        """All else that it depends on."""
        dilation = to_2tuple(self.large.dilation)
        return self.large.kernel.settings(), dilation, self.large_norm.eps, self.small_norm.eps

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The equivalent plain convolution with a bias: points rendered, norms and small branch folded in.

        Raises:
            RuntimeError: The block has norms that are no batch norms with running statistics, or something else in the
                place of a convolution.
        """
        check_part(self, self.large, SMPConv1d, SMPConv2d)
        check_part(self, self.small, CausalConv1d, LargeConv2d)
        for norm in (self.large_norm, self.small_norm):
            if not is_foldable(norm):
                raise RuntimeError(
                    f'{type(self).__name__} cannot be reparameterized: its norms must be batch norms with running '
                    f'statistics to be folded into a convolution, got {norm}.'
                )
        if not self._is_small_same():
            raise RuntimeError(
                f'{type(self).__name__} cannot be reparameterized: its small convolution must pad with zeros to the '
                f'same size, with filters of {self.large.kernel.in_chs} channels, with the dilation of the large one, '
                f'{self.large.dilation}, and be causal only if that is, got {self.small}.'
            )
        with torch.no_grad():
            weight, bias = self._fold(self.large.render_kernel())
            return like_module(self.large.to_conv(with_all_taps(weight, self.large.kernel), bias), self)

    @torch.jit.unused
    def _fold_reached(self) -> nn.Module:
        # causal kernels without the leading taps that no point reaches: less to fold and to convolve
        return self.large.to_conv(*self._fold(self.large.kernel.render_reached())).requires_grad_(False)

    @torch.jit.unused
    def _fold(self, kernel: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the sum of both branches; of the large kernel leading taps may be missing."""
        weight, bias = fold_norm_into_previous(kernel, self.large.bias, self.large_norm)
        small, small_bias = fold_norm_into_previous(self.small.weight, self.small.bias, self.small_norm)
        total = _add_small(weight, small, causal=kernel.ndim == 3)
        return total.to(kernel), bias + small_bias


def _check_kernel_args(block: nn.Module, kernel_args: Dict[str, Any]) -> None:
    strange = [name for name in kernel_args if name not in _KERNEL_ARGS]
    if strange:
        raise TypeError(
            f'{type(block).__name__} takes no {", ".join(strange)}: of the arguments of its large convolution it takes '
            f'{", ".join(_KERNEL_ARGS)}. For other convolutions use SMPConv1d or SMPConv2d.'
        )


def _to_channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _add_small(large: torch.Tensor, small: torch.Tensor, causal: bool) -> torch.Tensor:
    """Sum of two kernels, aligned at their centres or, if causal, at the present (last) tap. May change `large`."""
    pad, window = [], []
    for k, n in zip(small.shape[2:], large.shape[2:]):
        # a large kernel may have fewer taps than the small one (a network built for short sequences)
        more = max(k - n, 0)
        pad = ([more, 0] if causal else [more // 2] * 2) + pad
        first = n + more - k if causal else (n + more - k) // 2
        window.append(slice(first, first + k))
    total = F.pad(large, pad) if any(pad) else large
    total[(..., *window)] += small
    return total


@register_notrace_module
class RepSMPConv2d(_RepSMPConv):
    """BN(large SMPConv2d) + BN(small convolution), dense or depthwise."""

    input_ndim = 4

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        small_kernel_size: int = 5,
        groups: int = 1,
        small_bias: bool = False,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        dilation: int = 1,
        device=None,
        dtype=None,
        **kernel_args,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps of the large branch in each dimension, odd.
            small_kernel_size: Taps of the small branch in each dimension, odd.
            groups: 1 for dense convolutions, in_chs = out_chs for depthwise ones.
            small_bias: Bias in the small branch.
            norm_layer: Batch norm.
            dilation: Distance of neighbouring taps, of both branches.
            **kernel_args: num_points, radius, coord_std, learn_coords, learn_radius of SMPConv2d.

        Raises:
            TypeError: Other arguments.
        """
        _check_kernel_args(self, kernel_args)
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SMPConv2d(in_chs, out_chs, kernel_size, dilation=dilation, groups=groups, bias=False, **kernel_args, **dd),
            LargeConv2d(in_chs, out_chs, small_kernel_size, dilation=dilation, groups=groups, bias=small_bias, **dd),
            norm_layer,
            **dd,
        )


@register_notrace_module
class RepSMPConv1d(_RepSMPConv):
    """BN(large SMPConv1d) + BN(small causal convolution)."""

    input_ndim = 3

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        small_kernel_size: int = 5,
        large_bias: bool = False,
        norm_layer: Type[nn.Module] = SequenceNorm,
        device=None,
        dtype=None,
        **kernel_args,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps of the large branch.
            small_kernel_size: Taps of the small branch.
            large_bias: Bias in the large branch.
            norm_layer: Batch norm.
            **kernel_args: num_points, radius, coord_std, learn_coords, learn_radius of SMPConv1d.

        Raises:
            TypeError: Other arguments.
        """
        _check_kernel_args(self, kernel_args)
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SMPConv1d(in_chs, out_chs, kernel_size, groups=1, bias=large_bias, causal=True, **kernel_args, **dd),
            CausalConv1d(in_chs, out_chs, small_kernel_size, bias=False, **dd),
            norm_layer,
            **dd,
        )
