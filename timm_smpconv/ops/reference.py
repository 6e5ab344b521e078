"""The definition, in float64: what every other backend is tested against."""

import itertools
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from .context import Keep

__all__ = ['correlate']


def correlate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    left: Tuple[int, ...],
    depthwise: bool,
    keep: Optional[Keep] = None,
) -> torch.Tensor:
    """One shifted copy of the input per tap; see `fft.correlate` for the arguments."""
    taps = weight.shape[2:]
    pad = []
    for k, p in zip(reversed(taps), reversed(left)):
        pad += [p, k - 1 - p]
    padded, kernel = F.pad(x.double(), pad), weight.double()
    y = 0.0 if bias is None else bias.double().reshape(1, -1, *[1] * len(taps))
    for offset in itertools.product(*map(range, taps)):
        shifted, tap = padded, kernel
        for dim, (o, n) in enumerate(zip(offset, x.shape[2:])):
            shifted, tap = shifted.narrow(2 + dim, o, n), tap.select(2, o)
        if depthwise:
            y = y + shifted * tap.reshape(1, -1, *[1] * len(taps))
        else:
            y = y + torch.einsum('bi...,oi->bo...', shifted, tap)
    return y.to(x.dtype)
