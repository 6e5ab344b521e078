"""The large kernels of a network: what they look like, and how far they reach."""

import dataclasses
from typing import Iterator, Optional, Tuple

import torch
from torch import nn

from .layers import CausalConv1d, LargeConv1d, LargeConv2d, PeripheralConv2d, SMPConv1d, SMPConv2d, SMPKernel

__all__ = ['LayerKernel', 'find_kernels']

_IDLE = 1e-3  # of the largest value of a layer, below which all values of a filter count as nothing
_RENDERED = (SMPConv1d, SMPConv2d, PeripheralConv2d)
_PLAIN = (CausalConv1d, LargeConv1d, LargeConv2d)


@dataclasses.dataclass(frozen=True)
class LayerKernel:
    """What there is to see of the kernel of a layer.

    Attributes:
        name: The layer in its network.
        shape: Of the whole kernel, (filters, channels of a filter, *taps).
        some: A few of its kernels, (n, *taps): those of the first channels of the first filter that is not idle or,
            where a filter has one channel, of the first such filters.
        total: Sum of the absolute values of all, (*taps).
        num_idle: Filters whose values are all below a thousandth of the largest one of the layer: training has given
            them up.
        causal: The last tap is the present; else the one in the middle.
        coords: Coordinates of the points of `some`, (n, points, d), or None.
        radii: Their radii, (n, points), or None.
    """

    name: str
    shape: Tuple[int, ...]
    some: torch.Tensor
    total: torch.Tensor
    num_idle: int = 0
    causal: bool = False
    coords: Optional[torch.Tensor] = None
    radii: Optional[torch.Tensor] = None

    @property
    def num_points(self) -> Optional[int]:
        """Points of a filter, None of a kernel without points."""
        return None if self.coords is None else self.coords.shape[1]

    def reach(self, share: float) -> int:
        """Taps that hold a share of the kernel, by the sum of absolute values.

        Args:
            share: Between 0 and 1.

        Returns:
            Side of the smallest window around the middle, or number of the latest taps of a causal kernel; 0 of a
            kernel that is zero.
        """
        distance = torch.zeros(self.total.shape, dtype=torch.long)
        for dim, taps in enumerate(self.total.shape):
            steps = torch.arange(taps)
            away = taps - 1 - steps if self.causal else (steps - taps // 2).abs()
            distance = torch.maximum(distance, away.reshape([-1 if d == dim else 1 for d in range(self.total.ndim)]))
        held = torch.bincount(distance.flatten(), self.total.flatten().double()).cumsum(0)
        if not held[-1] > 0:
            return 0
        farthest = int((held < share * held[-1]).sum())
        return farthest + 1 if self.causal else 2 * farthest + 1


@torch.no_grad()
def find_kernels(model: nn.Module, count: int = 6) -> Iterator[LayerKernel]:
    """The kernels of a network that are rendered or, if it has none of these, those of its plain large convolutions.

    A layer's kernel alone, without the small one beside it and the norms behind it, which a deployed network has in
    its plain convolutions.

    Args:
        model: A network with layers of this package.
        count: Kernels of a layer to look at one by one.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _RENDERED)]
    if not layers:
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _PLAIN)]
    for name, layer in layers:
        kernel = (layer.kernel() if isinstance(layer, _RENDERED) else layer.weight).detach().float().cpu()
        strength = kernel.abs().flatten(1).amax(1)
        busy = (strength > _IDLE * strength.max()).nonzero()[:, 0]
        first = busy if len(busy) else torch.arange(len(strength))
        first = first[:count] if kernel.shape[1] == 1 else first[:1]
        some = kernel[first].flatten(0, 1)[:count]
        points = {}
        if isinstance(layer, _RENDERED) and isinstance(layer.kernel, SMPKernel):
            for key, value in (('coords', layer.kernel.coords), ('radii', layer.kernel.radius)):
                value = value.detach().float().cpu()
                value = value if layer.kernel.shared_points else value[first]
                points[key] = value.expand(len(some), *value.shape[1:])
        yield LayerKernel(
            name=name,
            shape=tuple(kernel.shape),
            some=some.clone(),
            total=kernel.abs().sum((0, 1)),
            num_idle=len(strength) - len(busy),
            causal=isinstance(layer, CausalConv1d) or getattr(layer, 'causal', False),
            **points,
        )
