"""Convolutions of torch.nn that go through `ops`: what deployed networks consist of, and what others can be made of."""

from typing import Any, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, to_ntuple
from timm.models import register_notrace_module
from torch import nn

from .. import ops
from ..ops.context import in_format, is_channels_last, is_exporting, is_part_of_channels_last
from .cache import DropsCaches, KernelCache, ValueCache, wants_gradients
from .geometry import check_geometry, check_groups, check_same, check_size, fits_groups, is_same, same_geometry

__all__ = ['CausalConv1d', 'LargeConv1d', 'LargeConv2d', 'PointwiseConv2d', 'convert_large_convs']

_LONG = 64  # taps from which it pays to look for zeros


class _LargeConv(DropsCaches):
    """A convolution of torch.nn, dense or depthwise, with outputs as large as its inputs, that goes through `ops`.

    Attributes:
        keeps_format: Outputs have the memory format that torch gives them, as other code may rely on; else that in
            which they have come.
    """

    keeps_format = False

    def __init__(self, in_chs: int, out_chs: int, kernel_size: Tuple[int, ...], **settings: Any):
        super().__init__(in_chs, out_chs, kernel_size, **settings)
        self._kept = KernelCache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, *spatial) -> (B, out_chs, *spatial), as torch's without B too; so do all layers here."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return self._convolve(x)

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # once: a parametrization computes it anew each time
        if not is_same(self):  # code can change attributes
            return self._conv_forward(x, weight, self.bias)
        if self.keeps_format and is_part_of_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        y = self._same(x, weight, self._kept.keep(weight))
        if not self.keeps_format or is_exporting():
            return y
        return in_format(y, x.ndim == 4 and is_channels_last(x))  # torch's is of batches of maps alone

    @torch.jit.unused
    def _same(self, x: torch.Tensor, weight: torch.Tensor, keep: Any) -> torch.Tensor:
        raise NotImplementedError


@register_notrace_module
class LargeConv2d(_LargeConv, nn.Conv2d):
    """An nn.Conv2d, dense or depthwise, with outputs as large as its inputs, that convolves through `ops`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Tuple[int, int]],
        stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[int, str, Tuple[int, int], None] = None,
        dilation: Union[int, Tuple[int, int]] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps, odd; one number or (height, width).
            stride, padding: As for nn.Conv2d, for code that makes another convolution like this one (adapters): 1 and
                dilation * (k // 2) (None and 'same' too).
            dilation: Distance of neighbouring taps; one number or (rows, columns).
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.

        Raises:
            ValueError: An even kernel size, channels that do not fit, a dilation below 1, or another stride or padding.
        """
        size = to_2tuple(kernel_size)
        check_same(in_chs, out_chs, size, groups, 2)
        geometry = same_geometry(self, size, stride, padding, dilation)
        super().__init__(in_chs, out_chs, size, **geometry, groups=groups, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def _same(self, x: torch.Tensor, weight: torch.Tensor, keep: Any) -> torch.Tensor:
        convolve = ops.conv2d if self.groups == 1 else ops.depthwise_conv2d
        return convolve(x, weight, self.bias, self.dilation, keep)


@register_notrace_module
class LargeConv1d(_LargeConv, nn.Conv1d):
    """An nn.Conv1d, dense or depthwise, with outputs as long as its inputs, that convolves through `ops`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Tuple[int]],
        stride: Union[int, Tuple[int]] = 1,
        padding: Union[int, str, Tuple[int], None] = None,
        dilation: Union[int, Tuple[int]] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps, odd.
            stride, padding, dilation: As for nn.Conv1d, for code that makes another convolution like this one
                (adapters): 1, k // 2 (None and 'same' too) and 1.
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.

        Raises:
            ValueError: An even kernel size, channels that do not fit, or another stride, padding or dilation.
        """
        size = to_ntuple(1)(kernel_size)
        check_same(in_chs, out_chs, size, groups, 1)
        check_geometry(self, dilation=(dilation, (1,)))
        geometry = same_geometry(self, size, stride, padding, 1)
        super().__init__(in_chs, out_chs, size, **geometry, groups=groups, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def _same(self, x: torch.Tensor, weight: torch.Tensor, keep: Any) -> torch.Tensor:
        convolve = ops.conv1d if self.groups == 1 else ops.depthwise_conv1d
        return convolve(x, weight, self.bias, keep)


@register_notrace_module
class CausalConv1d(DropsCaches, nn.Conv1d):
    """An nn.Conv1d, dense or depthwise, whose output t sees inputs <= t; it convolves through `ops`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Tuple[int]],
        stride: Union[int, Tuple[int]] = 1,
        padding: Union[int, Tuple[int]] = 0,
        dilation: Union[int, Tuple[int]] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps; the last one multiplies the present sample.
            stride, padding, dilation: As for nn.Conv1d, for code that makes another convolution like this one
                (adapters): 1, 0 and 1. Zeros before the sequence are always there.
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.

        Raises:
            ValueError: A size or channels that do not fit, or another stride, padding or dilation.
        """
        size = to_ntuple(1)(kernel_size)
        check_size(size, 1)
        check_geometry(self, stride=(stride, (1,)), padding=(padding, (0,)), dilation=(dilation, (1,)))
        check_groups(in_chs, out_chs, groups)
        super().__init__(in_chs, out_chs, size, groups=groups, bias=bias, device=device, dtype=dtype)
        self._kept = KernelCache()
        self._num_unreached: Optional[int] = None  # leading taps that were zero when last looked at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, L) -> (B, out_chs, L)."""
        if torch.jit.is_scripting():
            if self.groups == 1:
                return ops.causal_conv1d(x, self.weight, self.bias)
            return ops.depthwise_causal_conv1d(x, self.weight, self.bias)
        return self._convolve(x)

    @torch.jit.unused
    def is_causal(self) -> bool:
        """Whether it still is: code can change attributes."""
        stride, padding, dilation = (to_ntuple(1)(value) for value in (self.stride, self.padding, self.dilation))
        return (stride, padding, dilation, self.padding_mode) == ((1,), (0,), (1,), 'zeros')

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_causal():
            raise ValueError(
                f'CausalConv1d has stride 1, padding 0 and dilation 1 with zeros, which have been changed to '
                f'{self.stride}, {self.padding} and {self.dilation} with {self.padding_mode}: torch.nn has layers for '
                f'others.'
            )
        weight = self._reached_taps()
        convolve = ops.causal_conv1d if self.groups == 1 else ops.depthwise_causal_conv1d
        return convolve(x, weight, self.bias, self._kept.keep(weight))

    @torch.jit.unused
    def _reached_taps(self) -> torch.Tensor:
        """The weight, in inference without the leading taps that no point reached when it was rendered."""
        weight = self.weight
        if not ValueCache.usable((weight,)) or weight.shape[2] < _LONG or wants_gradients((weight,)):
            return weight
        count = self._num_unreached
        # a hint that is checked: maxima are several times faster than abs or any, and over everything than for each tap
        known = count is not None and count < weight.shape[2]  # it may have been replaced by a shorter one
        if not known or (count and not weight[..., :count].amax() == weight[..., :count].amin() == 0):
            reached = (weight.amax((0, 1)) != 0) | (weight.amin((0, 1)) != 0)
            count = int(reached.to(torch.uint8).argmax())
            count = self._num_unreached = count - count % 2  # pairs of taps are faster to compare
        return weight[..., count:]


@register_notrace_module
class PointwiseConv2d(nn.Conv2d):
    """An nn.Conv2d of 1 x 1 that is a matrix product on a GPU in channels_last.

    The product adds the bias by itself; torch's convolution on a GPU passes over the result once more for it.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Tuple[int, int]] = 1,
        stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[int, Tuple[int, int]] = 0,
        dilation: Union[int, Tuple[int, int]] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size, stride, padding, dilation, groups: As for nn.Conv2d, for code that makes another convolution
                like this one (adapters): 1, 1, 0, 1 and 1.
            bias: Add a bias.

        Raises:
            ValueError: Another kernel size, stride, padding, dilation or number of groups.
        """
        if to_2tuple(kernel_size) != (1, 1) or groups != 1:
            raise ValueError(
                f'PointwiseConv2d has 1 x 1 taps and one group, got {kernel_size} and {groups}: torch.nn has layers '
                f'for others.'
            )
        check_geometry(self, stride=(stride, (1, 1)), padding=(padding, (0, 0)), dilation=(dilation, (1, 1)))
        super().__init__(in_chs, out_chs, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H, W)."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return self._convolve(x)

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        is_product = self.stride == (1, 1) and self.padding == (0, 0)  # code can change attributes
        if is_product and x.device.type == 'cuda' and not is_exporting() and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, self.bias)


_LARGE = {nn.Conv1d: LargeConv1d, nn.Conv2d: LargeConv2d}


def convert_large_convs(module: nn.Module, min_size: int = 7) -> nn.Module:
    """Makes the large convolutions of any network convolve through `ops`, as `LargeConv1d` and `LargeConv2d`, in place.

    They stay the objects that they are, with their parameters, hooks and names in the state dict, and make outputs in
    the memory format of the inputs. Call it before or after weights are loaded and an optimizer is made; before
    torch.compile, and after torch.fx has traced the network or quantisation (torch.ao) has changed it, which do not
    know these classes.

    Converted are modules of the classes nn.Conv1d and nn.Conv2d themselves, dense or depthwise, with odd kernels,
    strides of 1, zeros for padding that make outputs as large as the inputs, and in 1D no dilation. All others stay as
    they are.

    Args:
        module: A network, or a convolution.
        min_size: Taps, in the longer dimension of a kernel, from which to convert.

    Returns:
        The module.
    """
    for conv in module.modules():
        # a forward of its own may have wrapped that of the class
        if type(conv) not in _LARGE or 'forward' in vars(conv) or not conv.weight.is_floating_point():
            continue
        fits = all(k % 2 for k in conv.kernel_size) and fits_groups(conv.in_channels, conv.out_channels, conv.groups)
        if fits and max(conv.kernel_size) >= min_size and is_same(conv):
            conv.__class__, conv._kept, conv.keeps_format = _LARGE[type(conv)], KernelCache(), True
    return module
