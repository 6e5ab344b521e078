"""Direct convolution: torch's own, on the memory format in which it is fast."""

from typing import Tuple

import torch
import torch.nn.functional as F

__all__ = ['correlate']


def correlate(x: torch.Tensor, weight: torch.Tensor, left: Tuple[int, ...], depthwise: bool) -> torch.Tensor:
    """See `fft.correlate` for the arguments."""
    groups = x.shape[1] if depthwise else 1
    if x.ndim == 3:
        return F.conv1d(F.pad(x, (left[0], weight.shape[2] - 1 - left[0])), weight, groups=groups)
    return F.conv2d(x, weight, padding=left, groups=groups)
