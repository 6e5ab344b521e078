"""Continuous convolution kernels rendered from self-moving points (SMPConv, CVPR 2023)."""

import math
import numbers
from typing import Hashable, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops.context import full_precision, is_transformed
from .cache import DropsCaches, ValueCache, wants_gradients
from .plain import has_hooks

__all__ = ['RenderedKernel', 'SMPKernel', 'no_weight_decay', 'with_all_taps']

_SUPPORT_STEP = 32  # taps by which rendered causal kernels differ in length
_MIN_SPARSITY = 4  # taps for one that a point may reach, from which they are better looked up
# what a kernel is computed by
_COMPUTING = ('forward', 'radius', '_render', '_render_full_precision', '_reach_of_few_taps', '_widen')


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f'{name} must be positive, got {value}.')


class RenderedKernel(DropsCaches):
    """A module whose call renders a dense kernel.

    Subclasses give `forward` and `tensors`. One that overrides `forward` alone is called each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rendered = ValueCache()  # kernel of eval mode

    def for_convolution(self) -> torch.Tensor:
        """The kernel at its own size, as a convolution needs it: rendered as rarely and as short as possible.

        In eval mode, where no gradient of a parameter is wanted, the kernel is rendered once and again when a parameter
        has changed. Leading taps may be missing, see `render_reached`. Both need the values of the parameters: where
        they are not at hand (torch.compile, export, tracing) or reading them would wait for a GPU, the whole kernel is
        rendered each time.

        Returns:
            Kernel, (out_chs, in_chs, kh, kw), or (out_chs, in_chs, taps) with the last taps if causal, which
            `with_all_taps` completes. Not to be changed in place.
        """
        if torch.jit.is_scripting():
            return self.forward()
        return self._for_convolution()

    @torch.jit.unused
    def _for_convolution(self) -> torch.Tensor:
        tensors = self.tensors()
        # parametrizations may draw: what is computed once would not fit what is computed the next time
        if not ValueCache.usable(tensors) or has_hooks(self) or is_parametrized(self) or not self._knows_forward():
            return self()
        if self.training or wants_gradients(tensors):
            return self.render_reached()
        return self._rendered.get(tensors, self.render_reached, self.settings())

    def _knows_forward(self) -> bool:
        """Whether `tensors` and `render_reached` are of `forward`, and not of what a subclass has overridden."""

        def owner(name: str) -> type:
            return next((c for c in type(self).__mro__ if name in vars(c)), RenderedKernel)

        computing = [owner(name) for name in _COMPUTING]
        if not all(issubclass(owner('tensors'), cls) for cls in computing):
            return False
        return owner('render_reached') is RenderedKernel or issubclass(owner('render_reached'), owner('forward'))

    @torch.jit.unused
    def tensors(self) -> Tuple[Optional[torch.Tensor], ...]:
        """All tensors that the kernel depends on."""
        # not parameters(), which copies for other devices and sharded modules lack
        raise NotImplementedError

    @torch.jit.unused
    def settings(self) -> Hashable:
        """All else that the kernel depends on."""
        return ()

    @torch.jit.unused
    def render_reached(self) -> torch.Tensor:
        """The kernel at its own size, if causal perhaps without leading taps that are zero; reads values."""
        return self.forward()


class SMPKernel(RenderedKernel):
    """A convolution kernel given by moving points; calling it renders the dense kernel.

    The kernel is a function on [-1, 1]^d made of N points with coordinates p_i, radii r_i and weights w_i (Eq. 1, 2):

        SMP(x) = 1 / |N(x)| * sum_i g(x, p_i, r_i) w_i,   g(x, p, r) = max(0, 1 - |x - p|_1 / r),   N(x) = {i : g > 0}

    sampled at linspace(-1, 1, k) in each dimension; a single tap lies in the middle, at 0, or if causal at the present,
    +1 (in the reference at -1, where hardly a point reaches it), and so do all fresh points along that dimension. In
    2D, coordinate 0 runs along the width from left to right and coordinate 1 along the height from bottom to top, so
    row 0 of the rendered kernel lies at coordinate +1.

    The radii are learned 0.1 x as fast as everything else and stay within a range. Both live in the parameter, not in
    the training script: radius = base_radius + radius_lr_scale * radius_offset, where the buffer `base_radius` holds
    where training started and the parameter `radius_offset` receives the gradient of the radius itself. So a step of
    SGD or of an Adam-type optimizer moves the radius radius_lr_scale times as far as it would move a plain parameter.
    The offset is projected into its range when the next training step (or a checkpoint, or an EMA update) reads it.

    Coordinates and radii are never of less than single precision, whatever the module is cast to: between two numbers
    of bfloat16 lie many taps of a long kernel. The kernel has the dtype of the weights.

    Attributes:
        coords: point coordinates, (G, N, d) with G = 1 if the points are shared, else out_chs. Never clipped.
        radius: effective radii, (G, N), always within radius_range.
        weights: point weights, (out_chs, in_chs, N).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: Union[int, Sequence[int]],
        ndim: int = 2,
        num_points: int = 16,
        radius: float = 0.12,
        coord_std: float = 0.05,
        shared_points: bool = False,
        normalize: bool = True,
        causal: bool = False,
        radius_range: Tuple[float, float] = (1e-4, 1.0),
        radius_lr_scale: float = 0.1,
        learn_coords: bool = True,
        learn_radius: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Input channels of one filter (1 for a depthwise convolution).
            out_chs: Number of filters.
            kernel_size: Taps in each dimension (height, width in 2D); one number for all or one per dimension.
            ndim: 1 or 2, the dimension d of the kernel.
            num_points: Number of points N of one filter.
            radius: Initial radius, in units of the kernel's half width; within radius_range.
            coord_std: Standard deviation of the initial coordinates, a normal distribution cut to [-1, 1].
            shared_points: One set of points for all filters (depthwise networks) instead of one per filter.
            normalize: Divide by the number of points that reach a tap (1 / |N(x)| of Eq. 1).
            causal: Draw the initial coordinates near +1, the present: p = 2 q + 1 with q cut to [-1, 0] (1D only).
            radius_range: Range into which the radii are projected after each step.
            radius_lr_scale: Learning rate of the radii relative to that of all other parameters.
            learn_coords: Learn the coordinates; False keeps them fixed (Table 6).
            learn_radius: Learn the radii; False keeps them fixed (Table 6).
            dtype: Of the weights, and of coordinates and radii if it is not of less than single precision.

        Raises:
            ValueError: An argument cannot work.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        dd = {'device': device, 'dtype': torch.promote_types(dtype, torch.float32)}
        super().__init__()
        if ndim not in (1, 2):
            raise ValueError(f'ndim must be 1 or 2, got {ndim}.')
        if causal and ndim != 1:
            raise ValueError('causal kernels are one-dimensional: causal=True needs ndim=1, got ndim=2.')
        for name, value in (('in_chs', in_chs), ('out_chs', out_chs), ('num_points', num_points)):
            if not isinstance(value, numbers.Integral):
                raise ValueError(f'{name} must be a whole number, got {value}.')
        for name, value in (
            ('in_chs', in_chs),
            ('out_chs', out_chs),
            ('num_points', num_points),
            ('radius', radius),
            ('coord_std', coord_std),
            ('radius_lr_scale', radius_lr_scale),
            ('radius_range[0]', radius_range[0]),
        ):
            _check_positive(name, value)
        if not radius_range[0] <= radius <= radius_range[1]:
            raise ValueError(f'radius must lie within radius_range {tuple(radius_range)}, got {radius}.')
        self.in_chs = in_chs
        self.out_chs = out_chs
        self.ndim = ndim
        sizes = [kernel_size] * ndim if isinstance(kernel_size, numbers.Number) else list(kernel_size)
        self._check_size(sizes)
        self.kernel_size: List[int] = [int(k) for k in sizes]
        self.num_points = num_points
        self.init_radius = radius
        self.coord_std = coord_std
        self.shared_points = shared_points
        self.normalize = normalize
        self.causal = causal
        self.min_radius, self.max_radius = float(radius_range[0]), float(radius_range[1])
        self.radius_lr_scale = radius_lr_scale
        self.learn_radius = learn_radius

        groups = 1 if shared_points else out_chs
        # first, as many ask the first parameter of a network for its dtype
        self.weights = nn.Parameter(torch.empty(out_chs, in_chs, num_points, device=device, dtype=dtype))
        self.coords = nn.Parameter(torch.empty(groups, num_points, ndim, **dd), requires_grad=learn_coords)
        self.register_buffer('base_radius', torch.empty(groups, num_points, **dd))
        self.radius_offset = nn.Parameter(torch.empty(groups, num_points, **dd), requires_grad=learn_radius)
        self.reset_parameters()

    def _apply(self, fn, recurse=True):
        points = [
            self._parameters.get('coords'),
            self._parameters.get('radius_offset'),
            self._buffers.get('base_radius'),
        ]
        points += [t.grad for t in points if t is not None]

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.element_size() >= 4 or not any(tensor is t for t in points):
                return result
            return tensor.to(result.device, torch.float32)  # what it was before it was rounded

        return super()._apply(apply, recurse)

    def reset_parameters(self) -> None:
        """Draws new coordinates and weights and sets all radii to their initial value."""
        if self.causal:
            nn.init.trunc_normal_(self.coords, std=self.coord_std, a=-1.0, b=0.0)
            with torch.no_grad():
                self.coords.mul_(2.0).add_(1.0)
        else:
            nn.init.trunc_normal_(self.coords, std=self.coord_std, a=-1.0, b=1.0)
        with torch.no_grad():
            for dim, taps in enumerate(reversed(self.kernel_size)):  # coordinate 0 runs along the width
                if taps == 1:
                    self.coords[..., dim] = 1.0 if self.causal else 0.0
        nn.init.constant_(self.base_radius, self.init_radius)
        nn.init.zeros_(self.radius_offset)
        nn.init.trunc_normal_(self.weights, std=0.02)

    @property
    def radius(self) -> torch.Tensor:
        """Effective radii, (G, N), within radius_range; in units of the kernel's half width."""
        offset = self.radius_offset
        value = self.base_radius + offset.detach() * self.radius_lr_scale
        # the difference is zero: it only carries the gradient of the radius, unscaled, to the parameter
        return value.clamp(self.min_radius, self.max_radius) + (offset - offset.detach())

    @torch.jit.unused
    @torch.no_grad()
    def set_radius(self, value: Union[float, torch.Tensor]) -> None:
        """Sets the radii.

        Args:
            value: Radii, (G, N) or one number for all, within radius_range.

        Raises:
            ValueError: A radius is out of range.
        """
        value = torch.as_tensor(value, dtype=self.base_radius.dtype, device=self.base_radius.device)
        if not ((value >= self.min_radius) & (value <= self.max_radius)).all():
            raise ValueError(
                f'radii must lie within [{self.min_radius}, {self.max_radius}], '
                f'got values from {value.min().item()} to {value.max().item()}.'
            )
        self.base_radius.copy_(value)
        self.radius_offset.zero_()

    def project(self) -> None:
        """Projects the radii into their range, by changing the offsets in place.

        Does nothing to offsets that cannot be changed: under torch.func, spread over processes (DTensor), of another
        special kind or expanded. Their radii stay within the range all the same, which `radius` sees to.
        """
        if not (self.learn_radius or self.radius_offset.requires_grad):  # frozen, and not unfrozen since
            return
        if not torch.jit.is_scripting():
            offset = self.radius_offset
            if is_transformed():
                return
            if type(offset.detach()) is not torch.Tensor or offset.shape != self.base_radius.shape:
                return
            if any(n > 1 and stride == 0 for n, stride in zip(offset.shape, offset.stride())):
                return
        with torch.no_grad():
            low = (self.min_radius - self.base_radius) / self.radius_lr_scale
            high = (self.max_radius - self.base_radius) / self.radius_lr_scale
            # data: autograd need not know, and refuses where the parameter is a view of others (FSDP, flat vectors)
            offset = self.radius_offset.data
            offset.copy_(torch.minimum(torch.maximum(offset, low), high))

    def forward(self, size: Optional[Union[int, List[int]]] = None) -> torch.Tensor:
        """Renders the kernel.

        Args:
            size: Taps to sample, one number or one per dimension (height, width in 2D); kernel_size if None.

        Returns:
            Dense kernel, (out_chs, in_chs, k) in 1D or (out_chs, in_chs, kh, kw) in 2D.
        """
        if self.training:
            self.project()
        if not torch.jit.is_scripting():
            if isinstance(size, numbers.Integral):  # those of numpy
                size = int(size)
        if size is None:
            dims = self.kernel_size
        elif isinstance(size, int):
            dims = [size] * self.ndim
        else:
            dims = list(size)
        if torch.jit.is_scripting():
            return self._render(dims, 0, [])
        self._check_size(dims)
        return self._render_full_precision(dims)

    @torch.jit.unused
    def tensors(self) -> Tuple[torch.Tensor, ...]:
        """All tensors that the kernel depends on."""
        return self.coords, self.base_radius, self.radius_offset, self.weights

    @torch.jit.unused
    def settings(self) -> Hashable:
        """All else that the kernel depends on."""
        radii = (self.radius_lr_scale, self.min_radius, self.max_radius)
        return (*self.kernel_size, self.normalize, self.causal, self.shared_points, *radii)

    @torch.jit.unused
    def render_reached(self) -> torch.Tensor:
        """The kernel at its own size, if causal without leading taps that no point reaches: fresh ones lie near +1."""
        if self.training:
            self.project()
        size = self.kernel_size
        # shared points are few: there is nothing to gain by looking up their taps
        if math.prod(size) < 2 * _SUPPORT_STEP or (self.shared_points and not self.causal):
            return self._render_full_precision(size)
        # of half precision if they were assigned so, which would lose the radius in the difference
        radius = self.radius.detach().to(torch.promote_types(self.radius_offset.dtype, torch.float32))
        first = (self.coords.detach() - radius.unsqueeze(2)).min().item()
        if not math.isfinite(first):
            return self._render_full_precision(size)
        skip = 0
        if self.causal:
            # one tap more than computed, against rounding, and few different numbers, as each is planned anew by an FFT
            needed = min(max((1.0 - first) / 2.0 * (size[0] - 1), 0.0), size[0]) + 2.0
            skip = max(size[0] - math.ceil(needed / _SUPPORT_STEP) * _SUPPORT_STEP, 0)
        # reached taps span two radii, that is radius * (taps - 1) steps; two more at each end, against rounding
        window = [int(radius.max().item() * (taps - 1)) + 5 for taps in size]
        sparse = _MIN_SPARSITY * math.prod(window) < math.prod(size) - skip
        return self._render_full_precision(size, skip, window if sparse else [])

    @torch.jit.unused
    def _render_full_precision(self, size: List[int], skip: int = 0, window: Sequence[int] = ()) -> torch.Tensor:
        # reduced precision would move the points of a long kernel by whole taps
        with full_precision(self.weights):
            return self._render(size, skip, list(window))

    def _render(self, size: List[int], skip: int, window: List[int]) -> torch.Tensor:
        """Renders a kernel.

        Args:
            size: Taps in each dimension.
            skip: Leading taps to leave out, in 1D.
            window: Taps in each dimension to look at for each point; empty for all.
        """
        dtype = self.weights.dtype
        compute = torch.float32 if dtype == torch.float16 or dtype == torch.bfloat16 else dtype
        coords, weights = self.coords.to(compute), self.weights.to(compute)
        # where the taps of each axis of the kernel lie: rows from top to bottom, columns from left to right
        axes = [_place_taps(k, self.causal, coords.device).to(compute) for k in size]
        axes = [axes[0].flip(0), axes[1]] if self.ndim == 2 else [axes[0][skip:]]
        radius = self.radius.to(compute).unsqueeze(2)
        if len(window) > 0:
            reach = self._reach_of_few_taps(coords, radius, axes, skip, window)
        else:
            distance = (coords[:, :, 0:1] - axes[-1]).abs()  # G, N, kw
            if self.ndim == 2:
                distance = distance.unsqueeze(2) + (coords[:, :, 1:2] - axes[0]).abs().unsqueeze(3)  # G, N, kh, kw
            reach = torch.relu(1.0 - distance.flatten(2) / radius)  # g(x, p_i, r_i): G, N, K
            if self.normalize:
                # in float32, as the reference adds a number to whole ones, in a float64 network too
                reach = reach / ((reach != 0).sum(1, keepdim=True).to(torch.float32) + 1e-6)
        if self.shared_points:
            kernel = weights.flatten(0, 1) @ reach[0]
        else:
            kernel = torch.bmm(weights, reach)
        return kernel.to(dtype).reshape([self.out_chs, self.in_chs] + [axis.shape[0] for axis in axes])

    @torch.jit.unused
    def _reach_of_few_taps(
        self, coords: torch.Tensor, radius: torch.Tensor, axes: List[torch.Tensor], skip: int, window: List[int]
    ) -> torch.Tensor:
        """What _render computes at all taps, computed only at those near each point; the others are zero.

        Args:
            coords: Coordinates, (G, N, d).
            radius: Radii, (G, N, 1).
            axes: Where the taps of each axis of the kernel lie.
            skip: Taps before the first one of axes, in 1D.
            window: Taps of each axis to look at for each point.

        Returns:
            Reach of each point at each tap, (G, N, K).
        """
        groups, points, taps = coords.shape[0], coords.shape[1], math.prod(len(axis) for axis in axes)
        index, inside, distance = _look_near(coords[:, :, 0:1], radius, axes[-1], window[-1], skip)
        if self.ndim == 2:  # rows run downwards: the negative of coordinate 1 grows along them
            rows, on_map, height = _look_near(-coords[:, :, 1:2], radius, -axes[0], window[0])
            index = (rows.unsqueeze(3) * len(axes[1]) + index.unsqueeze(2)).flatten(2)
            inside = (on_map.unsqueeze(3) & inside.unsqueeze(2)).flatten(2)
            distance = (height.unsqueeze(3) + distance.unsqueeze(2)).flatten(2)
        reach = torch.relu(1.0 - distance / radius) * inside  # G, N, taps of the window
        if self.normalize:
            flat = index.flatten(1)
            count = torch.zeros(groups, taps, dtype=torch.int64, device=index.device)
            count.scatter_add_(1, flat, (reach != 0).long().flatten(1))
            reach = reach / (count.gather(1, flat).reshape(index.shape).to(torch.float32) + 1e-6)
        return torch.zeros(groups, points, taps, dtype=reach.dtype, device=index.device).scatter_add_(2, index, reach)

    @torch.jit.unused
    def _check_size(self, size: List[int]) -> None:
        if len(size) != self.ndim or not all(isinstance(k, numbers.Integral) and k > 0 for k in size):
            raise ValueError(f'kernel size must be {self.ndim} positive number(s) of taps, got {tuple(size)}.')

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # a checkpoint and timm's EMA read the weights right after a step, before the next forward pass has projected
        self.project()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return (
            f'{self.in_chs}, {self.out_chs}, kernel_size={tuple(self.kernel_size)}, num_points={self.num_points}, '
            f'shared_points={self.shared_points}, normalize={self.normalize}'
        )


def _place_taps(taps: int, causal: bool, device: torch.device) -> torch.Tensor:
    """Coordinates of the taps of an axis, ascending."""
    if taps == 1:
        return torch.full([1], 1.0 if causal else 0.0, dtype=torch.float32, device=device)
    return torch.linspace(-1.0, 1.0, taps, dtype=torch.float32, device=device)


def with_all_taps(kernel: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A kernel, (out_chs, in_chs, *taps), with zeros for the leading taps that it may lack.

    Args:
        kernel: As `for_convolution` gives it, perhaps folded with more.
        module: What has rendered it.
    """
    if not isinstance(module, SMPKernel) or not module.causal:
        return kernel
    return F.pad(kernel, (max(module.kernel_size[0] - kernel.shape[2], 0), 0))


def no_weight_decay(module: nn.Module) -> Set[str]:
    """Names of the parameters in a module that must not decay: coordinates and radii of points, positional embeddings.

    For an optimizer of timm: a network that has these layers returns it from a method of this name.
    """
    names = set()
    for name, part in module.named_modules():
        prefix = f'{name}.' if name else ''
        if isinstance(part, SMPKernel):
            names |= {f'{prefix}coords', f'{prefix}radius_offset'}
        if isinstance(getattr(part, 'pos_embed', None), nn.Parameter):
            names.add(f'{prefix}pos_embed')
    return names


def _look_near(
    coord: torch.Tensor, radius: torch.Tensor, axis: torch.Tensor, width: int, skip: int = 0
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The taps of an axis that a point may reach.

    Args:
        coord: Coordinates of the points along the axis, (G, N, 1).
        radius: Radii, (G, N, 1).
        axis: Where its taps lie, ascending, (K,).
        width: Taps to look at.
        skip: Taps from -1 on before the first one of axis.

    Returns:
        For each point the indices of `width` taps, whether they are any, and how far from it they are: (G, N, width).
    """
    taps = axis.shape[0]
    first = ((coord - radius).detach() + 1.0) / 2.0 * (skip + taps - 1)
    index = first.floor().long() - 1 - skip + torch.arange(width, device=axis.device)
    inside = (index >= 0) & (index < taps)
    index = index.clamp(0, taps - 1)
    return index, inside, (coord - axis[index]).abs()
