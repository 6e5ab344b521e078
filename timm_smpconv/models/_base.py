"""What the networks of this package share: the timm model interface over `stem`, `stages`, `norm` and `head`."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import RenderedKernel, is_foldable, no_weight_decay, norm_to_conv
from ..layout import Rules, convert_reference

__all__ = ['LargeKernelNet', 'StageGeometry', 'check_input', 'check_stages', 'init_weights', 'plan_stages']


@register_notrace_function
def check_input(x: torch.Tensor, sequence: bool) -> torch.Tensor:
    """Returns the input unchanged if it has as many dimensions as a network takes; the first layer knows its channels.

    Args:
        x: Network input.
        sequence: (B, C, L) is allowed beside (B, C, H, W).

    Raises:
        ValueError: A wrong number of dimensions.
    """
    if not torch.jit.is_scripting():
        if not (x.ndim == 4 or (sequence and x.ndim == 3)):
            expected = '(batch, channels, height, width)' + (' or (batch, channels, length)' if sequence else '')
            raise ValueError(f'Expected an input of shape {expected}, got {tuple(x.shape)}.')
    return x


def check_stages(depths: Sequence[int], dims: Sequence[int], kernel_sizes: Sequence[int]) -> None:
    """Checks that three arguments of a network have one entry for each of its stages.

    Raises:
        ValueError: They differ in length.
    """
    if not len(depths) == len(dims) == len(kernel_sizes):
        raise ValueError(
            f'depths, dims and kernel_sizes must have one entry per stage, '
            f'got {tuple(depths)}, {tuple(dims)} and {tuple(kernel_sizes)}.'
        )


class StageGeometry(NamedTuple):
    """How a stage of an ImageNet network reduces the resolution.

    Attributes:
        stride: Of the transition into the stage; 1 for none, or for one whose stride has become dilation.
        first_dilation: Of the transition.
        dilation: Of the blocks.
        reduction: Pixels of the image for one of the stage's maps, in each dimension.
    """

    stride: int
    first_dilation: int
    dilation: int
    reduction: int


def plan_stages(num_stages: int, output_stride: Optional[int]) -> List[StageGeometry]:
    """Geometry of all stages behind a stem that reduces by four: each halves the resolution but the first.

    From `output_stride` on none does, and the distance of the taps doubles instead, so that every second row and column
    of the maps is what it was (DeepLab's atrous convolution). A transition of 2 x 2 taps drops the last row of an odd
    number with a stride and keeps it without, which the kernels behind it see.

    Args:
        num_stages: Number of stages.
        output_stride: Largest reduction; None for no limit.

    Raises:
        ValueError: Another output stride than 4, 8, 16 or 32.
    """
    if output_stride not in (None, 4, 8, 16, 32):
        raise ValueError(f'output_stride must be 4, 8, 16 or 32, or None for no limit, got {output_stride}.')
    geometry = [StageGeometry(1, 1, 1, 4)]
    for _ in range(num_stages - 1):
        _, _, dilation, reduction = geometry[-1]
        if output_stride is not None and reduction >= output_stride:
            geometry.append(StageGeometry(1, dilation, 2 * dilation, reduction))
        else:
            geometry.append(StageGeometry(2, 1, 1, 2 * reduction))
    return geometry


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f'num_classes must not be negative (0 removes the classifier), got {num_classes}.')


def init_weights(module: nn.Module) -> None:
    """Draws the weights of a plain convolution or linear layer, as the ImageNet networks begin; for nn.Module.apply."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _deploy_parts(module: nn.Module) -> None:
    """What timm's reparameterize_model does in place, which goes on into parts that it has replaced: twice the time."""
    for name, child in module.named_children():
        if hasattr(child, 'fuse'):
            setattr(module, name, child.fuse())
            continue
        for method in ('reparameterize', 'switch_to_deploy'):
            if hasattr(child, method):
                getattr(child, method)()
                break
        _deploy_parts(child)


class LargeKernelNet(nn.Module):
    """Base of all networks: subclasses build `stem`, `stages`, `norm`, `head`, `feature_info` and `num_features`."""

    __jit_unused_properties__ = ['_model_args']
    reference_rules: Rules = ()  # which rename the keys of the reference implementation
    first_layer: Tuple[str, ...] = ()  # keys of the weights (O, I, ...) that see the input

    def __init__(self, num_classes: int, in_chans: int, sequence: bool = False):
        """
        Args:
            num_classes: Number of classes; 0 for no classifier.
            in_chans: Input channels.
            sequence: The network takes (B, C, L) as well as (B, C, H, W).

        Raises:
            ValueError: A number is out of range.
        """
        super().__init__()
        self._given_args: Dict[str, Any] = {}
        self.sequence = sequence
        if in_chans < 1:
            raise ValueError(f'in_chans must be positive, got {in_chans}.')
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 0
        self.feature_info: List[Dict[str, Any]] = []
        self.stem = nn.Identity()
        self.stages = nn.Sequential()
        self.norm = nn.Identity()
        self.head = nn.Identity()

    @torch.jit.ignore
    def _finish(self, inference_mode: bool) -> None:
        """The end of construction: notes what the head takes, and builds the deployed form if that is wanted."""
        self._note_head()
        if inference_mode:
            self.eval().reparameterize().train()

    @torch.jit.ignore
    def reparameterize(self) -> 'LargeKernelNet':
        """Renders all kernels and folds norms, small branches and scales into them, in place.

        What is left are plain convolutions, linear layers and activations, with the same outputs up to rounding.
        Harmless the second time. (timm.utils.reparameterize_model folds running statistics in train mode too.)

        Returns:
            The model itself.

        Raises:
            RuntimeError: The model or one of its norms is in train mode, or a part of it has been replaced by something
                else.
        """
        # other parts may be: dropout that goes on in inference
        if self.training or any(m.training and isinstance(m, _BatchNorm) for m in self.modules()):
            raise RuntimeError(
                f'{type(self).__name__} cannot be reparameterized in train mode, where batch norms use the statistics '
                f'of the batch: call model.eval() first.'
            )
        with torch.inference_mode(False):  # the new parameters may be trained
            _deploy_parts(self)
            if is_foldable(self.norm):  # an AffineNorm that was synchronised, or frozen and unfrozen
                self.norm = norm_to_conv(self.norm)
        return self

    @property
    def _model_args(self) -> Dict[str, Any]:
        """Arguments from which timm builds the network of a folder for the Hub, in the form that it has now."""
        rendered = not any(isinstance(m, RenderedKernel) for m in self.modules())
        return dict(self._given_args, **(dict(inference_mode=True) if rendered else {}))

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self._given_args = dict(args)

    @torch.jit.ignore
    def convert_checkpoint(self, checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """Brings a checkpoint, in this package's layout or in that of the reference, into this package's layout.

        Args:
            checkpoint: State dict, possibly nested in a training checkpoint.

        Returns:
            State dict; nothing in it is adapted to the arguments of the network.
        """
        return convert_reference(checkpoint, self.reference_rules)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the coordinates and radii of all points, and of positional embeddings."""
        return no_weight_decay(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.(?:downsample|pos_embed)', (0,)),  # with the first block
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of each block in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Number of classes; 0 removes the classifier.
            global_pool: Pooling; None keeps it, '' removes it.

        Raises:
            ValueError: A negative number of classes.
        """
        _check_num_classes(num_classes)
        self.head.reset(num_classes, global_pool)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype).train(self.training)
        self._note_head()

    @torch.jit.ignore
    def _note_head(self) -> None:
        """Brings `head_hidden_size` up to date: some poolings make more channels of them."""
        pool = getattr(self.head, 'global_pool', None)
        self.head_hidden_size = self.num_features * (pool.feat_mult() if pool is not None else 1)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that also returns the outputs of stages.

        Args:
            x: Input, (B, C, H, W), for sequence networks also (B, C, L).
            indices: Stages to take: the last n if a number, all if None.
            norm: Apply the final norm to the output of the last stage.
            stop_early: Leave out the stages behind the last one taken.
            output_fmt: 'NCHW', the only format.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or the final features and the intermediates.

        Raises:
            ValueError: Another output format.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(check_input(x, self.sequence))
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Removes what the given intermediates do not need: stages behind them, with these the norm and the classifier.

        Args:
            indices: Stages to keep, as in forward_intermediates.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            Indices of the stages taken.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        ends_early = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or ends_early:  # the norm is that of the last stage
            self.norm = nn.Identity().train(self.training)
        if ends_early:
            self.num_features = self.head.in_features = self.feature_info[max_index]['num_chs']
        if prune_head or ends_early:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Input to the final, unpooled feature map."""
        x = check_input(x, self.sequence)
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Final feature map to logits, or to pooled features if pre_logits."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), for sequence networks also (B, C, L), to (B, num_classes)."""
        x = self.forward_features(x)
        return self.forward_head(x)
