"""SMPKernel against the definition (Eq. 1 and 2), written out as loops over points and taps."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from synth import relative_error
from torch import nn

from timm_smpconv.layers import SMPConv1d, SMPConv2d, SMPKernel


def naive_render(kernel, size):
    """Dense kernel in float64, and where it is well defined.

    A normalised kernel jumps where a point starts to reach a tap: taps that the last digits of float32 decide are
    marked False.
    """
    coords = kernel.coords.detach().double().numpy()
    radius = kernel.radius.detach().double().numpy()
    weights = kernel.weights.detach().double().numpy()
    out = np.zeros((kernel.out_chs, kernel.in_chs, *size))
    sharp = np.ones(out.shape, dtype=bool)
    axes = [np.linspace(-1.0, 1.0, k) if k > 1 else np.array([1.0 if kernel.causal else 0.0]) for k in size]
    for o in range(kernel.out_chs):
        g = 0 if kernel.shared_points else o
        for tap in itertools.product(*[range(k) for k in size]):
            if kernel.ndim == 1:
                position = [axes[0][tap[0]]]
            else:  # K[row, col] = R[col, kh - 1 - row]: coordinate 0 to the right, coordinate 1 upwards
                position = [axes[1][tap[1]], axes[0][size[0] - 1 - tap[0]]]
            total, count = np.zeros(kernel.in_chs), 0
            for n in range(kernel.num_points):
                hat = 1.0 - sum(abs(a - b) for a, b in zip(position, coords[g, n])) / radius[g, n]
                if abs(hat) < 1e-4 and kernel.normalize:
                    sharp[(o, slice(None), *tap)] = False
                if hat > 0:
                    total += hat * weights[o, :, n]
                    count += 1
            if kernel.normalize:
                total = total / (count + 1e-6)
            out[(o, slice(None), *tap)] = total
    return out, sharp


def make_kernel(in_chs=2, out_chs=3, size=7, ndim=2, num_points=5, seed=0, spread=0.6, radii=(0.05, 1.0), **kwargs):
    """A kernel with its points all over the place, some of them outside [-1, 1]."""
    dtype = kwargs.pop('dtype', torch.float64)
    kernel = SMPKernel(in_chs, out_chs, size, ndim=ndim, num_points=num_points, **kwargs).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kernel.coords.copy_(spread * torch.randn(kernel.coords.shape, generator=generator, dtype=torch.float64))
        radius = radii[0] + (radii[1] - radii[0]) * torch.rand(
            kernel.base_radius.shape, generator=generator, dtype=torch.float64
        )
        kernel.set_radius(radius)
        kernel.weights.copy_(torch.randn(kernel.weights.shape, generator=generator, dtype=torch.float64))
    return kernel


@given(
    ndim=st.sampled_from([1, 2]),
    kind=st.sampled_from([(True, False), (False, True), (False, False), (True, True)]),
    in_chs=st.integers(1, 3),
    out_chs=st.integers(1, 3),
    num_points=st.integers(1, 6),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_rendering_is_the_definition(ndim, kind, in_chs, out_chs, num_points, size, dtype, seed):
    shared, normalize = kind
    size = size[:ndim]
    kernel = make_kernel(
        1 if shared else in_chs,
        out_chs,
        size,
        ndim,
        num_points,
        seed,
        shared_points=shared,
        normalize=normalize,
        dtype=dtype,
    )
    wanted, sharp = naive_render(kernel, size)
    got = kernel().detach()
    assert got.dtype == dtype and tuple(got.shape) == wanted.shape
    # both sample at float32 positions: 6e-8 of them, over the smallest radius and the sum of the points
    np.testing.assert_allclose(got.double().numpy()[sharp], wanted[sharp], rtol=0, atol=2e-5)


@pytest.mark.parametrize('ndim', [1, 2])
@pytest.mark.parametrize('normalize', [False, True])
def test_points_outside_are_rendered_not_clipped(ndim, normalize):
    kernel = make_kernel(1, 1, 9, ndim, 2, normalize=normalize)
    with torch.no_grad():
        kernel.coords.fill_(1.25)
        kernel.coords[0, 1] = -3.0  # reaches nothing
    kernel.train()()
    assert kernel.coords.max() == 1.25 and kernel.coords.min() == -3.0
    with torch.no_grad():
        kernel.set_radius(1.0)
        kernel.weights.fill_(2.0)
    wanted, _ = naive_render(kernel, (9,) * ndim)
    got = kernel().detach()
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)
    corner = got[0, 0, -1] if ndim == 1 else got[0, 0, 0, -1]
    assert corner > 0 and (got > 0).sum() < got.numel()


def test_orientation():
    """A point at the upper right lands in the first rows and the last columns."""
    kernel = SMPKernel(1, 1, (5, 9), num_points=1, radius=0.3)
    with torch.no_grad():
        kernel.coords.copy_(torch.tensor([[[0.75, 1.0]]]))  # right by 3/4, up by 1
        kernel.weights.fill_(1.0)
    image = kernel()[0, 0]
    row, col = divmod(image.argmax().item(), 9)
    assert (row, col) == (0, 7)
    assert image[0, 7].item() == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        kernel.coords.copy_(torch.tensor([[[-1.0, -0.5]]]))  # left, half-way down
    row, col = divmod(kernel()[0, 0].argmax().item(), 9)
    assert (row, col) == (3, 0)


def test_orientation_1d():
    """Coordinate +1 is the last tap, the present."""
    kernel = SMPKernel(1, 1, 11, ndim=1, num_points=1, radius=0.1)
    with torch.no_grad():
        kernel.coords.fill_(1.0)
        kernel.weights.fill_(1.0)
    assert kernel()[0, 0].argmax() == 10
    assert (kernel()[0, 0, :10] == 0).all()


@pytest.mark.parametrize('ndim, size, wanted', [(1, 5, (5,)), (1, [12], (12,)), (2, 4, (4, 4)), (2, (3, 8), (3, 8))])
@pytest.mark.parametrize('shared', [False, True])
def test_any_size_asked_for(ndim, size, wanted, shared):
    kernel = make_kernel(1 if shared else 2, 3, 7, ndim, shared_points=shared, normalize=not shared)
    got = kernel(size)
    reference, sharp = naive_render(kernel, wanted)
    assert tuple(got.shape[2:]) == wanted
    np.testing.assert_allclose(got.detach().numpy()[sharp], reference[sharp], rtol=0, atol=2e-5)
    assert tuple(kernel().shape[2:]) == (7,) * ndim  # the kernel's own size is as before


def test_finer_sampling_is_the_same_function():
    """Every second tap of a rendering of 2 k - 1 taps is the rendering of k taps."""
    kernel = make_kernel(1, 4, 9, 2, shared_points=True, normalize=False)
    assert relative_error(kernel(17)[..., ::2, ::2], kernel(9)) < 1e-5


@pytest.mark.parametrize('ndim', [1, 2])
@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_gradients_against_finite_differences(ndim, normalize, shared):
    # radii of 0.3 to 0.9 and random coordinates: no tap within 1e-6 of a kink
    kernel = make_kernel(1 if shared else 2, 2, 5, ndim, 4, radii=(0.3, 0.9), shared_points=shared, normalize=normalize)

    def render(coords, weights):
        return torch.func.functional_call(kernel, {'coords': coords, 'weights': weights}, ())

    coords = kernel.coords.detach().clone().requires_grad_()
    weights = kernel.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(render, (coords, weights), eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('ndim', [1, 2])
@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('scale', [0.1, 1.0])
def test_gradient_of_the_radius(ndim, normalize, scale):
    """The stored parameter receives dL/dr of the effective radius, not scaled: that is what makes it learn slower."""
    kernel = make_kernel(1, 2, 5, ndim, 4, radii=(0.3, 0.9), normalize=normalize, radius_lr_scale=scale)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(kernel().shape, generator=generator, dtype=torch.float64)
    (kernel() * direction).sum().backward()
    eps = 1e-6
    for index in itertools.product(*[range(n) for n in kernel.radius_offset.shape]):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                kernel.radius_offset[index] += sign * eps / scale
                before = kernel.radius[index].item()
                values.append((kernel() * direction).sum().item())
                kernel.radius_offset[index] -= sign * eps / scale
            assert before == pytest.approx(kernel.radius[index].item() + sign * eps, abs=1e-12)
        slope = (values[0] - values[1]) / (2 * eps)
        assert kernel.radius_offset.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(value=st.floats(-1e4, 1e4), low=st.sampled_from([1e-4, 1e-3, 0.5]), training=st.booleans())
def test_radius_stays_in_range(value, low, training):
    kernel = SMPKernel(1, 2, 5, radius=0.6, radius_range=(low, 1.0)).train(training)
    with torch.no_grad():
        kernel.radius_offset.fill_(value)
    radius = kernel.radius.detach()
    assert (radius >= np.float32(low)).all() and (radius <= 1.0).all()
    assert kernel().isfinite().all()
    if training:
        stored = kernel.base_radius + kernel.radius_offset.detach() * kernel.radius_lr_scale
        assert torch.allclose(stored, radius, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('value, wanted', [(-50.0, 1e-3), (1e6, 1.0), (-3.0, 0.3)])
def test_state_dict_holds_projected_radii(value, wanted):
    kernel = SMPKernel(1, 2, 5, radius=0.6, radius_range=(1e-3, 1.0))
    with torch.no_grad():
        kernel.radius_offset.fill_(value)
    other = SMPKernel(1, 2, 5, radius=0.6, radius_range=(1e-3, 1.0))
    other.load_state_dict(kernel.state_dict())
    stored = other.base_radius + other.radius_offset * other.radius_lr_scale
    assert torch.allclose(stored, torch.tensor(wanted), rtol=1e-4)
    assert torch.allclose(other.radius, torch.tensor(wanted), rtol=1e-5)


@pytest.mark.parametrize('learn_coords', [False, True])
@pytest.mark.parametrize('learn_radius', [False, True])
def test_frozen_coordinates_and_radii(learn_coords, learn_radius):
    kernel = make_kernel(2, 3, 5, 2, learn_coords=learn_coords, learn_radius=learn_radius)
    before = {key: value.clone() for key, value in kernel.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in kernel.parameters() if p.requires_grad], lr=1e-2)
    kernel().square().sum().backward()
    optimizer.step()
    assert torch.equal(before['coords'], kernel.coords) != learn_coords
    assert torch.equal(before['radius_offset'], kernel.radius_offset) != learn_radius
    assert not torch.equal(before['weights'], kernel.weights)
    assert set(kernel.state_dict()) == set(before)


def test_unfrozen_radii_stay_in_range():
    kernel = make_kernel(2, 3, 5, 2, learn_radius=False)
    kernel.requires_grad_(True)
    with torch.no_grad():
        kernel.radius_offset.fill_(1e6)
    kernel()
    kernel.state_dict()
    assert (kernel.base_radius + kernel.radius_offset * kernel.radius_lr_scale <= kernel.max_radius + 1e-6).all()


@pytest.mark.parametrize('size', [(9,), (3000,)])
def test_another_default_dtype(size):
    """Of a long kernel, only the taps near its points are looked at."""
    kernel = SMPKernel(2, 3, size, ndim=1, num_points=4, normalize=True, causal=True, radius=0.02).train()
    wanted = kernel(), kernel.for_convolution()
    torch.set_default_dtype(torch.float64)
    try:
        got = kernel(), kernel.for_convolution()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_initial_values_imagenet():
    """Depthwise: N = floor(k^2 / 4) shared points, std 0.2, radius 4 / k in [1e-3, 1]."""
    conv = SMPConv2d(64, 64, 31, groups=64)
    kernel = conv.kernel
    assert tuple(kernel.coords.shape) == (1, 240, 2) and tuple(kernel.weights.shape) == (64, 1, 240)
    assert not kernel.normalize and kernel.shared_points
    assert kernel.coords.std().item() == pytest.approx(0.2, rel=0.15)
    assert kernel.coords.abs().max() <= 1
    assert torch.allclose(kernel.radius, torch.tensor(4 / 31))
    assert kernel.weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert (kernel.min_radius, kernel.max_radius) == (1e-3, 1.0)


def test_initial_values_cifar():
    """Dense: 16 points per output filter, std 0.05, radius 0.12 in [1e-4, 1], normalised."""
    kernel = SMPConv2d(24, 36, 33).kernel
    assert tuple(kernel.coords.shape) == (36, 16, 2) and tuple(kernel.weights.shape) == (36, 24, 16)
    assert kernel.normalize and not kernel.shared_points
    assert kernel.coords.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.allclose(kernel.radius, torch.tensor(0.12))
    assert kernel.weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert (kernel.min_radius, kernel.max_radius) == (1e-4, 1.0)


def test_initial_values_sequence():
    """Causal: 2 p + 1 with p of std 0.1 cut to [-1, 0], so in [-1, 1] with its mode at the present."""
    kernel = SMPConv1d(30, 60, 784, radius=0.002).kernel
    assert tuple(kernel.coords.shape) == (60, 30, 1) and tuple(kernel.weights.shape) == (60, 30, 30)
    assert kernel.normalize and not kernel.shared_points
    assert kernel.coords.max() <= 1 and kernel.coords.min() >= -1
    # half normal of scale 0.2 below 1
    below = 1 - kernel.coords.detach()
    assert below.mean().item() == pytest.approx(0.2 * math.sqrt(2 / math.pi), rel=0.08)
    assert below.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.08)
    assert torch.allclose(kernel.radius, torch.tensor(0.002))
    assert (kernel.min_radius, kernel.max_radius) == (1e-4, 1.0)


def test_initial_coordinates_are_cut():
    wide = SMPKernel(1, 100, 5, coord_std=5.0, num_points=50)
    assert wide.coords.abs().max() <= 1
    assert wide.coords.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)  # nearly uniform
    causal = SMPKernel(1, 100, 5, ndim=1, coord_std=5.0, num_points=50, causal=True)
    assert causal.coords.min() >= -1 and causal.coords.max() <= 1
    assert causal.coords.mean().item() == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize('std', [0.05, 0.2, 0.3, 0.5])
@pytest.mark.parametrize('radius', [0.12, 0.3])
@pytest.mark.parametrize('num_points', [4, 64])
def test_initial_values_are_arguments(std, radius, num_points):
    kernel = SMPConv2d(3, 200, 33, coord_std=std, radius=radius, num_points=num_points).kernel
    assert kernel.coords.shape[1] == num_points
    assert torch.allclose(kernel.radius, torch.tensor(radius))
    cut = torch.distributions.Normal(0.0, 1.0)
    a = 1 / std
    density, mass = cut.log_prob(torch.tensor(a)).exp(), 2 * cut.cdf(torch.tensor(a)) - 1
    wanted = std * (1 - 2 * a * density / mass).sqrt().item()
    assert kernel.coords.std().item() == pytest.approx(wanted, rel=0.08)


@given(
    in_chs=st.integers(1, 5),
    out_chs=st.integers(1, 5),
    ndim=st.sampled_from([1, 2]),
    num_points=st.integers(1, 9),
    size=st.integers(1, 40),
)
def test_parameter_count(in_chs, out_chs, ndim, num_points, size):
    """(1 + d + C) N of one filter, whatever the size."""
    kernel = SMPKernel(in_chs, out_chs, size, ndim=ndim, num_points=num_points)
    assert sum(p.numel() for p in kernel.parameters()) == out_chs * (1 + ndim + in_chs) * num_points
    shared = SMPKernel(1, out_chs, size, ndim=ndim, num_points=num_points, shared_points=True)
    assert sum(p.numel() for p in shared.parameters()) == (1 + ndim + out_chs) * num_points


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(radius=0.0), ('radius', '0.0')),
        (dict(radius=-0.1), ('radius', '-0.1')),
        (dict(radius=float('nan')), ('radius', 'nan')),
        (dict(radius=1.5), ('radius', '1.5', '1.0')),
        (dict(radius=1e-6), ('radius', '1e-06', '0.0001')),
        (dict(radius_range=(0.0, 1.0)), ('radius_range', '0.0')),
        (dict(num_points=0), ('num_points', '0')),
        (dict(num_points=-3), ('num_points', '-3')),
        (dict(coord_std=0.0), ('coord_std', '0.0')),
        (dict(coord_std=-1.0), ('coord_std', '-1.0')),
        (dict(in_chs=0), ('in_chs', '0')),
        (dict(out_chs=0), ('out_chs', '0')),
        (dict(kernel_size=0), ('kernel size', '0')),
        (dict(kernel_size=(3, 0)), ('kernel size', '(3, 0)')),
        (dict(kernel_size=(3, 3, 3)), ('kernel size', '(3, 3, 3)', '2')),
        (dict(ndim=3), ('ndim', '3', '1 or 2')),
        (dict(ndim=2, causal=True), ('causal', '2')),
    ],
)
def test_arguments_that_cannot_work(kwargs, words):
    with pytest.raises(ValueError) as e:
        SMPKernel(**{**dict(in_chs=1, out_chs=2, kernel_size=5), **kwargs})
    assert all(word in str(e.value) for word in words), e.value


def test_sizes_of_numpy():
    kernel = SMPKernel(1, 2, 5, num_points=3)
    assert torch.equal(kernel(np.int64(7)), kernel(7))


@pytest.mark.parametrize('size', [0, -1, (3, 3), (3, 0, 2)])
def test_sizes_that_cannot_work(size):
    with pytest.raises(ValueError, match='kernel size'):
        SMPKernel(1, 2, 5, ndim=1)(size)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('ndim', [1, 2])
def test_half_precision_parameters(dtype, tolerance, ndim):
    """Rendered as the float32 kernel of the same (rounded) weights, but for rounding the result."""
    kernel = make_kernel(2, 3, 21, ndim, dtype=dtype)
    got = kernel()
    assert got.dtype == dtype and got.isfinite().all()
    assert relative_error(got, kernel.float()()) < tolerance
    kernel.to(dtype)().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kernel.parameters())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize('start', [torch.float32, torch.float64])
def test_casts_leave_the_points_where_they_are(start, dtype, tolerance):
    """16,000 taps, of which a point reaches some thirty: between two numbers of bfloat16 lie as many."""
    kernel = SMPKernel(2, 3, 16_000, ndim=1, num_points=5, radius=0.0019, causal=True, dtype=start)
    with torch.no_grad():
        kernel.coords.uniform_(-1, 1)
        kernel.radius_offset.uniform_(-0.005, 0.005)
    wanted, radius = kernel(), kernel.radius.detach().float()
    wanted.sum().backward()
    grads = [p.grad.clone() for p in kernel.parameters()]
    kernel.to(dtype)
    assert {n: t.dtype for n, t in kernel.state_dict().items()} == {
        'coords': torch.float32, 'base_radius': torch.float32, 'radius_offset': torch.float32, 'weights': dtype
    }  # fmt: skip
    assert torch.allclose(kernel.radius, radius, rtol=1e-6)
    got = kernel()
    assert got.dtype == dtype and relative_error(got, wanted) < tolerance
    assert all(
        p.grad.dtype == p.dtype and relative_error(p.grad, g) < tolerance for p, g in zip(kernel.parameters(), grads)
    )
    built = SMPKernel(2, 3, 16_000, ndim=1, num_points=5, radius=0.0019, causal=True, dtype=dtype)
    assert {n: t.dtype for n, t in built.state_dict().items()} == {n: t.dtype for n, t in kernel.state_dict().items()}
    built.load_state_dict(kernel.state_dict())
    assert torch.equal(built(), got)
    assert {p.dtype for p in kernel.double().parameters()} == {torch.float64}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shared', [False, True])
def test_autocast_does_not_change_the_kernel(dtype, shared):
    kernel = make_kernel(1, 3, 33, 2, shared_points=shared, normalize=not shared, dtype=torch.float32)
    wanted = kernel()
    with torch.autocast('cpu', dtype=dtype):
        got = kernel()
    assert got.dtype == torch.float32 and torch.equal(got, wanted)


@pytest.mark.parametrize('ndim', [1, 2])
def test_meta_device(ndim):
    kernel = SMPKernel(2, 3, 5, ndim=ndim, device='meta')
    assert all(p.is_meta for p in kernel.parameters())
    out = kernel()
    assert out.is_meta and tuple(out.shape) == (3, 2, *[5] * ndim)
    source = SMPKernel(2, 3, 5, ndim=ndim)
    real = kernel.to_empty(device='cpu')
    real.load_state_dict(source.state_dict())
    assert torch.equal(real(), source())


def test_numbers_of_numpy():
    kernel = SMPKernel(1, 2, np.prod((4, 5)), ndim=1)
    assert kernel.kernel_size == [20] and type(kernel.kernel_size[0]) is int
    assert SMPKernel(1, 2, np.array([3, 5]))().shape == (2, 1, 3, 5)


def test_reset_parameters_after_meta():
    kernel = SMPKernel(2, 3, 5, device='meta').to_empty(device='cpu')
    kernel.reset_parameters()
    assert torch.allclose(kernel.radius, torch.tensor(0.12))
    assert kernel().isfinite().all() and kernel.weights.std() > 0


def test_device_and_dtype():
    kernel = SMPKernel(2, 3, 5, dtype=torch.float64, device='cpu')
    assert {p.dtype for p in kernel.parameters()} == {torch.float64}
    assert kernel().dtype == torch.float64


def test_long_kernels_keep_their_points():
    """16,000 taps of radius 0.0002: a point reaches the two or three taps next to it and no other."""
    kernel = SMPKernel(1, 1, 16000, ndim=1, num_points=1, radius=0.0002)
    with torch.no_grad():
        kernel.coords.fill_(np.linspace(-1, 1, 16000)[12345])
        kernel.weights.fill_(1.0)
    taps = kernel()[0, 0].nonzero().flatten().tolist()
    assert 12345 in taps and len(taps) <= 3 and max(taps) - min(taps) <= 2


@given(
    size=st.integers(1, 1500),
    center=st.sampled_from([-1.5, -0.9, 0.0, 0.7, 0.99, 1.0, 1.5]),
    spread=st.sampled_from([0.0, 1e-4, 0.05, 0.5]),
    radius=st.sampled_from([1e-4, 2e-3, 0.1, 1.0]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_support_leaves_out_zeros_alone(size, center, spread, radius, seed, dtype):
    """The taps that are not rendered are exactly zero, the others and all gradients the same."""
    kernel = SMPKernel(2, 3, size, ndim=1, num_points=4, radius=radius, causal=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kernel.coords.copy_(center + spread * torch.randn(3, 4, 1, generator=generator))
        kernel.radius_offset.copy_(radius * torch.rand(3, 4, generator=generator) / kernel.radius_lr_scale)
    kernel.to(dtype)
    full, part = kernel(), kernel.for_convolution()
    skipped = size - part.shape[2]
    assert skipped >= 0 and part.shape[:2] == full.shape[:2]
    assert (full[..., :skipped] == 0).all()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(part, full[..., skipped:]) <= tolerance
    direction = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(dtype)
    parameters = list(kernel.parameters())
    for wanted, given_ in zip(
        torch.autograd.grad(full[..., skipped:], parameters, direction),
        torch.autograd.grad(part, parameters, direction),
    ):
        assert relative_error(given_, wanted) <= (1 if dtype == torch.bfloat16 else 10) * tolerance


@pytest.mark.parametrize('assigned', [False, True])
@pytest.mark.parametrize('coord', [0.5, 0.65625, 0.75, 0.984375])
def test_support_of_long_kernels_in_half_precision(coord, assigned):
    """Between bfloat16 numbers lie more taps than the radius spans."""
    kernel = SMPKernel(1, 1, 16_000, ndim=1, num_points=1, radius=0.0019, causal=True)
    with torch.no_grad():
        kernel.coords.fill_(coord)
        kernel.weights.fill_(1.0)
    if assigned:
        kernel.load_state_dict({name: value.bfloat16() for name, value in kernel.state_dict().items()}, assign=True)
        assert kernel.coords.dtype == torch.bfloat16
    else:
        kernel.bfloat16()
    full, part = kernel(), kernel.for_convolution()
    assert torch.equal(part, full[..., -part.shape[2] :]) and part.count_nonzero() == full.count_nonzero() > 10


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    center=st.tuples(*[st.sampled_from([-1.2, -1.0, -0.3, 0.0, 0.8, 1.0, 1.3])] * 2),
    spread=st.sampled_from([0.0, 0.02, 0.4]),
    radius=st.sampled_from([1e-3, 0.05, 0.12, 0.5]),
    normalize=st.booleans(),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_few_taps_are_all_that_a_point_reaches(size, center, spread, radius, normalize, seed, dtype):
    """Points of maps looked up near their taps alone: the same kernel, gradients and gradients of gradients."""
    kernel = SMPKernel(2, 3, size, ndim=2, num_points=4, radius=radius, normalize=normalize)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kernel.coords.copy_(torch.tensor(center) + spread * torch.randn(3, 4, 2, generator=generator))
        kernel.radius_offset.copy_(radius * torch.rand(3, 4, generator=generator) / kernel.radius_lr_scale)
    kernel.to(dtype)
    full, few = kernel(), kernel.for_convolution()
    assert torch.equal(few, full)
    direction = torch.randn(full.shape, generator=generator, dtype=torch.float64).to(dtype)
    parameters = list(kernel.parameters())
    first = [torch.autograd.grad(k, parameters, direction, create_graph=True) for k in (full, few)]
    second = [
        torch.autograd.grad(sum((g**2).sum() for g in gradients), parameters, allow_unused=True) for gradients in first
    ]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for wanted, got in zip((*first[0], *second[0]), (*first[1], *second[1])):
        assert relative_error(got, wanted) <= tolerance


@pytest.mark.parametrize(
    'sizes, radius, shared, few',
    [
        ((33, 33), 0.12, False, True),  # windows of 8 x 8 taps
        ((33, 33), 0.5, False, False),  # of 21 x 21
        ((33, 33), 0.12, True, False),
        ((7, 7), 0.12, False, False),
        ((784,), 2 / 784, False, True),
        ((784,), 0.5, False, False),
    ],
)
def test_few_taps_are_looked_up_where_it_pays(sizes, radius, shared, few, monkeypatch):
    kernel = SMPKernel(2, 3, sizes, ndim=len(sizes), num_points=4, radius=radius, shared_points=shared)
    looked_up = []
    of_few_taps = kernel._reach_of_few_taps
    monkeypatch.setattr(kernel, '_reach_of_few_taps', lambda *args: looked_up.append(args) or of_few_taps(*args))
    for convolve in (kernel.for_convolution, kernel.eval().for_convolution):
        convolve()
    assert len(looked_up) == (2 if few else 0)


def test_set_radius():
    kernel = SMPKernel(1, 2, 5, radius=0.6)
    kernel.set_radius(0.3)
    assert torch.equal(kernel.radius.detach(), torch.full((2, 16), 0.3))
    for value in (0.0, 1.5, float('nan')):
        with pytest.raises(ValueError, match='must lie within'):
            kernel.set_radius(value)


@pytest.mark.parametrize('causal', [False, True])
def test_rendered_once_in_eval(causal):
    """Eval mode without gradients reuses the kernel until a parameter changes, however it is changed."""
    kernel = make_kernel(2, 3, 80, 1, causal=causal, dtype=torch.float32).eval()
    full = kernel().detach()
    with torch.no_grad():
        first = kernel.for_convolution()
        assert kernel.for_convolution() is first
        assert torch.equal(first, full[..., full.shape[-1] - first.shape[-1] :])
        assert (full[..., : full.shape[-1] - first.shape[-1]] == 0).all()
        for change in (
            lambda: kernel.weights.data.mul_(2),
            lambda: kernel.coords.data.add_(0.01),
            lambda: kernel.radius_offset.add_(0.1),
            lambda: kernel.set_radius(0.5),
            lambda: kernel.load_state_dict({k: v + 0.01 for k, v in kernel.state_dict().items()}),
        ):
            before = kernel.for_convolution()
            change()
            after = kernel.for_convolution()
            assert after is not before
            full = kernel()
            assert torch.equal(after, full[..., full.shape[-1] - after.shape[-1] :])
    assert kernel.for_convolution().requires_grad
    assert copy.deepcopy(kernel)._rendered._entry is None


def test_moving_points_fit_better_than_fixed_ones():
    """Figure 3: 204 points fitted to a function of sines on a grid of 51 x 51; this function is not the paper's."""
    t = torch.linspace(-1, 1, 51)
    y, x = torch.meshgrid(t, t, indexing='ij')
    target = (torch.sin(4 * x + 2 * y) * torch.cos(3 * y)).reshape(1, 1, 51, 51)

    def fit(learn_coords):
        """Root mean square error, relative to the function's spread."""
        torch.manual_seed(0)
        kernel = SMPKernel(1, 1, 51, num_points=204, radius=0.2, coord_std=0.5, learn_coords=learn_coords)
        optimizer = torch.optim.Adam(kernel.parameters(), lr=1e-2)
        for _ in range(200):
            loss = (kernel() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item() ** 0.5 / target.std().item()

    moving, fixed = fit(True), fit(False)
    assert moving < 0.3 and moving < 0.75 * fixed


class TestProjection:
    """Keeping radii in their range must not stand in the way of what others make of parameters."""

    def kernel(self):
        kernel = SMPKernel(1, 4, 9, num_points=5, radius=0.2).train()
        with torch.no_grad():
            kernel.radius_offset.fill_(100.0)  # out of range: projection has something to do
        return kernel

    def test_views_of_a_flat_vector(self):
        model = nn.Sequential(SMPConv2d(3, 4, 9), SMPConv2d(4, 2, 9)).train()
        flat = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
        values, first = {}, 0
        for key, parameter in model.named_parameters():
            values[key] = flat[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()
        torch.func.functional_call(model, values, (torch.randn(2, 3, 12, 12),)).sum().backward()
        assert flat.grad.abs().sum() > 0

    def test_coordinates_that_are_drawn(self):
        """In each call anew: no tap is left out that the next drawing reaches."""

        class Drawing(nn.Module):
            calls = 0

            def forward(self, coords):
                self.calls += 1
                return coords - (0.0, 0.8, 1.6)[self.calls % 3]

        kernel = SMPKernel(4, 4, 1000, ndim=1, causal=True, num_points=1, radius=0.02)
        torch.nn.utils.parametrize.register_parametrization(kernel, 'coords', Drawing())
        possible = [kernel() for _ in range(3)]
        assert all((p != 0).sum() > 4 * 4 * 5 for p in possible)
        for training in (True, False):
            kernel.train(training)
            with torch.set_grad_enabled(training):
                for _ in range(6):
                    rendered = kernel.for_convolution()
                    assert any(torch.equal(rendered, p) for p in possible)

    def test_tensors_of_inference_mode(self):
        with torch.inference_mode():
            kernel = self.kernel()
        assert (kernel.state_dict()['radius_offset'] < 100.0).all()

    def test_other_kinds_of_tensors_are_left(self):
        class Sharded(torch.Tensor):
            pass

        kernel = self.kernel()
        kernel.radius_offset = nn.Parameter(kernel.radius_offset.detach().as_subclass(Sharded))
        kernel.project()
        assert (kernel.radius_offset == 100.0).all() and (kernel.radius <= 1.0).all()
