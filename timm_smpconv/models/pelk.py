"""PeLK ImageNet networks: peripheral convolution with kernels of up to 101 x 101 taps (CVPR 2024).

There is neither code nor are there weights of the authors: what follows is the paper (arXiv:2403.07589). It leaves open
whether norms follow the convolutions of a block. Here, as in ConvNeXt, none does before the layer norm of the block: a
batch norm would undo the positional embedding, whose effect is a constant for each channel. The paper trains with the
dynamic sparsity of SLaK (1.3 times as wide, 40 % of the large kernels zero), which is a matter of the training script:
these are the dense networks at ConvNeXt's widths.
"""

from collections import OrderedDict
from typing import Any, List, Optional, Sequence, Union

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn
from torch.nn.utils import skip_init

from ..layers import LargeConv2d, PeripheralConv2d, by_parts, check_part
from ..ops import to_fast_format
from ..ops.context import to_float64
from ._base import LargeKernelNet, StageGeometry, check_stages, init_weights, plan_stages
from ._builder import build, imagenet_cfg

__all__ = ['PeLK']

_PAPER = dict(
    paper_ids='arXiv:2403.07589',
    paper_name='PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution',
    origin_url='https://arxiv.org/abs/2403.07589',
)


class PeLKBlock(nn.Module):
    """ConvNeXt block on a partial peripheral convolution: x + drop_path(gamma * mlp(norm(cat(conv(x[:g]), x[g:]))))."""

    __constants__ = ['dim', 'embedded', 'num_conv']

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        center_size: int = 5,
        small_kernel_size: int = 5,
        conv_ratio: float = 3 / 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init_value: float = 1e-6,
        embedded: bool = True,
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Channels.
            kernel_size: Taps of the kernel in each dimension, odd.
            center_size: Taps of the unshared centre in each dimension, odd.
            small_kernel_size: Taps of the small kernel added in the centre, odd; 0 for none.
            conv_ratio: Part of the channels that are convolved (section 4.3); the others pass.
            mlp_ratio: Hidden width, relative to dim.
            drop_path: Rate at which the residual branch is dropped in training.
            ls_init_value: Initial value of gamma; 0 for no layer scale.
            embedded: The convolution takes the positional embedding of the stage.
            dilation: Distance of neighbouring taps.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.embedded, self.dim = embedded, dim
        self.num_conv = max(int(dim * conv_ratio), 1)
        self.hidden_dim = int(dim * mlp_ratio)
        self.conv = PeripheralConv2d(
            self.num_conv,
            self.num_conv,
            kernel_size,
            dilation=dilation,
            groups=self.num_conv,
            center_size=center_size,
            small_kernel_size=small_kernel_size,
            **dd,
        )
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, self.hidden_dim, act_layer=nn.GELU, **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(torch.empty(dim, **dd)) if ls_init_value else None
        self.reset_parameters()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the layer scale, which belongs to no part, to its first value."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.ls_init_value)

    @torch.jit.ignore
    def deploy(self, pos_embed: Optional[torch.Tensor]) -> None:
        """Renders the kernel with the embedding and folds gamma into the last layer, in place.

        Raises:
            RuntimeError: A part has been replaced by something else.
        """
        if self.embedded or self.gamma is not None:  # else there is nothing left to fold
            check_part(self, self.conv, PeripheralConv2d, LargeConv2d)
        if self.gamma is not None:
            check_part(self, self.mlp.fc2, nn.Linear)
            old, gamma = self.mlp.fc2, to_float64(self.gamma.data)
            if type(old).forward is not nn.Linear.forward:  # it adds something, or quantises
                raise RuntimeError(
                    f'PeLKBlock cannot be reparameterized: its last layer is a {type(old).__name__}, which does more '
                    f'than multiply. Put a Linear in its place.'
                )
            dd = dict(device=old.weight.device, dtype=old.weight.dtype)
            # a new one: the weight of the old may be computed in each call
            last = skip_init(nn.Linear, old.in_features, old.out_features, bias=old.bias is not None, **dd)
            last.weight.data = (to_float64(old.weight.data) * gamma[:, None]).to(old.weight)
            if old.bias is not None:
                last.bias.data = (to_float64(old.bias.data) * gamma).to(old.weight)
            last.requires_grad_(any(p.requires_grad for p in (*old.parameters(), self.gamma)))
            self.mlp.fc2, self.gamma = last.train(self.training), None
        if isinstance(self.conv, PeripheralConv2d):
            self.conv = self.conv.fuse(pos_embed if self.embedded else None)
            self.embedded = False

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """`deploy` without an embedding; the stage deploys blocks that need its embedding.

        Raises:
            RuntimeError: The block needs an embedding, or a part has been replaced by something else.
        """
        if self.embedded:
            raise RuntimeError(
                'The positional embedding of a PeLKBlock is in its PeLKStage: call reparameterize() of the stage or of '
                'the network.'
            )
        self.deploy(None)

    def _mix(self, x: torch.Tensor, pos_embed: Optional[torch.Tensor]) -> torch.Tensor:
        part = to_fast_format(x[:, : self.num_conv])
        part = self.conv(part, pos_embed) if self.embedded else self.conv(part)
        if self.num_conv == self.dim:  # with nothing to join, the result would be in the contiguous format
            return part
        return torch.cat([part, x[:, self.num_conv :]], 1)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mlp(self.norm(x.permute(0, 2, 3, 1)))
        if self.gamma is not None:
            x = x * self.gamma
        return x.permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor, pos_embed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Maps (B, dim, H, W), and the embedding of the stage, to maps of the same shape."""
        y = self._mix(x, pos_embed)
        if torch.jit.is_scripting() or self.training:
            y = self._mlp(y)
        else:
            y = self._by_parts(y)
        return x + self.drop_path(y)

    @torch.jit.unused
    def _by_parts(self, x: torch.Tensor) -> torch.Tensor:
        return by_parts(self, self._mlp, x, self.hidden_dim * x.shape[2] * x.shape[3])


class PeLKStage(nn.Module):
    """Optional transition, which halves the resolution, then blocks whose kernels share a positional embedding."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        kernel_size: int,
        geometry: StageGeometry,
        downsample: bool,
        drop_path: Sequence[float],
        pos_embed: bool = True,
        device=None,
        dtype=None,
        **block_args,
    ):
        """
        Args:
            in_dim: Input channels.
            dim: Channels of the stage.
            depth: Number of blocks.
            kernel_size: Taps of the kernels in each dimension.
            geometry: Stride of the transition, and dilations.
            downsample: Start with a transition.
            drop_path: Stochastic depth rate of each block.
            pos_embed: Learn a positional embedding of the kernels.
            **block_args: Further arguments of PeLKBlock.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = _make_transition(in_dim, dim, geometry, **dd) if downsample else nn.Identity()
        block_args = dict(block_args, embedded=pos_embed, dilation=geometry.dilation)
        self.blocks = nn.ModuleList(
            PeLKBlock(dim, kernel_size, drop_path=drop_path[i], **block_args, **dd) for i in range(depth)
        )
        self.pos_embed = None
        if pos_embed and depth:
            self.pos_embed = nn.Parameter(torch.empty(self.blocks[0].num_conv, kernel_size, kernel_size, **dd))
            self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws a new positional embedding, which belongs to no part."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Renders the kernels, in place; does nothing the second time.

        Raises:
            RuntimeError: A part of a block has been replaced by something else.
        """
        for block in self.blocks:
            block.deploy(self.pos_embed)
        self.pos_embed = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_dim, H, W) -> (B, dim, H, W), or half of H and W if it reduces the resolution."""
        x = self.downsample(to_fast_format(x))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, self.pos_embed)
            else:
                x = block(x, self.pos_embed)
        return x


def _make_transition(in_dim: int, dim: int, geometry: StageGeometry, device=None, dtype=None) -> nn.Module:
    dd = {'device': device, 'dtype': dtype}
    norm, dilation = LayerNorm2d(in_dim, eps=1e-6, **dd), geometry.first_dilation
    conv = nn.Conv2d(in_dim, dim, 2, stride=geometry.stride, dilation=dilation, **dd)
    if geometry.stride == 2:
        return nn.Sequential(norm, conv)
    # without a stride the second tap of the last rows and columns falls off the map
    pad = nn.ZeroPad2d((0, dilation, 0, dilation))
    return nn.Sequential(OrderedDict([('0', norm), ('pad', pad), ('1', conv)]))


class PeLK(LargeKernelNet):
    """PeLK image classification network."""

    first_layer = ('stem.0.weight',)  # there are no weights of the authors

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Union[int, Sequence[int]] = (51, 49, 47, 13),
        center_size: int = 5,
        small_kernel_size: int = 5,
        conv_ratio: float = 3 / 8,
        mlp_ratio: float = 4.0,
        pos_embed: bool = True,
        ls_init_value: float = 1e-6,
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
            depths: Blocks of each stage.
            dims: Channels of each stage.
            kernel_sizes: Taps of the kernels of each stage, odd; one number for all stages or one per stage.
            center_size: Taps of the unshared centre of all kernels, odd.
            small_kernel_size: Taps of the small kernels added in the centre, odd; 0 for none.
            conv_ratio: Part of the channels that are convolved; the others pass.
            mlp_ratio: Hidden width of a block, relative to the channels.
            pos_embed: Learn a positional embedding of the kernels of each stage.
            ls_init_value: Initial value of the layer scale; 0 for none.
            output_stride: 4, 8, 16 or 32: stages that would reduce the resolution further have dilated convolutions
                instead, with the same weights. None: no limit. Images whose sides are multiples of 32 lose no row.
            drop_rate: Dropout rate in front of the classifier.
            drop_path_rate: Largest rate of stochastic depth, growing linearly over the blocks.
            inference_mode: Build the deployed form.

        Raises:
            ValueError: An argument is out of range, or does not have one entry for each stage.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans)
        kernel_sizes = to_ntuple(len(depths))(kernel_sizes)
        check_stages(depths, dims, kernel_sizes)
        if not 0 < conv_ratio <= 1:
            raise ValueError(f'conv_ratio must lie in (0, 1], got {conv_ratio}.')
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), LayerNorm2d(dims[0], eps=1e-6, **dd))
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: List[nn.Module] = []
        for i, geometry in enumerate(plan_stages(len(depths), output_stride)):
            stages.append(
                PeLKStage(
                    dims[max(i - 1, 0)],
                    dims[i],
                    depths[i],
                    kernel_sizes[i],
                    geometry=geometry,
                    downsample=i > 0,
                    drop_path=drop_path_rates[i],
                    pos_embed=pos_embed,
                    center_size=center_size,
                    small_kernel_size=small_kernel_size,
                    conv_ratio=conv_ratio,
                    mlp_ratio=mlp_ratio,
                    ls_init_value=ls_init_value,
                    **dd,
                )
            )
            self.feature_info += [dict(num_chs=dims[i], reduction=geometry.reduction, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d, **dd
        )
        self.apply(init_weights)
        self._finish(inference_mode)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes what the given intermediates do not need, see LargeKernelNet; the norm is that of the head."""
        num_stages = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < num_stages:
            self.head.norm = nn.Identity().train(self.training)
            self.head.num_features = self.num_features
        return take_indices


def _create_pelk(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(PeLK, variant, pretrained, num_stages=len(kwargs.get('depths', range(4))), **kwargs)


default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(name, input_size, first_conv='stem.0', **_PAPER)
        for name, input_size in (
            ('pelk_tiny.in1k', (3, 224, 224)),
            ('pelk_small.in1k', (3, 224, 224)),
            ('pelk_base.in1k', (3, 224, 224)),
            ('pelk_base_101.in1k', (3, 384, 384)),
        )
    }
)


@register_model
def pelk_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PeLK-T (section 4.4)."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return _create_pelk('pelk_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def pelk_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PeLK-S (section 4.4)."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
    return _create_pelk('pelk_small', pretrained, **dict(model_args, **kwargs))


@register_model
def pelk_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PeLK-B (section 4.4)."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
    return _create_pelk('pelk_base', pretrained, **dict(model_args, **kwargs))


@register_model
def pelk_base_101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PeLK-B-101 (section 4.4), with kernels of up to 101 x 101 taps, for images of 384 x 384 pixels."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024), kernel_sizes=(101, 69, 67, 13), center_size=7)
    return _create_pelk('pelk_base_101', pretrained, **dict(model_args, **kwargs))
