"""SMPConv sequence networks: causal convolutions as long as the sequence (the FlexTCN layout; paper, section 4.1)."""

from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model, register_notrace_function
from torch import nn

from ..layers import RepSMPConv1d
from ..ops import to_fast_format
from ._base import LargeKernelNet
from ._builder import build, small_cfg

__all__ = ['SMPConvSeq']


@register_notrace_function
def permute_steps(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Reorders the time steps of (B, C, L) or (B, C, H, W), read row by row, and keeps the layout.

    Args:
        x: Sequence.
        permutation: Source of each step, (L,).

    Raises:
        ValueError: The sequence has another length.
    """
    steps = x.flatten(2)
    if not torch.jit.is_scripting() and steps.shape[2] != permutation.shape[0]:
        raise ValueError(
            f'This model permutes sequences of {permutation.shape[0]} steps, got an input of shape {tuple(x.shape)}: '
            f'its length (or height times width) must be {permutation.shape[0]}.'
        )
    return steps.index_select(2, permutation).reshape(x.shape)


class PermuteSteps(nn.Module):
    """A fixed permutation of the time steps, kept in the buffer `permutation`."""

    def __init__(self, permutation: Sequence[int], device=None):
        """
        Args:
            permutation: Source of each step, all of 0 ... L - 1.

        Raises:
            ValueError: Not a permutation.
        """
        super().__init__()
        self._steps = [int(step) for step in permutation]
        if sorted(self._steps) != list(range(len(self._steps))):
            raise ValueError(f'permutation must hold each of 0 ... {len(self._steps) - 1} once.')
        self.register_buffer('permutation', torch.empty(len(self._steps), dtype=torch.long, device=device))
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fills the buffer, after construction on the meta device, unless it holds an order already: a stored one."""
        if self.permutation.is_meta or sorted(self.permutation.tolist()) != list(range(len(self._steps))):
            self.permutation.copy_(torch.tensor(self._steps))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if not self.permutation.is_meta:
            self._steps = self.permutation.tolist()  # timm may fill the buffer once more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return permute_steps(x, self.permutation)


class SequenceBlock(nn.Module):
    """Residual block: drop(relu(two-branch)) twice, plus a shortcut, then relu. Takes (B, C, L) or (B, C, H, W)."""

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
            kernel_size: Taps of the large kernels.
            drop_rate: Dropout rate behind each activation.
            drop_path: Rate at which the residual branch is dropped in training.
            **conv_args: Further arguments of RepSMPConv1d.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.conv1 = RepSMPConv1d(in_chs, out_chs, kernel_size, **conv_args, **dd)
        self.conv2 = RepSMPConv1d(out_chs, out_chs, kernel_size, **conv_args, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.shortcut = nn.Conv1d(in_chs, out_chs, 1, **dd) if in_chs != out_chs else nn.Identity()

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.act(self.conv1(x)))
        y = self.drop(self.act(self.conv2(y)))
        return self.act(self.drop_path(y) + self.shortcut(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = to_fast_format(x.flatten(2))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            y = checkpoint(self._forward, steps)
        else:
            y = self._forward(steps)
        return y.reshape(y.shape[:2] + x.shape[2:])  # unflatten would fix the size in a trace


class SequenceHead(nn.Module):
    """Pools a sequence, (B, C, L) or (B, C, H, W) read row by row, and classifies it."""

    def __init__(self, in_features: int, num_classes: int, pool_type: str = 'last', device=None, dtype=None):
        """
        Args:
            in_features: Input channels.
            num_classes: Number of classes; 0 for no classifier.
            pool_type: 'last' time step, 'avg' over all, '' for no pooling.

        Raises:
            ValueError: An unknown pooling, or a classifier without pooling.
        """
        super().__init__()
        self.in_features = in_features
        self.reset(num_classes, pool_type or '')
        self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: Optional[str] = None) -> None:
        """Replaces the classifier and, unless None, the pooling.

        Raises:
            ValueError: An unknown pooling, or a classifier together with the pooling ''.
        """
        if pool_type is not None:
            if pool_type not in ('last', 'avg', ''):
                raise ValueError(f"global_pool must be 'last', 'avg' or '' (none), got {pool_type!r}.")
            if num_classes and not pool_type:
                raise ValueError(f"global_pool='' leaves nothing to classify: use num_classes=0, got {num_classes}.")
            self.pool_type = pool_type
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.in_features, num_classes)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, C, L) or (B, C, H, W) to (B, num_classes), or to (B, C) if pre_logits; without pooling as it is."""
        if self.pool_type == 'last':
            x = x.flatten(2)[:, :, -1]
        elif self.pool_type == 'avg':
            x = x.flatten(2).mean(2)
        return x if pre_logits else self.fc(x)


class SMPConvSeq(LargeKernelNet):
    """SMPConv network for sequences (B, C, L), or for images (B, C, H, W) read row by row.

    Feature maps keep the layout of the input. The kernels keep their number of taps whatever the length of the input.
    """

    reference_rules = (
        (r'^backbone\.', 'stages.'),
        (r'\.cconv(\d)s\.', r'.conv\1.small.'),
        (r'\.cconv(\d)\.Kernel\.', r'.conv\1.large.kernel.'),
        (r'\.cconv(\d)\.bias$', r'.conv\1.large.bias'),
        (r'\.norm(\d)s\.', r'.conv\1.small_norm.'),
        (r'\.norm(\d)\.', r'.conv\1.large_norm.'),
        (r'\.shortcut\.0\.', '.shortcut.'),
        (r'^finallyr\.', 'head.fc.'),
    )
    first_layer = (
        'stages.0.conv1.large.kernel.weights',
        'stages.0.conv1.small.weight',
        'stages.0.conv1.weight',
        'stages.0.shortcut.weight',
    )

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        global_pool: str = 'last',
        kernel_size: int = 784,
        depth: int = 6,
        dim: int = 30,
        num_points: int = 30,
        radius: Optional[float] = None,
        coord_std: float = 0.1,
        small_kernel_size: int = 5,
        conv_bias: bool = False,
        learn_coords: bool = True,
        learn_radius: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        input_drop_rate: float = 0.0,
        permutation: Optional[Sequence[int]] = None,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ):
        """
        Args:
            num_classes: Number of classes; 0 for no classifier.
            in_chans: Input channels.
            global_pool: 'last' time step, 'avg' over all, '' for no pooling.
            kernel_size: Taps of the large kernels: the length of the sequences trained on.
            depth: Number of blocks.
            dim: Channels.
            num_points: Points of a filter.
            radius: Initial radius of the points; None: 2 / kernel_size, about the distance of two taps.
            coord_std: Standard deviation of the initial coordinates.
            small_kernel_size: Taps of the small branch.
            conv_bias: Bias in the large convolutions.
            learn_coords: Learn the coordinates of the points.
            learn_radius: Learn the radii of the points.
            drop_rate: Dropout rate within the blocks.
            drop_path_rate: Largest rate of stochastic depth, growing linearly with the depth.
            input_drop_rate: Dropout rate of the input.
            permutation: Fixed order in which the time steps are read; None for their own order.
            inference_mode: Build the deployed form.

        Raises:
            ValueError: An argument is out of range, or the permutation is none.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes, in_chans, sequence=True)
        if depth < 1 or dim < 1:
            raise ValueError(f'depth and dim must be positive, got depth={depth}, dim={dim}.')
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        if permutation is not None:
            stem['permute'] = PermuteSteps(permutation, device=device)
        stem['drop'] = nn.Dropout(input_drop_rate)
        self.stem = nn.Sequential(stem)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, depth)
        stages = []
        for i in range(depth):
            stages.append(
                SequenceBlock(
                    in_chans if i == 0 else dim,
                    dim,
                    kernel_size,
                    num_points=num_points,
                    radius=radius,
                    coord_std=coord_std,
                    small_kernel_size=small_kernel_size,
                    large_bias=conv_bias,
                    drop_rate=drop_rate,
                    drop_path=drop_path_rates[i],
                    learn_coords=learn_coords,
                    learn_radius=learn_radius,
                    **dd,
                )
            )
            self.feature_info += [dict(num_chs=dim, reduction=1, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.head = SequenceHead(dim, num_classes, global_pool, **dd)
        self._finish(inference_mode)

    @torch.jit.ignore
    def convert_checkpoint(self, checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """See LargeKernelNet.

        Raises:
            ValueError: The checkpoint permutes the steps, and not each to one place.
        """
        state_dict = super().convert_checkpoint(checkpoint)
        if 'stem.permute.permutation' in self.state_dict():  # not part of the reference checkpoint
            order = state_dict.setdefault('stem.permute.permutation', self.stem.permute.permutation)
            if not order.is_meta and sorted(order.flatten().tolist()) != list(range(order.numel())):
                raise ValueError('stem.permute.permutation is no order of the steps: each must occur once.')
        return state_dict


def change_rate(state_dict: Dict[str, torch.Tensor], model: SMPConvSeq, ratio: float) -> Dict[str, torch.Tensor]:
    """Carries weights over to sequences of the same duration with more or fewer steps.

    Points need no change, their kernels are functions of time. The small kernels are sampled anew: a straight line
    between taps, zero beyond the first. The norms' statistics are left to training, which finds them in a few steps.

    Args:
        state_dict: Weights in this package's layout, with small kernels of any number of taps.
        model: Network they are for, whose number of taps they get.
        ratio: Steps of the new sequences for one of the old.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    changed = dict(state_dict)
    for key, weight in state_dict.items():
        if key.endswith('.small.weight') and key in wanted:
            options = dict(dtype=torch.float64, device=weight.device)
            age = torch.arange(wanted[key][2] - 1, -1, -1, **options) / ratio  # old steps before the present
            old = torch.arange(weight.shape[2] - 1, -1, -1, **options)
            share = torch.relu(1.0 - (age - old.unsqueeze(1)).abs())  # old taps, new taps
            changed[key] = (weight.double() @ share).to(weight.dtype)
    return changed


def _create_smpconv_seq(
    variant: str, pretrained: bool, kwargs: Dict[str, Any], kernel_size: int, radius: float, **model_args: Any
) -> nn.Module:
    """A network with the arguments of the paper, among them the radius that goes with its number of taps."""
    if kwargs.get('kernel_size', kernel_size) == kernel_size:
        model_args['radius'] = radius
    model_args = dict(kernel_size=kernel_size, **model_args)
    model_args.update(kwargs)
    return build(SMPConvSeq, variant, pretrained, num_stages=model_args.get('depth', 6), **model_args)


# of the MFCC that the bundled weights were trained on
# fmt: off
_MFCC_MEAN = (
    -70.3263, 8.61471, -1.9854, -0.94047, -3.74092, -1.85378, -2.36257, -1.51127, -1.985, -0.929747,
    -1.76203, -0.745896, -1.47862, -0.224156, -0.875514, 0.00294013, -0.373899, 0.332484, -0.258449, 0.302848,
)
_MFCC_STD = (
    28.4267, 10.9323, 6.7431, 4.60346, 4.98693, 3.82529, 3.30089, 2.87707, 2.63112, 2.35461,
    2.26225, 2.04598, 2.03876, 1.77231, 1.74975, 1.58609, 1.48364, 1.40201, 1.34926, 1.27189,
)
# fmt: on
_MNIST = dict(input_size=(1, 28, 28), mean=(0.1307,), std=(0.3081,))

default_cfgs = generate_default_cfgs(
    {
        name: small_cfg(name, first_conv='stages.0.conv1.small', **settings)
        for name, settings in {
            'smpconv_seq_mnist.smnist': _MNIST,
            'smpconv_seq_pmnist.pmnist': dict(_MNIST, fixed_input_size=True),
            'smpconv_seq_cifar.scifar10': dict(
                input_size=(3, 32, 32), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD
            ),
            'smpconv_seq_chartraj.ct': dict(
                input_size=(3, 1, 182), num_classes=20, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
            ),
            'smpconv_seq_speech.sc': dict(input_size=(20, 1, 161), mean=_MFCC_MEAN, std=_MFCC_STD),
            'smpconv_seq_speech_raw.sc_raw': dict(input_size=(1, 1, 16000), mean=(0.0,), std=(1.0,)),
        }.items()
    }
)


@register_model
def smpconv_seq_mnist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sequential MNIST, 784 steps."""
    return _create_smpconv_seq('smpconv_seq_mnist', pretrained, kwargs, 784, 0.002)


@register_model
def smpconv_seq_pmnist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sequential MNIST with permuted pixels, 784 steps; the authors drew the permutation with numpy's seed 0."""
    height, width = to_2tuple(kwargs.pop('img_size', None) or 28)
    length = height * width
    kwargs = dict(dict(kernel_size=length, permutation=np.random.RandomState(0).permutation(length).tolist()), **kwargs)
    model = _create_smpconv_seq('smpconv_seq_pmnist', pretrained, kwargs, 784, 0.002)
    # what timm would have noted (1.0.31), if the network took img_size
    model._traits = dict(getattr(model, '_traits', {}), img_size=(height, width))
    return model


@register_model
def smpconv_seq_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sequential CIFAR-10, 1024 steps."""
    return _create_smpconv_seq('smpconv_seq_cifar', pretrained, kwargs, 1024, 0.002, conv_bias=True)


@register_model
def smpconv_seq_chartraj(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Character trajectories, 182 steps."""
    return _create_smpconv_seq('smpconv_seq_chartraj', pretrained, kwargs, 182, 0.012, conv_bias=True)


@register_model
def smpconv_seq_speech(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Speech Commands as 161 frames of 20 MFCC."""
    return _create_smpconv_seq('smpconv_seq_speech', pretrained, kwargs, 161, 0.012, conv_bias=True)


@register_model
def smpconv_seq_speech_raw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Speech Commands as 16,000 samples."""
    return _create_smpconv_seq('smpconv_seq_speech_raw', pretrained, kwargs, 16000, 0.0002)
