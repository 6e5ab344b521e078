"""Drop-in convolution layers: a kernel module renders weights, an op convolves."""

from typing import Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import to_2tuple, to_ntuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn.utils import skip_init

from .. import ops
from ..ops.context import to_float64
from .cache import DropsCaches, KernelCache
from .folding import compute_weights, like_module
from .geometry import check_geometry, check_groups, check_same, check_size, is_depthwise, same_geometry
from .kernel import RenderedKernel, SMPKernel, with_all_taps
from .large import CausalConv1d, LargeConv1d, LargeConv2d
from .peripheral import PeripheralKernel

__all__ = ['PeripheralConv2d', 'SMPConv1d', 'SMPConv2d']

_MANY_TAPS = 17  # of a side, from which dense kernels are those of the CIFAR network


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
            return self.to_conv(with_all_taps(weight, self.kernel), self.bias)


@register_notrace_module
class SMPConv2d(_RenderedConv):
    """2D convolution with a kernel of moving points, with outputs as large as its inputs.

    Depthwise (groups = in_chs = out_chs): points shared by all channels, sums not normalised, k^2 / 4 points of
    radius 4 / k (the ImageNet networks); so is a convolution of a single channel. Dense (groups = 1): points per output
    filter, normalised sums, 16 points, from 17 taps on of radius 0.12 (the CIFAR network; fewer taps are so far apart
    that such points would reach few but the middle one).
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
            num_points: Points of a filter; None: floor(kh * kw / 4), at least 1, depthwise, 16 dense.
            radius: Initial radius; None: 0.12 dense from 17 taps on, else 2 / kh + 2 / kw, which is 4 / k, at most 1
                (without a side of a single tap).
            coord_std: Standard deviation of the initial coordinates; None: 0.05 dense from 17 taps on, else 0.2.
            learn_coords: Learn the coordinates.
            learn_radius: Learn the radii.

        Raises:
            ValueError: An even kernel size, channels that do not fit, a value out of range, a dilation below 1, or
                another stride or padding.
        """
        size = to_2tuple(kernel_size)
        check_same(in_chs, out_chs, size, groups, 2)
        geometry = same_geometry(self, size, stride, padding, dilation)
        depthwise = is_depthwise(in_chs, out_chs, groups)
        default_points = max(size[0] * size[1] // 4, 1) if depthwise else 16
        if not depthwise and min(size) >= _MANY_TAPS:
            default_radius, default_std = 0.12, 0.05
        else:  # so that a point reaches the taps around it, along both sides
            default_radius, default_std = min(sum(2 / k for k in size if k > 1) or 1.0, 1.0), 0.2
        kernel = SMPKernel(
            1 if depthwise else in_chs,
            out_chs,
            size,
            ndim=2,
            num_points=default_points if num_points is None else num_points,
            radius=default_radius if radius is None else radius,
            coord_std=default_std if coord_std is None else coord_std,
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
            ValueError: An even kernel size without `causal`, channels that do not fit, another stride, padding or
                dilation, or a value out of range.
        """
        size = to_ntuple(1)(kernel_size)
        if causal:
            check_size(size, 1)
            check_groups(in_chs, out_chs, groups)
            check_geometry(self, stride=(stride, (1,)), padding=(0 if padding is None else padding, (0,)))
        else:
            check_same(in_chs, out_chs, size, groups, 1)
            same_geometry(self, size, stride, padding, 1)
        check_geometry(self, dilation=(dilation, (1,)))
        depthwise = is_depthwise(in_chs, out_chs, groups)
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
        check_same(in_chs, out_chs, size, groups, 2)
        geometry = same_geometry(self, size, stride, padding, dilation)
        if size[0] != size[1]:
            raise ValueError(f'Kernels of PeripheralConv2d are square, got kernel_size={size}.')
        depthwise = is_depthwise(in_chs, out_chs, groups)
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
