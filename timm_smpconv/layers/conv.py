"""Drop-in convolution layers: a kernel module renders weights, an op convolves."""

import numbers
from typing import Any, Dict, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, to_ntuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn.utils import skip_init

from .. import ops
from ..ops.context import in_format, is_channels_last, is_exporting, to_float64
from .cache import DropsCaches, KernelCache, ValueCache, wants_gradients
from .folding import compute_weights, like_module
from .kernel import RenderedKernel, SMPKernel, with_all_taps
from .peripheral import PeripheralKernel

__all__ = [
    'CausalConv1d',
    'LargeConv1d',
    'LargeConv2d',
    'PeripheralConv2d',
    'PointwiseConv2d',
    'SMPConv1d',
    'SMPConv2d',
    'convert_large_convs',
]

_LONG = 64  # taps from which it pays to look for zeros


class _LargeConv(DropsCaches):
    """A convolution of torch.nn, dense or depthwise, with outputs as large as its inputs, that goes through `ops`.

    Attributes:
        keeps_format: Outputs have the memory format of the inputs, as other code may rely on; else that in which they
            have come.
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
    def is_same(self) -> bool:
        """Whether it still pads with zeros to the same size, without strides: code can change attributes."""
        return _is_same(self)

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # once: a parametrization computes it anew each time
        if not self.is_same():
            return self._conv_forward(x, weight, self.bias)
        y = self._same(x, weight, self._kept.keep(weight))
        return in_format(y, is_channels_last(x)) if self.keeps_format and not is_exporting() else y

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
        _check_same(in_chs, out_chs, size, groups, 2)
        geometry = _same_geometry(self, size, stride, padding, dilation)
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
        _check_same(in_chs, out_chs, size, groups, 1)
        _check_geometry(self, dilation=(dilation, (1,)))
        geometry = _same_geometry(self, size, stride, padding, 1)
        super().__init__(in_chs, out_chs, size, **geometry, groups=groups, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def _same(self, x: torch.Tensor, weight: torch.Tensor, keep: Any) -> torch.Tensor:
        convolve = ops.conv1d if self.groups == 1 else ops.depthwise_conv1d
        return convolve(x, weight, self.bias, keep)


_LARGE = {nn.Conv1d: LargeConv1d, nn.Conv2d: LargeConv2d}


def convert_large_convs(module: nn.Module, min_size: int = 7) -> nn.Module:
    """Makes the large convolutions of any network convolve through `ops`, as `LargeConv1d` and `LargeConv2d`, in place.

    They stay the objects that they are, with their parameters, hooks and names in the state dict, and make outputs in
    the memory format of the inputs: it can be called before or after weights are loaded and an optimizer is made;
    before torch.compile, and behind torch.fx, which cannot trace them. Converted are modules of the classes nn.Conv1d
    and nn.Conv2d themselves, dense or depthwise, with odd kernels, strides of 1, zeros for padding that make outputs as
    large as the inputs, and in 1D no dilation. All others stay as they are.

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
        fits = all(k % 2 for k in conv.kernel_size) and _fits_groups(conv.in_channels, conv.out_channels, conv.groups)
        if fits and max(conv.kernel_size) >= min_size and _is_same(conv):
            conv.__class__, conv._kept, conv.keeps_format = _LARGE[type(conv)], KernelCache(), True
    return module


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
        _check_geometry(self, stride=(stride, (1, 1)), padding=(padding, (0, 0)), dilation=(dilation, (1, 1)))
        super().__init__(in_chs, out_chs, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H, W)."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return self._convolve(x)

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        is_same = self.stride == (1, 1) and self.padding == (0, 0)  # code can change attributes
        if is_same and x.device.type == 'cuda' and not is_exporting() and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, self.bias)


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
        _check_size(size, 1)
        _check_geometry(self, stride=(stride, (1,)), padding=(padding, (0,)), dilation=(dilation, (1,)))
        _check_groups(in_chs, out_chs, groups)
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
        now = self.stride, self.padding, self.dilation, self.padding_mode
        return now == ((1,), (0,), (1,), 'zeros')

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_causal():
            raise ValueError(
                f'CausalConv1d has stride 1, padding 0 and dilation 1, got {self}, changed since: torch.nn has layers '
                f'for others.'
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
        if count is None or (count and not weight[..., :count].amax() == weight[..., :count].amin() == 0):
            reached = (weight.amax((0, 1)) != 0) | (weight.amin((0, 1)) != 0)
            count = int(reached.to(torch.uint8).argmax())
            count = self._num_unreached = count - count % 2  # pairs of taps are faster to compare
        return weight[..., count:]


class _RenderedConv(DropsCaches):
    """A convolution through `ops` with the kernel that a module renders, and perhaps a bias."""

    depthwise = False

    def __init__(self, kernel: RenderedKernel, bias: bool, device=None, dtype=None):
        """
        Args:
            kernel: Renders the weight.
            bias: Add a bias.
        """
        super().__init__()
        self.kernel = kernel
        self.bias = nn.Parameter(torch.empty(kernel.out_chs, device=device, dtype=dtype)) if bias else None
        self._kept = KernelCache()
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the bias to zero; the kernel has a method of its own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.jit.unused
    def render_kernel(self) -> torch.Tensor:
        """The kernel for a convolution, see `RenderedKernel.for_convolution`."""
        # a wrapper around the kernel (FSDP gathers its shards) has to be called
        return self.kernel.for_convolution() if isinstance(self.kernel, RenderedKernel) else self.kernel()

    @torch.jit.unused
    def _plain(self) -> Type[Union[CausalConv1d, LargeConv1d, LargeConv2d]]:
        """The class with a dense kernel."""
        return LargeConv2d

    @torch.jit.unused
    def to_conv(self, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> nn.Module:
        """The plain convolution of the same shape with a dense kernel, which it keeps, and a copy of a bias."""
        out_chs, in_chs, *taps = weight.shape
        groups = dict(groups=out_chs) if self.depthwise else {}
        dd = dict(device=weight.device, dtype=weight.dtype)
        in_chs = out_chs if self.depthwise else in_chs
        args = dict(dilation=self.dilation, bias=bias is not None, **groups)
        conv = skip_init(self._plain(), in_chs, out_chs, tuple(taps), **args, **dd)
        conv.weight.data = weight
        if bias is not None:
            conv.bias.data = bias.to(weight, copy=True)
        return like_module(conv, self)

    def extra_repr(self) -> str:
        return '' if max(to_2tuple(self.dilation)) == 1 else f'dilation={self.dilation}'

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The equivalent plain convolution, with a dense kernel; `timm.utils.reparameterize_model` puts it in place."""
        compute_weights(self)
        with torch.no_grad():
            weight = self.render_kernel().clone()  # which the layer may keep
            return self.to_conv(with_all_taps(weight, self.kernel.kernel_size), self.bias)


@register_notrace_module
class SMPConv2d(_RenderedConv):
    """2D convolution with a kernel of moving points, with outputs as large as its inputs.

    Depthwise (groups = in_chs = out_chs): points shared by all channels, sums not normalised, k^2 / 4 points of
    radius 4 / k (the ImageNet networks); so is a convolution of a single channel. Dense (groups = 1): points per output
    filter, normalised sums, 16 points of radius 0.12 (the CIFAR network).
    """

    dilation = (1, 1)

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Sequence[int]],
        stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[int, str, Tuple[int, int], None] = None,
        dilation: Union[int, Tuple[int, int]] = 1,
        groups: int = 1,
        bias: bool = True,
        num_points: Optional[int] = None,
        radius: Optional[float] = None,
        coord_std: Optional[float] = None,
        learn_coords: bool = True,
        learn_radius: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps, odd; one number or (height, width).
            stride, padding: As for nn.Conv2d, for code that was written for it: 1 and dilation * (k // 2) (None and
                'same' too).
            dilation: Distance of neighbouring taps; one number or (rows, columns).
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.
            num_points: Points of a filter; None: floor(kh * kw / 4) depthwise, 16 dense.
            radius: Initial radius; None: 4 / k depthwise, 0.12 dense.
            coord_std: Standard deviation of the initial coordinates; None: 0.2 depthwise, 0.05 dense.
            learn_coords: Learn the coordinates.
            learn_radius: Learn the radii.

        Raises:
            ValueError: An even kernel size, channels that do not fit, a value out of range, a dilation below 1, or
                another stride or padding.
        """
        size = to_2tuple(kernel_size)
        _check_same(in_chs, out_chs, size, groups, 2)
        geometry = _same_geometry(self, size, stride, padding, dilation)
        depthwise = _is_depthwise(in_chs, out_chs, groups)
        if depthwise:
            defaults = (max(size[0] * size[1] // 4, 1), min(4 / max(size), 1.0), 0.2)
        else:
            defaults = (16, 0.12, 0.05)
        kernel = SMPKernel(
            1 if depthwise else in_chs,
            out_chs,
            size,
            ndim=2,
            num_points=defaults[0] if num_points is None else num_points,
            radius=defaults[1] if radius is None else radius,
            coord_std=defaults[2] if coord_std is None else coord_std,
            shared_points=depthwise,
            normalize=not depthwise,
            radius_range=(1e-3, 1.0) if depthwise else (1e-4, 1.0),
            learn_coords=learn_coords,
            learn_radius=learn_radius,
            device=device,
            dtype=dtype,
        )
        super().__init__(kernel, bias, device=device, dtype=dtype)
        self.depthwise = depthwise
        self.dilation = geometry['dilation']

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H, W)."""
        kernel = self.kernel.for_convolution() if torch.jit.is_scripting() else self.render_kernel()
        keep = None if torch.jit.is_scripting() else self._kept.keep(kernel)
        if self.depthwise:
            return ops.depthwise_conv2d(x, kernel, self.bias, self.dilation, keep)
        return ops.conv2d(x, kernel, self.bias, self.dilation, keep)


@register_notrace_module
class SMPConv1d(_RenderedConv):
    """1D convolution with a kernel of moving points, causal (output t sees inputs <= t) or centred.

    Points per output filter, normalised sums. The kernel keeps its number of taps whatever the length of the input. The
    paper's are dense and causal (the sequence networks).
    """

    dilation = (1,)
    causal = True

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Sequence[int]],
        stride: Union[int, Tuple[int]] = 1,
        padding: Union[int, str, Tuple[int], None] = None,
        dilation: Union[int, Tuple[int]] = 1,
        groups: int = 1,
        bias: bool = True,
        num_points: int = 30,
        radius: Optional[float] = None,
        coord_std: float = 0.1,
        learn_coords: bool = True,
        learn_radius: bool = True,
        causal: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps: of any parity if causal, the longest memory of the layer; else odd.
            stride, padding, dilation: As for nn.Conv1d, for code that was written for it: 1, None (0 if causal, since
                zeros before the sequence are always there, else k // 2, and 'same') and 1.
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.
            num_points: Points of a filter.
            radius: Initial radius; None: 2 / kernel_size, about the distance of two taps.
            coord_std: Standard deviation of the initial coordinates; if causal before they are stretched from the
                present (+1).
            learn_coords: Learn the coordinates.
            learn_radius: Learn the radii.
            causal: Output t sees inputs <= t; else the kernel is centred on it.

        Raises:
            ValueError: Channels that do not fit, another stride, padding or dilation, or a value out of range.
        """
        size = to_ntuple(1)(kernel_size)
        if causal:
            _check_size(size, 1)
            _check_groups(in_chs, out_chs, groups)
            _check_geometry(self, stride=(stride, (1,)), padding=(0 if padding is None else padding, (0,)))
        else:
            _check_same(in_chs, out_chs, size, groups, 1)
            _same_geometry(self, size, stride, padding, 1)
        _check_geometry(self, dilation=(dilation, (1,)))
        depthwise = _is_depthwise(in_chs, out_chs, groups)
        kernel = SMPKernel(
            1 if depthwise else in_chs,
            out_chs,
            size,
            ndim=1,
            num_points=num_points,
            radius=min(max(2 / size[0], 1e-4), 1.0) if radius is None else radius,
            coord_std=coord_std,
            causal=causal,
            learn_coords=learn_coords,
            learn_radius=learn_radius,
            device=device,
            dtype=dtype,
        )
        super().__init__(kernel, bias, device=device, dtype=dtype)
        self.depthwise, self.causal = depthwise, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, L) -> (B, out_chs, L)."""
        kernel = self.kernel.for_convolution() if torch.jit.is_scripting() else self.render_kernel()
        keep = None if torch.jit.is_scripting() else self._kept.keep(kernel)
        if self.causal and self.depthwise:
            return ops.depthwise_causal_conv1d(x, kernel, self.bias, keep)
        if self.causal:
            return ops.causal_conv1d(x, kernel, self.bias, keep)
        if self.depthwise:
            return ops.depthwise_conv1d(x, kernel, self.bias, keep)
        return ops.conv1d(x, kernel, self.bias, keep)

    def extra_repr(self) -> str:
        return '' if self.causal else 'causal=False'

    @torch.jit.unused
    def _plain(self) -> Type[Union[CausalConv1d, LargeConv1d, LargeConv2d]]:
        return CausalConv1d if self.causal else LargeConv1d


@register_notrace_module
class PeripheralConv2d(_RenderedConv):
    """Peripheral convolution (PeLK): 2D, the outer taps share parameters, with outputs as large as its inputs.

    A positional embedding h of the kernel tells the taps of a cell apart (section 4.2):

        y(p) = bias + sum_q w(q) (x(p + q) + h(q))

    As written, for zeros of the padding too, it adds sum_q w(q) h(q) to the bias of a filter, and deploys as that.
    """

    dilation = (1, 1)

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Sequence[int]],
        stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[int, str, Tuple[int, int], None] = None,
        dilation: Union[int, Tuple[int, int]] = 1,
        groups: int = 1,
        bias: bool = True,
        center_size: int = 5,
        base: int = 2,
        grid: Optional[Sequence[int]] = None,
        small_kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps in each dimension, odd; of two numbers both the same.
            stride, padding: As for nn.Conv2d, for code that was written for it: 1 and dilation * (k // 2) (None and
                'same' too).
            dilation: Distance of neighbouring taps; one number or (rows, columns).
            groups: 1 for a dense convolution, in_chs = out_chs for a depthwise one.
            bias: Add a bias.
            center_size, base, grid, small_kernel_size: See `PeripheralKernel`.

        Raises:
            ValueError: An even kernel size, channels or a grid that do not fit, a dilation below 1, or another stride
                or padding.
        """
        size = to_2tuple(kernel_size)
        _check_same(in_chs, out_chs, size, groups, 2)
        geometry = _same_geometry(self, size, stride, padding, dilation)
        if size[0] != size[1]:
            raise ValueError(f'Kernels of PeripheralConv2d are square, got kernel_size={size}.')
        depthwise = _is_depthwise(in_chs, out_chs, groups)
        kernel = PeripheralKernel(
            1 if depthwise else in_chs,
            out_chs,
            size[0],
            center_size=center_size,
            base=base,
            grid=grid,
            small_kernel_size=small_kernel_size,
            device=device,
            dtype=dtype,
        )
        super().__init__(kernel, bias, device=device, dtype=dtype)
        self.depthwise = depthwise
        self.dilation = geometry['dilation']

    def forward(self, x: torch.Tensor, pos_embed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """(B, in_chs, H, W), and the embedding (in_chs, k, k) or None -> (B, out_chs, H, W)."""
        kernel = self.kernel.for_convolution() if torch.jit.is_scripting() else self.render_kernel()
        bias = self._total_bias(kernel, pos_embed, self.bias)
        keep = None if torch.jit.is_scripting() else self._kept.keep(kernel)
        if self.depthwise:
            return ops.depthwise_conv2d(x, kernel, bias, self.dilation, keep)
        return ops.conv2d(x, kernel, bias, self.dilation, keep)

    def _total_bias(
        self, kernel: torch.Tensor, pos_embed: Optional[torch.Tensor], bias: Optional[torch.Tensor]
    ) -> Optional[torch.Tensor]:
        if pos_embed is None:
            return bias
        embedding = pos_embed.unsqueeze(1) if self.depthwise else pos_embed.unsqueeze(0)
        offset = (kernel * embedding).sum([1, 2, 3])
        return offset if bias is None else bias + offset

    @torch.jit.unused
    def fuse(self, pos_embed: Optional[torch.Tensor] = None) -> nn.Module:
        """The equivalent plain convolution, dense taps and a bias."""
        compute_weights(self)
        with torch.no_grad():
            weight = self.kernel()
            # in float64, so that the sum over thousands of taps adds no rounding of its own
            exact = [None if x is None else to_float64(x) for x in (weight, pos_embed, self.bias)]
            conv = self.to_conv(weight, self._total_bias(*exact))
        return conv.requires_grad_(True) if pos_embed is not None and pos_embed.requires_grad else conv


def _check_geometry(conv: nn.Module, **values: Tuple[Any, Tuple[int, ...]]) -> None:
    """Checks arguments that a convolution has for those of torch.nn: what was given, and the only value that works."""
    for name, (value, wanted) in values.items():
        if (value if isinstance(value, (tuple, list)) else (value,) * len(wanted)) not in (wanted, list(wanted)):
            raise ValueError(f'{type(conv).__name__} has {name}={wanted}, got {value}: torch.nn has layers for others.')


def _same_padding(size: Sequence[int], dilation: Sequence[int]) -> Tuple[int, ...]:
    return tuple(k // 2 * d for k, d in zip(size, dilation))


def _is_same(conv: Union[nn.Conv1d, nn.Conv2d]) -> bool:
    """Whether a convolution with an odd kernel pads with zeros to the same size, without strides, in 1D undilated."""
    ones = (1,) * len(conv.kernel_size)
    to_tuple = to_ntuple(len(ones))
    dilation = to_tuple(conv.dilation)
    same = _same_padding(conv.kernel_size, dilation)
    padding = same if conv.padding == 'same' else to_tuple(conv.padding)
    is_dilated_1d = len(ones) == 1 and dilation != ones
    return (conv.padding_mode, padding, to_tuple(conv.stride)) == ('zeros', same, ones) and not is_dilated_1d


def _same_geometry(
    conv: nn.Module, size: Tuple[int, ...], stride: Any, padding: Any, dilation: Any
) -> Dict[str, Tuple[int, ...]]:
    """Checks arguments; returns padding and dilation of a convolution with outputs as large as its inputs."""
    dilation = to_ntuple(len(size))(dilation)
    if len(dilation) != len(size) or not all(isinstance(d, numbers.Integral) and d >= 1 for d in dilation):
        raise ValueError(f'dilation must be positive (one number, or rows and columns), got {dilation}.')
    same = _same_padding(size, dilation)
    padding = same if padding is None or padding == 'same' else padding
    _check_geometry(conv, stride=(stride, (1,) * len(size)), padding=(padding, same))
    return dict(padding=same, dilation=dilation)


def _fits_groups(in_chs: int, out_chs: int, groups: int) -> bool:
    return groups == 1 or groups == in_chs == out_chs


def _is_depthwise(in_chs: int, out_chs: int, groups: int) -> bool:
    return groups > 1 or in_chs == out_chs == 1


def _check_same(in_chs: int, out_chs: int, kernel_size: Tuple[int, ...], groups: int, ndim: int) -> None:
    _check_size(kernel_size, ndim, odd=True)
    _check_groups(in_chs, out_chs, groups)


def _check_size(kernel_size: Tuple[int, ...], ndim: int, odd: bool = False) -> None:
    whole = len(kernel_size) == ndim and all(isinstance(k, numbers.Integral) and k > 0 for k in kernel_size)
    if not whole or (odd and not all(k % 2 for k in kernel_size)):
        wanted = 'one number or height and width' if ndim == 2 else 'one number'
        raise ValueError(f'kernel_size must be {"odd and " if odd else ""}positive ({wanted}), got {kernel_size}.')


def _check_groups(in_chs: int, out_chs: int, groups: int) -> None:
    if not _fits_groups(in_chs, out_chs, groups):
        raise ValueError(
            f'groups must be 1 (dense) or equal to in_chs and out_chs (depthwise), '
            f'got groups={groups}, in_chs={in_chs}, out_chs={out_chs}.'
        )
