"""Shortcuts of eval mode are taken only where nobody can tell: no hooks, nothing replaced, wrapped or in train mode."""

import copy

import pytest
import timm
import torch
from conftest import ALL_MODELS, has_batch_norms, make_input, measure_norms
from synth import is_batch_norm
from torch import nn
from torch.nn.utils import parametrize, prune

from timm_smpconv.layers import (
    PeripheralConv2d,
    PeripheralKernel,
    RenderedKernel,
    RepSMPConv1d,
    RepSMPConv2d,
    SMPConv1d,
    SMPConv2d,
    SMPKernel,
    parts,
)
from timm_smpconv.layers.cache import ValueCache

CLOSE = dict(rtol=1e-3, atol=1e-4)


def without_shortcuts(module, *args):
    """The output with gradients enabled, where every part is called."""
    with torch.enable_grad():
        return module(*args).detach()


def amplify(model):
    """Layer scales of one instead of a millionth, so that blocks count."""
    for key, parameter in model.named_parameters():
        if key.endswith('gamma'):
            nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize('name', [name for name in ALL_MODELS if timm.get_pretrained_cfg(name).num_classes == 1000])
def test_batches_in_parts(name, model, monkeypatch):
    """Parts of one sample give what the whole batch gives, in every place that computes in parts."""
    x = make_input(name, batch=3)
    measure_norms(amplify(model), x)
    expected = without_shortcuts(model, x)
    monkeypatch.setattr(parts, '_MAX_BYTES', 1)
    sizes, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, 'split', lambda x, size, *args: sizes.append(size) or split(x, size, *args))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert sizes == [1] * sum(hasattr(module, '_by_parts') for module in model.modules())
    with torch.no_grad():  # the tolerance would show samples that were mixed up
        assert not torch.allclose(model(x[[1, 2, 0]]), expected, rtol=1e-2, atol=1e-3)


def test_norms_without_statistics_see_the_whole_batch(name, model, x, monkeypatch):
    """In eval mode too, they normalise by the batch."""
    if not has_batch_norms(name):
        return
    measure_norms(amplify(model), x)
    for norm in model.modules():
        if is_batch_norm(norm):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    expected = without_shortcuts(model, x)
    monkeypatch.setattr(parts, '_MAX_BYTES', 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)


def test_norms_in_train_mode_see_the_whole_batch(name, model, x, monkeypatch):
    if not has_batch_norms(name):
        return
    monkeypatch.setattr(parts, '_MAX_BYTES', 1)  # parts of one sample
    norms = [m for m in model.modules() if is_batch_norm(m)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, as statistics are computed anew
        norm.train()
    other = copy.deepcopy(model)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, without_shortcuts(other, x), **CLOSE)
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    for a, b in zip(model.buffers(), other.buffers()):
        torch.testing.assert_close(a, b, **CLOSE)
    with pytest.raises(RuntimeError, match='train mode'):
        model.reparameterize()


def test_frozen_networks_take_them_with_gradients_enabled(name, model, x, monkeypatch):
    """As the backbone of another network: kernels are rendered once, and an input may want its gradient."""
    monkeypatch.setattr(parts, '_MAX_BYTES', 1)
    model.requires_grad_(False)
    with torch.inference_mode():  # what is kept of it serves a backward pass too
        wanted = model(x)
    renders = []
    for kernel in model.modules():
        if isinstance(kernel, RenderedKernel):
            monkeypatch.setattr(kernel, 'render_reached', lambda *args: renders.append(args))
    y = model(x.requires_grad_())
    torch.testing.assert_close(y, wanted, **CLOSE)
    assert not renders
    y.square().mean().backward()
    monkeypatch.undo()
    other = copy.deepcopy(model).requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    other(other_x).square().mean().backward()
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-3, atol=1e-4 * other_x.grad.abs().max().item())
    assert x.grad.abs().sum() > 0


def test_moves_and_casts_empty_caches(name, model, x):
    with torch.no_grad():
        model(x)

    def kept():
        return [v for m in model.modules() for v in vars(m).values() if isinstance(v, ValueCache) and v._entry]

    assert kept()
    model.double()
    assert not kept()


def test_hooks_see_the_whole_batch_once(name, model, x, monkeypatch):
    monkeypatch.setattr(parts, '_MAX_BYTES', 1)
    calls = {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, key=key: calls.setdefault(key, []).append(tuple(o.shape)))
    expected = without_shortcuts(model, x)
    called, calls = calls, {}
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert set(calls) == {key for key, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert calls == called


def block(ndim=2, **kwargs):
    """A two-branch block whose small branch counts, and an input."""
    module = RepSMPConv2d(6, 6, 9, groups=6, **kwargs) if ndim == 2 else RepSMPConv1d(6, 6, 70, **kwargs)
    nn.init.uniform_(module.small.weight, -1, 1)
    return module.eval(), torch.randn(4, 6, 12, 12) if ndim == 2 else torch.randn(4, 6, 80)


class Adapter(nn.Module):
    """A layer beside another one, as fine-tuning of few parameters adds it."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + 1.0


def test_patched_forwards_are_called():
    """Tools put a forward of their own on a module: in the block, and in the kernel."""
    module, x = block()
    small, kernel = module.small.forward, module.large.kernel.forward
    with torch.no_grad():
        before = module(x)
        module.small.forward = lambda x: small(x) + 1.0
        torch.testing.assert_close(module(x), without_shortcuts(module, x), **CLOSE)
        assert (module(x) - before).abs().max() > 0.5
        del module.small.forward
        torch.testing.assert_close(module(x), before, **CLOSE)
        module.large.kernel.forward = lambda *args: 0.0 * kernel(*args)
        nothing = module(x)
    torch.testing.assert_close(nothing, without_shortcuts(module, x), **CLOSE)
    assert not torch.allclose(nothing, before, **CLOSE)


@pytest.mark.filterwarnings('ignore:Full backward hook')  # that no input has gradients
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('register', ['register_full_backward_hook', 'register_full_backward_pre_hook'])
@pytest.mark.parametrize('kind', ['points', 'causal points', 'peripheral'])
def test_backward_hooks_of_kernels(kind, register, train):
    """They fire in each step: the kernel is called, not rendered past its call."""
    if kind == 'peripheral':
        module, x = PeripheralConv2d(6, 6, 9, groups=6), torch.randn(4, 6, 12, 12)
        kernel = module.kernel
    else:
        module, x = block(1 if kind == 'causal points' else 2)
        kernel = module.large.kernel
    seen = []
    getattr(kernel, register)(lambda m, *grads: seen.append(grads[-1][0].shape))
    module.train(train)
    for _ in range(2):
        module(x).square().sum().backward()
    assert seen == [kernel().shape] * 2


class DoubledKernel(SMPKernel):
    """A kernel of somebody else's."""

    def forward(self, size=None):
        return 2.0 * super().forward(size)


@pytest.mark.parametrize('train', [False, True])
def test_kernels_with_a_forward_of_their_own(train):
    kernel = DoubledKernel(6, 6, 300, ndim=1, num_points=4, radius=0.01, normalize=True, causal=True).train(train)
    with torch.set_grad_enabled(train):
        taps = kernel.for_convolution()
        assert torch.equal(taps, kernel()[..., -taps.shape[-1] :]) and taps.abs().max() > 0


class ScaledKernel(SMPKernel):
    """One whose radii depend on one more parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.zeros(()))

    @property
    def radius(self):
        return super().radius * self.scale.exp()


class FadedKernel(SMPKernel):
    """One that does something to what is rendered."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.zeros(()))

    def _render_full_precision(self, *args):
        return super()._render_full_precision(*args) * self.scale.exp()


@pytest.mark.parametrize('kind', [ScaledKernel, FadedKernel])
def test_kernels_with_more_parameters(kind):
    conv, x = SMPConv2d(4, 4, 9, groups=4).eval(), torch.randn(1, 4, 12, 12)
    conv.kernel = kind(1, 4, 9, num_points=4, radius=0.4, shared_points=True, normalize=False).eval()
    with torch.no_grad():
        before = conv(x)
        conv.kernel.scale.add_(0.5)
        after = conv(x)
    torch.testing.assert_close(after, without_shortcuts(conv, x))
    assert not torch.allclose(before, after)


def test_hooks_of_all_modules_see_all_parts():
    module, x = block()
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: called.append(m))
    try:
        with torch.no_grad():
            module(x)
    finally:
        handle.remove()
    assert module.small in called and module.large.kernel in called


@pytest.mark.parametrize('ndim', [1, 2])
def test_replaced_branches_are_called(ndim):
    module, x = block(ndim)
    with torch.no_grad():
        before = module(x)
        module.small = Adapter(module.small)
        after = module(x)
    torch.testing.assert_close(after, without_shortcuts(module, x), **CLOSE)
    assert (after - before).abs().max() > 0.5


@pytest.mark.parametrize(
    'norm_layer',
    [
        lambda chs, **dd: nn.GroupNorm(2, chs, **dd),
        lambda chs, **dd: nn.BatchNorm2d(chs, affine=False, **dd),
        lambda chs, **dd: nn.BatchNorm2d(chs, track_running_stats=False, **dd),
    ],
    ids=['group', 'plain', 'batch statistics'],
)
def test_other_norms(norm_layer):
    module, x = block(norm_layer=norm_layer)
    with torch.no_grad():
        y = module(x)
    torch.testing.assert_close(y, without_shortcuts(module, x), **CLOSE)
    if getattr(module.large_norm, 'running_var', None) is None:
        with pytest.raises(RuntimeError, match='running statistics'):
            module.fuse()
    else:
        torch.testing.assert_close(module.fuse()(x), y, **CLOSE)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize('ndim', [1, 2])
def test_parametrized_kernels(ndim):
    module, x = block(ndim)
    with torch.no_grad():
        module(x)
        parametrize.register_parametrization(module.large.kernel, 'weights', Doubled())
        y = module(x)
    torch.testing.assert_close(y, without_shortcuts(module, x), **CLOSE)


@pytest.mark.parametrize(
    'make, x',
    [
        (lambda: SMPConv2d(4, 4, 7, groups=4), torch.randn(2, 4, 9, 9)),
        (lambda: SMPConv1d(2, 3, 70), torch.randn(2, 2, 80)),
        (lambda: PeripheralConv2d(4, 4, 9, groups=4, small_kernel_size=0), torch.randn(2, 4, 9, 9)),
    ],
    ids=['2d', '1d', 'peripheral'],
)
def test_pruned_kernels(make, x):
    conv = make()
    prune.l1_unstructured(conv.kernel, 'weights', 0.5)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):  # the mask is applied anew in each step
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
    conv.eval()
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        before = conv(x)
        conv.kernel.weights_orig.mul_(10)
        torch.testing.assert_close(conv(x), 10 * before, **CLOSE)


def test_settings_are_part_of_what_is_compared():
    module, x = block()
    conv = SMPConv2d(4, 4, 7, groups=4).eval()
    with torch.no_grad():
        module(x)
        module.large_norm.eps = 1.0
        torch.testing.assert_close(module(x), without_shortcuts(module, x), **CLOSE)
        conv(torch.randn(1, 4, 9, 9))
        conv.kernel.kernel_size = [5, 5]
        assert conv.kernel.for_convolution().shape == (4, 1, 5, 5)


def test_a_missing_small_kernel_is_a_change():
    conv = PeripheralConv2d(4, 4, 21, groups=4).eval()
    x = torch.randn(1, 4, 24, 24)
    with torch.no_grad():
        conv(x)
        small, conv.kernel.small = conv.kernel.small, None
        torch.testing.assert_close(conv(x), without_shortcuts(conv, x))
        conv.kernel.small = small
        torch.testing.assert_close(conv(x), without_shortcuts(conv, x))


def test_replicas_have_tensors_instead_of_parameters(name, model, x):
    """nn.DataParallel and FSDP leave plain tensors where parameters were."""
    plain = []
    for module in amplify(model).modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                plain.append(parameter.detach().clone())
                del module._parameters[key]
                setattr(module, key, plain[-1])
    with torch.no_grad():
        before = model(x)
        for tensor in plain:
            tensor.mul_(1.1)
        after = model(x)
    torch.testing.assert_close(after, without_shortcuts(model, x), **CLOSE)
    assert not torch.allclose(after, before, rtol=1e-2)


def test_train_mode_empties_the_caches(name, model, x):
    caches = []
    for module in model.modules():
        for value in vars(module).values():
            caches += [value] if isinstance(value, ValueCache) else []
    with torch.no_grad():
        model(x)
    assert any(cache._entry is not None for cache in caches)
    model.train()
    assert all(cache._entry is None for cache in caches)


@pytest.mark.parametrize('make', [SMPKernel, PeripheralKernel])
def test_kernels_with_hooks_are_rendered_by_calls(make):
    seen = []
    kernel = make(1, 4, 9).eval()
    kernel.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with torch.no_grad():
        kernel.for_convolution()
        kernel.for_convolution()
    assert seen == [(4, 1, 9, 9)] * 2


def test_values_that_change_while_they_are_used():
    """As another thread may change them: the result is not kept for values that it is perhaps not of."""
    cache, tensor, computed = ValueCache(), torch.ones(3), []

    def compute(change=0.0):
        result = tensor.clone()
        tensor.add_(change)
        computed.append(result)
        return result

    cache.get((tensor,), lambda: compute(1.0))
    assert torch.equal(cache.get((tensor,), compute), torch.full((3,), 2.0)) and len(computed) == 2
    assert cache.get((tensor,), compute) is computed[1] and len(computed) == 2
