"""What models this package has: sizes, costs and weights of all of them."""

import dataclasses
import math
from typing import List, Optional, Tuple

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from .layers import PeripheralConv2d, SMPConv1d, SMPConv2d
from .weights import WEIGHTS

__all__ = [
    'ModelInfo',
    'check_known',
    'count_macs',
    'describe_models',
    'full_name',
    'model_names',
    'weights_names',
]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One model with one set of weights.

    Attributes:
        name: Registered name.
        tag: Tag of the weights: `name.tag` selects them.
        params: Parameters, in the form that is trained.
        macs: Multiply-adds of the convolutions at the input size, see `count_macs`.
        input_size: Channels, height, width.
        num_classes: Classes of the weights.
        trained_on: Data that the weights were, or would be, trained on.
        accuracy: Top-1 accuracy of the bundled weights, measured by us, in percent.
        paper_accuracy: Top-1 accuracy that the paper reports, in percent.
        source: Where the weights come from.
        url: Page of the authors' checkpoint.
        license: Licence of the weights.
    """

    name: str
    tag: str
    params: int
    macs: int
    input_size: Tuple[int, ...]
    num_classes: int
    trained_on: str
    accuracy: Optional[float]
    paper_accuracy: float
    source: str
    url: Optional[str]
    license: str


def model_names() -> List[str]:
    """Registered models of this package, and of no other one that may share their prefixes."""
    package = __package__ + '.'
    names = timm.list_models(['pelk*', 'smpconv*'])
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith(package)]


def weights_names(name: str) -> List[str]:
    """`model.tag` of all weights for the network of `model` or `model.tag`."""
    architecture = split_model_name_tag(name)[0]
    return [key for key in WEIGHTS if split_model_name_tag(key)[0] == architecture]


def full_name(name: str) -> str:
    """`model.tag` of what `model` or `model.tag` of this package selects."""
    return f'{split_model_name_tag(name)[0]}.{timm.get_pretrained_cfg(name).tag}'


def check_known(name: str) -> None:
    """Checks that `model` or `model.tag` is of this package.

    Raises:
        ValueError: It is not.
    """
    architecture, tag = split_model_name_tag(name)
    if architecture not in model_names():
        raise ValueError(f'Unknown model {name!r}: expected one of {", ".join(model_names())}.')
    if tag and name not in weights_names(name):
        raise ValueError(
            f'Unknown weights {name!r}: expected {architecture} or one of {", ".join(weights_names(name))}.'
        )


def count_macs(model: nn.Module, input_size: Tuple[int, ...]) -> int:
    """Multiply-adds of all convolutions, and linear layers between them, for one input, as the papers count.

    Both branches of a two-branch block count, and all taps of a kernel, also those that only meet padding. Rendering
    the kernels (nothing once deployed) and the linear classifier do not count.

    Args:
        model: Network on any device; on the meta device nothing is computed.
        input_size: Shape of one input, without the batch dimension.

    Returns:
        Number of multiply-adds.
    """
    macs = 0

    def count(module: nn.Module, _: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, rendered):
            taps = module.kernel.in_chs * math.prod(module.kernel.kernel_size)
        else:
            taps = module.weight[0].numel()
        macs += output.numel() * taps

    rendered = (PeripheralConv2d, SMPConv1d, SMPConv2d)
    counted = (nn.Conv1d, nn.Conv2d, nn.Linear, *rendered)
    classifier = model.get_classifier()
    layers = [m for m in model.modules() if isinstance(m, counted) and m is not classifier]
    handles = [layer.register_forward_hook(count) for layer in layers]
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    return macs


def describe_models() -> List[ModelInfo]:
    """All models of this package with their weights, in the order of their names."""
    infos = []
    for name in model_names():
        model = timm.create_model(name, device='meta')
        params = sum(p.numel() for p in model.parameters())
        for key in weights_names(name):
            weights = WEIGHTS[key]
            cfg = timm.get_pretrained_cfg(key)
            infos.append(
                ModelInfo(
                    name=name,
                    tag=cfg.tag,
                    params=params,
                    macs=count_macs(model, cfg.input_size),
                    input_size=tuple(cfg.input_size),
                    num_classes=cfg.num_classes,
                    trained_on=weights.trained_on,
                    accuracy=weights.accuracy,
                    paper_accuracy=weights.paper_accuracy,
                    source=weights.source,
                    url=weights.authors_url,
                    license=weights.license,
                )
            )
    return infos
