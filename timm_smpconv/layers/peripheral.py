"""Convolution kernels whose outer taps share parameters (PeLK, CVPR 2024)."""

import numbers
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .geometry import check_size
from .kernel import RenderedKernel

__all__ = ['PeripheralKernel', 'sharing_grid']


def sharing_grid(kernel_size: int, center_size: int = 5, base: int = 2) -> List[int]:
    """Widths of the cells into which peripheral convolution divides each side of a kernel (Eq. 2).

    One in the centre, then powers of the base; the outermost cell at each end takes what is left.

    Args:
        kernel_size: Taps of the kernel in each dimension, odd.
        center_size: Taps of the centre in each dimension that have parameters of their own, odd.
        base: Factor by which cells grow, at least 1.

    Returns:
        Widths from one end to the other, symmetric, with the sum kernel_size.

    Raises:
        ValueError: A size is even or out of range, or the base is no whole number or smaller than 1.
    """
    for name, value in (('kernel_size', kernel_size), ('center_size', center_size)):
        if not isinstance(value, numbers.Integral) or value < 1 or value % 2 == 0:
            raise ValueError(f'{name} must be odd and positive, got {value}.')
    if not isinstance(base, numbers.Integral) or base < 1:
        raise ValueError(f'base must be a whole number, at least 1, got {base}.')
    center = min(center_size, kernel_size)
    left, width, side = (kernel_size - center) // 2, base, []
    while left > 0:
        side.append(min(width, left))
        left -= side[-1]
        width *= base
    return [*side[::-1], *[1] * center, *side]


class PeripheralKernel(RenderedKernel):
    """A k x k kernel made of k' x k' parameters; calling it renders the dense kernel.

    The sharing grid divides both sides of the kernel into k' cells, of one tap in the centre and exponentially wider
    ones towards the border. All taps of a cell have the same parameter (section 4.1 of the paper, Eq. 1, 2).

    A small kernel with parameters of its own is added in the centre: the parallel branch of RepLKNet, SLaK and PeLK,
    which, without norms in between, is one convolution with the sum of both kernels from the start.

    Attributes:
        grid: widths of the cells, from one end to the other.
        weights: parameters of the cells, (out_chs, in_chs, k', k').
        small: the small kernel, (out_chs, in_chs, s, s), or None.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        center_size: int = 5,
        base: int = 2,
        grid: Optional[Sequence[int]] = None,
        small_kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels of one filter (1 for a depthwise convolution).
            out_chs: Number of filters.
            kernel_size: Taps in each dimension, odd.
            center_size: Taps of the unshared centre in each dimension, odd.
            base: Factor by which the cells grow.
            grid: Widths of all cells instead of those that follow from center_size and base; symmetric.
            small_kernel_size: Taps of the small kernel in each dimension, odd; 0 for none.

        Raises:
            ValueError: An argument cannot work.
        """
        super().__init__()
        check_size((kernel_size,), 1, odd=True)
        self.grid: List[int] = sharing_grid(kernel_size, center_size, base) if grid is None else list(grid)
        if sum(self.grid) != kernel_size or self.grid != self.grid[::-1] or min(self.grid) < 1:
            raise ValueError(
                f'grid must be symmetric and have positive widths with the sum kernel_size, {kernel_size}, '
                f'got {tuple(self.grid)} with the sum {sum(self.grid)}.'
            )
        if small_kernel_size < 0 or (small_kernel_size and small_kernel_size % 2 == 0):
            raise ValueError(f'small_kernel_size must be odd, or 0 for none, got {small_kernel_size}.')
        self.in_chs = in_chs
        self.out_chs = out_chs
        self.kernel_size: List[int] = [kernel_size, kernel_size]
        dd = {'device': device, 'dtype': dtype}
        cells, taps = len(self.grid), min(small_kernel_size, kernel_size)
        self.weights = nn.Parameter(torch.empty(out_chs, in_chs, cells, cells, **dd))
        self.small = nn.Parameter(torch.empty(out_chs, in_chs, taps, taps, **dd)) if taps else None
        # runs of cells of one width, (first, number, width): few repetitions, none of which needs a tensor of indices
        self._runs: List[Tuple[int, int, int]] = []
        for i, width in enumerate(self.grid):
            if self._runs and self._runs[-1][2] == width:
                first, count, _ = self._runs.pop()
                self._runs.append((first, count + 1, width))
            else:
                self._runs.append((i, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters."""
        nn.init.trunc_normal_(self.weights, std=0.02)
        if self.small is not None:
            nn.init.trunc_normal_(self.small, std=0.02)

    def forward(self) -> torch.Tensor:
        """The dense kernel, (out_chs, in_chs, kernel_size, kernel_size)."""
        kernel = self._widen(self._widen(self.weights, 3), 2)
        if self.small is not None:
            side = (self.kernel_size[0] - self.small.shape[3]) // 2
            kernel = kernel + F.pad(self.small, [side, side, side, side])
        # as it is already: torch's older exporter to ONNX would not know the number of taps
        return kernel.reshape(self.out_chs, self.in_chs, self.kernel_size[0], self.kernel_size[1])

    def _widen(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Repeats the entries along a dimension by the widths of their cells."""
        parts = []
        for first, count, width in self._runs:
            parts.append(x.narrow(dim, first, count).repeat_interleave(width, dim))
        return torch.cat(parts, dim)

    @torch.jit.unused
    def tensors(self) -> Tuple[Optional[torch.Tensor], ...]:
        """All tensors that the kernel depends on."""
        return self.weights, self.small

    def extra_repr(self) -> str:
        return f'{self.in_chs}, {self.out_chs}, kernel_size={tuple(self.kernel_size)}, grid={tuple(self.grid)}'
