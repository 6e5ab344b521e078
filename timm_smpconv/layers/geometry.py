"""Arguments of convolutions with outputs as large as their inputs, as torch.nn names them."""

import numbers
from typing import Any, Dict, Sequence, Tuple, Union

from timm.layers import to_ntuple
from torch import nn

__all__ = [
    'check_geometry',
    'check_groups',
    'check_same',
    'check_size',
    'fits_groups',
    'is_depthwise',
    'is_same',
    'same_geometry',
]


def check_size(kernel_size: Tuple[Any, ...], ndim: int, odd: bool = False) -> None:
    """Checks the numbers of taps of a kernel.

    Raises:
        ValueError: They are not `ndim` positive whole numbers, or not odd if they have to be.
    """
    whole = len(kernel_size) == ndim and all(isinstance(k, numbers.Integral) and k > 0 for k in kernel_size)
    if not whole or (odd and not all(k % 2 for k in kernel_size)):
        wanted = 'one number or height and width' if ndim == 2 else 'one number'
        raise ValueError(f'kernel_size must be {"odd and " if odd else ""}positive ({wanted}), got {kernel_size}.')


def check_groups(in_chs: int, out_chs: int, groups: int) -> None:
    """Checks that a convolution is dense or depthwise.

    Raises:
        ValueError: It is neither.
    """
    if not fits_groups(in_chs, out_chs, groups):
        raise ValueError(
            f'groups must be 1 (dense) or equal to in_chs and out_chs (depthwise), '
            f'got groups={groups}, in_chs={in_chs}, out_chs={out_chs}.'
        )


def check_same(in_chs: int, out_chs: int, kernel_size: Tuple[Any, ...], groups: int, ndim: int) -> None:
    """Checks size and groups of a convolution that is centred on its outputs.

    Raises:
        ValueError: The kernel is of even size or none, or the convolution is neither dense nor depthwise.
    """
    check_size(kernel_size, ndim, odd=True)
    check_groups(in_chs, out_chs, groups)


def check_geometry(conv: nn.Module, **values: Tuple[Any, Tuple[int, ...]]) -> None:
    """Checks arguments that a convolution has for those of torch.nn: what was given, and the only value that works.

    Raises:
        ValueError: Another value was given.
    """
    for name, (value, wanted) in values.items():
        if (value if isinstance(value, (tuple, list)) else (value,) * len(wanted)) not in (wanted, list(wanted)):
            raise ValueError(f'{type(conv).__name__} has {name}={wanted}, got {value}: torch.nn has layers for others.')


def same_geometry(
    conv: nn.Module, size: Tuple[int, ...], stride: Any, padding: Any, dilation: Any
) -> Dict[str, Tuple[int, ...]]:
    """Checks arguments; returns padding and dilation of a convolution with outputs as large as its inputs.

    Raises:
        ValueError: A dilation below 1, a stride, or another padding.
    """
    dilation = to_ntuple(len(size))(dilation)
    if len(dilation) != len(size) or not all(isinstance(d, numbers.Integral) and d >= 1 for d in dilation):
        raise ValueError(f'dilation must be positive (one number, or rows and columns), got {dilation}.')
    same = _same_padding(size, dilation)
    padding = same if padding is None or padding == 'same' else padding
    check_geometry(conv, stride=(stride, (1,) * len(size)), padding=(padding, same))
    return dict(padding=same, dilation=dilation)


def is_same(conv: Union[nn.Conv1d, nn.Conv2d]) -> bool:
    """Whether a convolution with an odd kernel pads with zeros to the same size, without strides, in 1D undilated."""
    ones = (1,) * len(conv.kernel_size)
    to_tuple = to_ntuple(len(ones))
    dilation = to_tuple(conv.dilation)
    same = _same_padding(conv.kernel_size, dilation)
    padding = same if conv.padding == 'same' else to_tuple(conv.padding)
    is_dilated_1d = len(ones) == 1 and dilation != ones
    return (conv.padding_mode, padding, to_tuple(conv.stride)) == ('zeros', same, ones) and not is_dilated_1d


def fits_groups(in_chs: int, out_chs: int, groups: int) -> bool:
    """Whether a convolution is dense or depthwise."""
    return groups == 1 or groups == in_chs == out_chs


def is_depthwise(in_chs: int, out_chs: int, groups: int) -> bool:
    """Whether a convolution that is one or the other counts as depthwise: one of a single channel does."""
    return groups > 1 or in_chs == out_chs == 1


def _same_padding(size: Sequence[int], dilation: Sequence[int]) -> Tuple[int, ...]:
    return tuple(k // 2 * d for k, d in zip(size, dilation))
