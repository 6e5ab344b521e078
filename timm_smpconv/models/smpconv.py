"""SMPConv ImageNet networks: very large depthwise kernels in the RepLKNet layout (paper, section 4.3)."""

import numbers
from typing import Any, Optional, Sequence, Union

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_ntuple
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

from ..layers import (
    AffineNorm,
    ConvNorm,
    RepSMPConv2d,
    by_parts,
    can_take_norm,
    fold_norm_into_next,
    is_foldable,
    norm_to_conv,
)
from ..ops import to_fast_format
from ._base import LargeKernelNet, StageGeometry, check_stages, init_weights, plan_stages
from ._builder import build, imagenet_cfg

__all__ = ['SMPConv']


class _PreNormBlock(nn.Module):
    """x + drop_path(pw2(act(mix(pw1(norm(x)))))), the shape of both blocks of a stage; pw1, pw2 are 1x1."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        pw1_act: bool,
        mix: nn.Module,
        act: nn.Module,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.hidden_dim = hidden_dim
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNorm(dim, hidden_dim, 1, apply_act=pw1_act, **dd)
        self.mix = mix
        self.act = act
        self.pw2 = ConvNorm(hidden_dim, dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def reparameterize(self) -> None:
        """Folds the leading norm into the first convolution, in place; does nothing the second time."""
        if is_foldable(self.norm):
            self.pw1.reparameterize()
            if can_take_norm(self.pw1.conv):
                fold_norm_into_next(self.norm, self.pw1.conv)
                self.norm = nn.Identity().train(self.training)
            else:  # its own norm is one that stays, or its weight is computed in each call
                self.norm = norm_to_conv(self.norm)

    def _branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(self.act(self.mix(self.pw1(self.norm(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting() or self.training:
            y = self._branch(x)
        else:
            y = self._by_parts(x)
        return x + self.drop_path(y)

    @torch.jit.unused
    def _by_parts(self, x: torch.Tensor) -> torch.Tensor:
        return by_parts(self, self._branch, x, self.hidden_dim * x.shape[2] * x.shape[3])


class LargeKernelBlock(_PreNormBlock):
    """Mixes positions with a very large depthwise kernel."""

    def __init__(self, dim: int, kernel_size: int, drop_path: float = 0.0, device=None, dtype=None, **conv_args):
        """
        Args:
            dim: Channels.
            kernel_size: Taps of the large kernel in each dimension.
            drop_path: Rate at which the residual branch is dropped in training.
            **conv_args: Further arguments of RepSMPConv2d.
        """
        dd = {'device': device, 'dtype': dtype}
        mix = RepSMPConv2d(dim, dim, kernel_size, groups=dim, **conv_args, **dd)
        super().__init__(dim, dim, True, mix, nn.ReLU(inplace=True), drop_path, **dd)


class ConvFFN(_PreNormBlock):
    """Mixes channels."""

    def __init__(self, dim: int, hidden_dim: int, drop_path: float = 0.0, device=None, dtype=None):
        """
        Args:
            dim: Channels.
            hidden_dim: Channels between the two convolutions.
            drop_path: Rate at which the residual branch is dropped in training.
        """
        super().__init__(dim, hidden_dim, False, nn.Identity(), nn.GELU(), drop_path, device=device, dtype=dtype)


class Stem(nn.Module):
    """Four convolutions that reduce the resolution by four."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        """
        Args:
            in_chans: Input channels.
            dim: Output channels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dim = dim
        layers = (
            ConvNorm(in_chans, dim, 3, stride=2, **dd),
            ConvNorm(dim, dim, 3, groups=dim, **dd),
            ConvNorm(dim, dim, 1, **dd),
            ConvNorm(dim, dim, 3, stride=2, groups=dim, **dd),
        )
        for i, layer in enumerate(layers):  # no nn.Sequential, which timm's feature networks would take apart
            self.add_module(str(i), layer)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""
        x = to_fast_format(x)
        if torch.jit.is_scripting() or self.training:
            return self._forward(x)
        return self._by_parts(x)

    @torch.jit.unused
    def _by_parts(self, x: torch.Tensor) -> torch.Tensor:
        return by_parts(self, self._forward, x, self.dim * x.shape[2] * x.shape[3] // 4)


class SMPConvStage(nn.Module):
    """Optional transition, which halves the resolution, then pairs of a large-kernel block and a ConvFFN."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        kernel_size: int,
        mlp_ratio: float,
        geometry: StageGeometry,
        downsample: bool,
        drop_path: Sequence[float],
        device=None,
        dtype=None,
        **conv_args,
    ):
        """
        Args:
            in_dim: Input channels.
            dim: Channels of the stage.
            depth: Number of pairs of blocks.
            kernel_size: Taps of the large kernels in each dimension.
            mlp_ratio: Hidden width of a ConvFFN, relative to dim.
            geometry: Stride of the transition, and dilations.
            downsample: Start with a transition.
            drop_path: Stochastic depth rate of each pair.
            **conv_args: Further arguments of RepSMPConv2d.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = (
            nn.Sequential(
                ConvNorm(in_dim, dim, 1, **dd),
                ConvNorm(dim, dim, 3, stride=geometry.stride, dilation=geometry.first_dilation, groups=dim, **dd),
            )
            if downsample
            else nn.Identity()
        )
        blocks = []
        for i in range(depth):
            blocks.append(
                LargeKernelBlock(
                    dim, kernel_size, drop_path=drop_path[i], dilation=geometry.dilation, **conv_args, **dd
                )
            )
            blocks.append(ConvFFN(dim, int(dim * mlp_ratio), drop_path=drop_path[i], **dd))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_dim, H, W) -> (B, dim, H, W), or half of H and W, rounded up, if it reduces the resolution."""
        x = self.downsample(to_fast_format(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SMPConv(LargeKernelNet):
    """SMPConv image classification network."""

    reference_rules = (
        (r'\.prelkb_bn\.|\.preffn_bn\.', '.norm.'),
        (r'\.large_kernel\.smp\.conv\.', '.mix.large.kernel.'),
        (r'\.large_kernel\.smp\.bn\.', '.mix.large_norm.'),
        (r'\.large_kernel\.small_conv\.conv\.', '.mix.small.'),
        (r'\.large_kernel\.small_conv\.bn\.', '.mix.small_norm.'),
        (r'^transitions\.(\d+)\.', lambda match: f'stages.{int(match[1]) + 1}.downsample.'),
        (r'^head\.', 'head.fc.'),
    )
    first_layer = ('stem.0.conv.weight',)

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Union[int, Sequence[int]] = (31, 29, 27, 13),
        mlp_ratio: float = 4.0,
        points_divisor: int = 4,
        num_points: Union[int, Sequence[int], None] = None,
        small_kernel_size: int = 5,
        radius: Optional[float] = None,
        coord_std: Optional[float] = None,
        learn_coords: bool = True,
        learn_radius: bool = True,
        output_stride: Optional[int] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ):
        """
        Args:
            num_classes: Number of classes; 0 for no classifier.
            in_chans: Input channels.
            global_pool: Global pooling type, '' for none.
            depths: Pairs of blocks of each stage.
            dims: Channels of each stage.
            kernel_sizes: Taps of the large kernels of each stage, odd; one number for all stages or one per stage.
            mlp_ratio: Hidden width of a ConvFFN, relative to the channels.
            points_divisor: Points of a kernel are floor(k^2 / points_divisor) ...
            num_points: ... unless given here, one number for all stages or one per stage.
            small_kernel_size: Taps of the small branch, odd.
            radius: Initial radius of the points; None: 4 / k, at most 1.
            coord_std: Standard deviation of the initial coordinates; None: 0.2.
            learn_coords: Learn the coordinates of the points.
            learn_radius: Learn the radii of the points.
            output_stride: 4, 8, 16 or 32: stages that would reduce the resolution further have dilated convolutions
                instead, with the same weights. None: no limit.
            drop_rate: Dropout rate in front of the classifier.
            drop_path_rate: Largest rate of stochastic depth, growing linearly over the pairs of blocks.
            inference_mode: Build the deployed form.

        Raises:
            ValueError: An argument is out of range, or does not have one entry for each stage.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans)
        kernel_sizes = to_ntuple(len(depths))(kernel_sizes)
        check_stages(depths, dims, kernel_sizes)
        if points_divisor < 1:
            raise ValueError(f'points_divisor must be positive, got {points_divisor}.')
        if num_points is None:
            num_points = [max(k * k // points_divisor, 1) for k in kernel_sizes]
        elif isinstance(num_points, numbers.Integral):
            num_points = [num_points] * len(depths)
        elif len(num_points) != len(depths):
            raise ValueError(f'num_points must be a number or one per stage ({len(depths)}), got {tuple(num_points)}.')
        self.stem = Stem(in_chans, dims[0], **dd)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, geometry in enumerate(plan_stages(len(depths), output_stride)):
            stages.append(
                SMPConvStage(
                    dims[max(i - 1, 0)],
                    dims[i],
                    depths[i],
                    kernel_sizes[i],
                    mlp_ratio=mlp_ratio,
                    geometry=geometry,
                    downsample=i > 0,
                    drop_path=drop_path_rates[i],
                    num_points=num_points[i],
                    small_kernel_size=small_kernel_size,
                    radius=radius,
                    coord_std=coord_std,
                    learn_coords=learn_coords,
                    learn_radius=learn_radius,
                    **dd,
                )
            )
            self.feature_info += [dict(num_chs=dims[i], reduction=geometry.reduction, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.norm = AffineNorm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_weights)
        self._finish(inference_mode)


def _create_smpconv(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(SMPConv, variant, pretrained, num_stages=len(kwargs.get('depths', range(4))), **kwargs)


default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(name, first_conv='stem.0.conv')
        for name in ('smpconv_tiny.in1k', 'smpconv_base.in1k', 'smpconv_mobile31.in1k', 'smpconv_mobile51.in1k')
    }
)


@register_model
def smpconv_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SMPConv-T (Table 4)."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768))
    return _create_smpconv('smpconv_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def smpconv_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SMPConv-B (Table 4)."""
    model_args = dict(depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024))
    return _create_smpconv('smpconv_base', pretrained, **dict(model_args, **kwargs))


@register_model
def smpconv_mobile31(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mobile network with kernels up to 31 x 31 (Table 5)."""
    model_args = dict(depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), mlp_ratio=2.0, points_divisor=8)
    return _create_smpconv('smpconv_mobile31', pretrained, **dict(model_args, **kwargs))


@register_model
def smpconv_mobile51(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mobile network with kernels up to 51 x 51 (Table 5)."""
    model_args = dict(
        depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), kernel_sizes=(51, 49, 47, 13), mlp_ratio=2.0, points_divisor=8
    )
    return _create_smpconv('smpconv_mobile51', pretrained, **dict(model_args, **kwargs))
