"""State dicts of the reference implementation, and of other input channels, in the layout of this package."""

import re
from typing import Any, Callable, Dict, Match, Sequence, Tuple, Union

import torch

__all__ = ['Rules', 'adapt_input_channels', 'convert_reference', 'unwrap_checkpoint']

Rules = Sequence[Tuple[str, Union[str, Callable[[Match[str]], str]]]]  # regular expressions and replacements

# weight averages first: the published accuracies are theirs
_NESTED = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_PREFIXES = ('module.', '_orig_mod.')
_EMPTY_BUFFERS = ('kernel_coord', 'train_length', 'conv_kernel')


def unwrap_checkpoint(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without the prefixes of wrappers (DDP, torch.compile, EMA)."""
    nested = [checkpoint[key] for key in _NESTED if isinstance(checkpoint.get(key), dict)]
    if nested:  # an average that has not begun is empty
        return unwrap_checkpoint(next((inner for inner in nested if inner), nested[0]))
    state_dict = {}
    for key, value in checkpoint.items():
        while key.startswith(_PREFIXES):
            key = key.split('.', 1)[1]
        state_dict[key] = value
    return state_dict


def convert_reference(
    checkpoint: Dict[str, Any],
    rules: Rules,
) -> Dict[str, torch.Tensor]:
    """Converts a checkpoint in the reference layout; one in the layout of this package is only unwrapped.

    Args:
        checkpoint: State dict, possibly nested in a training checkpoint.
        rules: All applied in turn to each key of a reference checkpoint.

    Returns:
        State dict in the layout of this package.
    """
    state_dict = unwrap_checkpoint(checkpoint)
    if not any(key.endswith('.weight_coord') for key in state_dict):
        return state_dict
    converted = {}
    for key, value in state_dict.items():
        if key.rsplit('.', 1)[-1] in _EMPTY_BUFFERS:
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        module, _, last = key.rpartition('.')
        if last == 'weight_coord':
            key = f'{module}.coords'
        elif last == 'radius':
            value = value.flatten(1)
            converted[f'{module}.radius_offset'] = torch.zeros_like(value)
            key = f'{module}.base_radius'
        elif last == 'weights' and value.shape[0] == 1:  # depthwise: (1, C, N)
            value = value.transpose(0, 1)
        converted[key] = value
    return converted


def adapt_input_channels(
    state_dict: Dict[str, torch.Tensor],
    in_chans: int,
    names: Sequence[str],
) -> Dict[str, torch.Tensor]:
    """Adapts first-layer weights (O, I, ...) to another number of input channels, with timm's rule.

    timm itself only adapts Conv2d weights of three input channels.

    Args:
        state_dict: State dict in the layout of this package.
        in_chans: Input channels of the network.
        names: Keys of the first layer's weights; absent ones are passed over.

    Returns:
        The state dict, with the weights summed over the channels for one input channel, else repeated and scaled.
    """
    out = dict(state_dict)
    for name in names:
        if name not in out or out[name].shape[1] == in_chans:
            continue
        weight = out[name]
        chans = weight.shape[1]
        if in_chans == 1:
            out[name] = weight.float().sum(1, keepdim=True).to(weight.dtype)
        else:
            index = torch.arange(in_chans, device=weight.device) % chans
            out[name] = weight[:, index] * (chans / in_chans)
    return out
