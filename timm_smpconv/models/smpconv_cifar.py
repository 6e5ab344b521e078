"""SMPConv CIFAR network: dense 33 x 33 kernels at full resolution (paper, section 4.2)."""

from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn

from ..layers import RepSMPConv2d
from ._base import LargeKernelNet
from ._builder import build, small_cfg

__all__ = ['SMPConvCifar']


class ResidualBlock(nn.Module):
    """relu(two-branch(drop(relu(two-branch(x)))) + shortcut(x))."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        **conv_args,
    ):
        """
        Args:
            in_chs: Input channels.
            out_chs: Output channels.
            kernel_size: Taps of the large kernels in each dimension.
            drop_rate: Dropout rate between the two convolutions.
            drop_path: Rate at which the residual branch is dropped in training.
            **conv_args: Further arguments of RepSMPConv2d.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.conv1 = RepSMPConv2d(in_chs, out_chs, kernel_size, **conv_args, **dd)
        self.conv2 = RepSMPConv2d(out_chs, out_chs, kernel_size, **conv_args, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.shortcut = nn.Identity()
        if in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, **dd)
            nn.init.trunc_normal_(self.shortcut.weight, std=0.02)
            nn.init.zeros_(self.shortcut.bias)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.drop(self.act(self.conv1(x))))
        return self.act(self.drop_path(y) + self.shortcut(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x)
        return self._forward(x)


class SMPConvCifar(LargeKernelNet):
    """SMPConv network for small images; feature maps keep the resolution of the input."""

    reference_rules = (
        (r'^(cconv1|norm1)', r'stem.\1'),
        (r'^blocks\.', 'stages.'),
        (r'^stem\.(cconv|norm)1', r'stem.\1'),
        (r'\.cconv(\d?)s\.', r'.conv\1.small.'),
        (r'\.cconv(\d?)\.Kernel\.', r'.conv\1.large.kernel.'),
        (r'\.norm(\d?)s\.', r'.conv\1.small_norm.'),
        (r'\.norm(\d?)\.', r'.conv\1.large_norm.'),
        (r'\.shortcut\.0\.', '.shortcut.'),
        (r'^out_layer\.', 'head.fc.'),
    )
    first_layer = ('stem.conv.large.kernel.weights', 'stem.conv.small.weight', 'stem.conv.weight')

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        dims: Sequence[int] = (24, 24, 24, 36, 36, 36, 48, 48),
        kernel_size: int = 33,
        num_points: int = 16,
        radius: Optional[float] = None,
        coord_std: Optional[float] = None,
        small_kernel_size: int = 3,
        learn_coords: bool = True,
        learn_radius: bool = True,
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
            dims: Channels of the stem and of each block.
            kernel_size: Taps of the large kernels, odd.
            num_points: Points of a filter.
            radius: Initial radius of the points; None: 0.12 from 17 taps on, else 4 / kernel_size, at most 1.
            coord_std: Standard deviation of the initial coordinates; None: 0.05 from 17 taps on, else 0.2.
            small_kernel_size: Taps of the small branch, odd.
            learn_coords: Learn the coordinates of the points.
            learn_radius: Learn the radii of the points.
            drop_rate: Dropout rate within the blocks.
            drop_path_rate: Largest rate of stochastic depth, growing linearly with the depth.
            inference_mode: Build the deployed form.

        Raises:
            ValueError: An argument is out of range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans)
        if len(dims) < 2:
            raise ValueError(f'dims must hold the channels of the stem and of at least one block, got {tuple(dims)}.')
        conv_args = dict(
            num_points=num_points,
            radius=radius,
            coord_std=coord_std,
            small_kernel_size=small_kernel_size,
            learn_coords=learn_coords,
            learn_radius=learn_radius,
            **dd,
        )
        self.stem = nn.Sequential(
            OrderedDict(
                conv=RepSMPConv2d(in_chans, dims[0], kernel_size, small_bias=True, **conv_args),
                act=nn.ReLU(inplace=True),
            )
        )
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, len(dims) - 1)
        stages = []
        for i, (in_chs, out_chs) in enumerate(zip(dims, dims[1:])):
            stages.append(
                ResidualBlock(
                    in_chs, out_chs, kernel_size, drop_rate=drop_rate, drop_path=drop_path_rates[i], **conv_args
                )
            )
            self.feature_info += [dict(num_chs=out_chs, reduction=1, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, **dd)
        if num_classes:
            nn.init.kaiming_normal_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)
        self._finish(inference_mode)

    @torch.jit.ignore
    def convert_checkpoint(self, checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """See LargeKernelNet."""
        state_dict = super().convert_checkpoint(checkpoint)
        classifier = state_dict.get('head.fc.weight')
        if classifier is not None and classifier.ndim == 4:  # a 1x1 convolution in the reference
            state_dict['head.fc.weight'] = classifier.flatten(1)
        return state_dict


def _create_smpconv_cifar(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    num_stages = len(kwargs.get('dims', range(8))) - 1
    return build(SMPConvCifar, variant, pretrained, num_stages=num_stages, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'smpconv_cifar.c10': small_cfg(
            'smpconv_cifar.c10',
            input_size=(3, 32, 32),
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv='stem.conv.small',
        ),
    }
)


@register_model
def smpconv_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The CIFAR-10 network (Table 3)."""
    return _create_smpconv_cifar('smpconv_cifar', pretrained, **kwargs)
