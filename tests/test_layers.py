"""The drop-in layers: a rendered kernel, convolved."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from synth import randomize_norms, relative_error
from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from timm_smpconv import ops
from timm_smpconv.layers import (
    CausalConv1d,
    LargeConv1d,
    LargeConv2d,
    PeripheralConv2d,
    PeripheralKernel,
    PointwiseConv2d,
    RepSMPConv1d,
    RepSMPConv2d,
    SMPConv1d,
    SMPConv2d,
    SMPKernel,
    cache,
    convert_large_convs,
    no_weight_decay,
)
from timm_smpconv.ops import dft, fft
from timm_smpconv.ops.context import to_channels_last


def spread(module):
    """Points all over the support, and a bias that is not zero."""
    with torch.no_grad():
        kernel = module.kernel
        kernel.coords.copy_(0.6 * torch.randn_like(kernel.coords))
        kernel.set_radius(0.1 + 0.3 * torch.rand_like(kernel.base_radius))
        if module.bias is not None:
            module.bias.copy_(torch.randn_like(module.bias))
    return module.double()


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('size', [1, 7, (5, 11), 31])
@pytest.mark.parametrize('in_chs, out_chs, groups', [(4, 4, 4), (3, 5, 1), (1, 1, 1), (1, 3, 1)])
def test_conv2d(in_chs, out_chs, groups, size, bias):
    layer = spread(SMPConv2d(in_chs, out_chs, size, groups=groups, bias=bias))
    x = torch.randn(2, in_chs, 12, 9, dtype=torch.float64)
    kernel = layer.kernel()
    pad = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    wanted = F.conv2d(x, kernel, layer.bias, padding=pad, groups=groups)
    assert relative_error(layer(x), wanted) < 1e-10
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('taps', [1, 2, 20, 161, 400])
@pytest.mark.parametrize('length', [1, 50, 400])
@pytest.mark.parametrize('center', [None, 0.9])
@pytest.mark.parametrize('channels, groups', [((3, 5), 1), ((4, 4), 4)])
def test_conv1d_is_causal(taps, length, bias, center, channels, groups):
    layer = spread(SMPConv1d(*channels, taps, bias=bias, radius=0.1, groups=groups))
    if center is not None:  # the leading taps are zero, and left out
        layer.kernel.coords.data.mul_(0.05).add_(center)
        layer.kernel.set_radius(0.05)
    x = torch.randn(2, channels[0], length, dtype=torch.float64, requires_grad=True)
    wanted = F.conv1d(F.pad(x, (taps - 1, 0)), layer.kernel(), layer.bias, groups=groups)
    got = layer(x)
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max().clamp_min(1.0)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp_min(1.0)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('taps, length', [(1, 9), (7, 50), (161, 50), (31, 400)])
@pytest.mark.parametrize('channels, groups', [((3, 5), 1), ((4, 4), 4), ((1, 1), 1)])
def test_centred_conv1d(taps, length, bias, channels, groups):
    """As torch's with padding='same', whose form it deploys to."""
    layer = spread(SMPConv1d(*channels, taps, padding='same', groups=groups, bias=bias, radius=0.1, causal=False))
    x = torch.randn(2, channels[0], length, dtype=torch.float64)
    wanted = F.conv1d(x, layer.kernel(), layer.bias, padding='same', groups=groups)
    assert relative_error(layer(x), wanted) < 1e-10
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    deployed = layer.eval().fuse()
    assert type(deployed) is LargeConv1d and deployed.groups == groups
    for function in (deployed, torch.jit.script(layer), torch.jit.script(deployed)):
        assert relative_error(function(x), wanted) < 1e-10
    plain = nn.Conv1d(*channels, taps, padding=taps // 2, groups=groups, bias=bias, dtype=torch.float64)
    plain.load_state_dict(deployed.state_dict())
    assert relative_error(plain(x), wanted) < 1e-10


@pytest.mark.parametrize('causal', [False, True])
def test_depthwise_conv1d_deploys(causal):
    layer = spread(SMPConv1d(4, 4, 31, groups=4, causal=causal, radius=0.1)).eval()
    x = torch.randn(2, 4, 60, dtype=torch.float64)
    wanted = layer(x)
    for function in (layer.fuse(), torch.jit.script(layer), torch.export.export(layer, (x,)).module()):
        assert relative_error(function(x), wanted) < 1e-10


@pytest.mark.parametrize('zeros', [0, 1, 150, 299, 300])
@pytest.mark.parametrize('out_chs, groups, name', [(3, 1, 'causal_conv1d'), (2, 2, 'depthwise_causal_conv1d')])
def test_deployed_conv1d_leaves_out_leading_zeros(monkeypatch, zeros, out_chs, groups, name):
    """In inference the taps that no point reached cost nothing; the sum is the same, also after a change in place."""
    taps = []
    real = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda x, w, *args: taps.append(w.shape[2]) or real(x, w, *args))
    conv = CausalConv1d(2, out_chs, 300, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 2, 400, dtype=torch.float64)
    with torch.no_grad():
        conv.weight[..., :zeros] = 0
        wanted = F.conv1d(F.pad(x, (299, 0)), conv.weight, conv.bias, groups=groups)
        assert relative_error(conv(x), wanted) <= 1e-12
        conv.weight[1, 0, 0] = 1.0
        conv(x)
    conv(x)  # gradients of all taps
    assert taps == [300 - zeros // 2 * 2 if zeros < 300 else 300, 300, 300]  # an even number is left out


@pytest.mark.parametrize(
    'layer, points, radius',
    [
        (lambda: SMPConv2d(8, 8, 31, groups=8), 240, 4 / 31),
        (lambda: SMPConv2d(8, 8, (5, 13), groups=8), 16, 2 / 5 + 2 / 13),
        (lambda: SMPConv2d(8, 8, 3, groups=8), 2, 1.0),
        (lambda: SMPConv2d(8, 6, 33), 16, 0.12),
        (lambda: SMPConv2d(8, 6, 17), 16, 0.12),
        (lambda: SMPConv2d(8, 6, 9), 16, 4 / 9),
        (lambda: SMPConv2d(8, 8, (1, 11), groups=8), 2, 2 / 11),
        (lambda: SMPConv1d(8, 6, 784), 30, 2 / 784),
        (lambda: SMPConv1d(8, 6, 784, radius=0.002, num_points=5), 5, 0.002),
    ],
)
def test_defaults(layer, points, radius):
    kernel = layer().kernel
    assert kernel.num_points == points and torch.allclose(kernel.radius, torch.tensor(radius))


@pytest.mark.parametrize(
    'layer, words',
    [
        (lambda: SMPConv2d(3, 3, 4), ('odd', '4')),
        (lambda: SMPConv2d(3, 3, (3, 6)), ('odd', '(3, 6)')),
        (lambda: SMPConv2d(3, 3, 0), ('odd and positive', '0')),
        (lambda: SMPConv2d(4, 8, 3, groups=4), ('groups', '4', '8')),
        (lambda: SMPConv2d(4, 4, 3, groups=2), ('groups', '2')),
        (lambda: SMPConv1d(3, 3, 0), ('kernel_size', '0')),
        (lambda: SMPConv1d(3, 3, -5), ('kernel_size', '-5')),
        (lambda: SMPConv1d(3, 3, 9, radius=3.0), ('radius', '3.0')),
        (lambda: RepSMPConv2d(3, 3, 9, small_kernel_size=2), ('odd', '2')),
        # written as for torch.nn
        (lambda: SMPConv2d(4, 4, 7, 1, 2, groups=4), ('padding=(3, 3)', '2')),
        (lambda: SMPConv2d(4, 4, 7, stride=2), ('stride=(1, 1)', '2')),
        (lambda: SMPConv1d(4, 4, 7, 1, 3), ('padding=(0,)', '3')),
        (lambda: SMPConv1d(4, 4, 7, 1, 3, causal=True), ('padding=(0,)', '3')),
        (lambda: SMPConv1d(4, 4, 7, 1, 0, causal=False), ('padding=(3,)', '0')),
        (lambda: SMPConv1d(4, 4, 8, causal=False), ('odd', '8')),
        (lambda: SMPConv1d(4, 8, 7, groups=4), ('groups', '4', '8')),
        (lambda: CausalConv1d(4, 4, 7, groups=2), ('groups', '2')),
        (lambda: LargeConv1d(4, 4, 8), ('odd and positive (one number)', '8')),
        (lambda: LargeConv1d(4, 4, 7, dilation=2), ('LargeConv1d has dilation=(1,)', '2')),
        (lambda: LargeConv1d(4, 4, 7, padding=2), ('padding=(3,)', '2')),
        (lambda: LargeConv1d(4, 4, 7, stride=2), ('stride=(1,)', '2')),
        (lambda: SMPConv1d(4, 4, (7, 9)), ('positive (one number)', '(7, 9)')),
        (lambda: SMPConv1d(4, 4, 7.0), ('positive (one number)', '7.0')),
        (lambda: LargeConv2d(4, 4, '7'), ('odd and positive', "'7'")),
        (lambda: CausalConv1d(4, 4, (7, 7)), ('positive (one number)', '(7, 7)')),
        (lambda: CausalConv1d(4, 4, 0), ('positive (one number)', '(0,)')),
        (lambda: PeripheralConv2d(4, 4, 7, 1, 3, 2, groups=4), ('padding=(6, 6)', '3')),
        (lambda: SMPConv2d(4, 4, 7, dilation=0, groups=4), ('dilation', '(0, 0)')),
        (lambda: LargeConv2d(4, 4, 7, dilation=(1, -1)), ('dilation', '(1, -1)')),
        (lambda: SMPConv1d(4, 4, 7, 1, 0, 2), ('dilation=(1,)', '2')),
        (lambda: PeripheralConv2d(4, 4, (7, 9), groups=4), ('square', '(7, 9)')),
    ],
)
def test_arguments_that_cannot_work(layer, words):
    with pytest.raises(ValueError) as e:
        layer()
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('make', [SMPConv2d, PeripheralConv2d, LargeConv2d])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('dilation', [2, (3, 1)])
def test_dilation(make, groups, dilation):
    """With the taps as far apart as in torch's convolution, which the deployed layer says it is."""
    layer = make(4, 4, 7, dilation=dilation, groups=groups).double()
    if make is SMPConv2d:
        spread(layer)
    x = torch.randn(2, 4, 12, 9, dtype=torch.float64)
    weight = layer.weight if make is LargeConv2d else layer.kernel()
    pair = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = tuple(3 * d for d in pair)
    wanted = F.conv2d(x, weight, layer.bias, padding=padding, dilation=pair, groups=groups)
    assert relative_error(layer(x), wanted) < 1e-10
    deployed = layer if make is LargeConv2d else layer.eval().fuse()
    assert (deployed.dilation, deployed.padding) == (pair, padding)
    assert relative_error(deployed(x), wanted) < 1e-10
    assert relative_error(nn.Conv2d.forward(deployed, x), wanted) < 1e-10
    assert f'dilation={pair}' in repr(layer)
    deployed.dilation, deployed.padding = [2, 2], 6  # as torch takes them too
    wanted = F.conv2d(x, deployed.weight, deployed.bias, padding=6, dilation=2, groups=groups)
    assert relative_error(deployed(x), wanted) < 1e-10
    deployed.dilation = 2
    assert relative_error(deployed(x), wanted) < 1e-10


def is_alive(kernel):
    """Whether each point reaches a tap, so that it learns, and how many rows and columns of taps are reached."""
    dense = kernel()
    (grad,) = torch.autograd.grad(dense.sum(), kernel.weights)
    reached = (dense.abs().sum((0, 1)) > 0).nonzero()
    return (grad != 0).any(1).float().mean().item(), [len(dim.unique()) for dim in reached.unbind(1)]


@pytest.mark.parametrize('groups', [1, 32])
@pytest.mark.parametrize('size', [1, 3, 5, 7, 9, 15, 17, 31, (1, 11), (11, 1), (1, 31), (3, 31), (31, 5), (7, 31)])
def test_fresh_kernels_are_alive(groups, size):
    """Nearly all points of a fresh layer learn, and it sees more than its centre, along both sides."""
    conv = SMPConv2d(32, 32, size, groups=groups)
    alive, sides = is_alive(conv.kernel)
    assert alive > 0.95
    taps = conv.kernel.kernel_size
    assert all(number >= (3 if k > 3 else 1) for number, k in zip(sides, taps)) and (sides != [1, 1] or taps == [1, 1])


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('taps', [1, 3, 15, 101, 1001])
def test_fresh_kernels_of_sequences_are_alive(causal, taps):
    conv = SMPConv1d(32, 32, taps, causal=causal)
    alive, (reached,) = is_alive(conv.kernel)
    assert alive > 0.9 and reached >= min(taps, 2)
    if causal:
        dense = conv.kernel().abs().sum((0, 1))
        assert dense[-1] > 0.5 * dense.max() or taps > 100  # the present is reached


def test_blocks_name_what_they_do_not_take():
    for make, words in (
        (lambda: RepSMPConv1d(4, 4, 31, causal=False), ('RepSMPConv1d', 'causal', 'num_points')),
        (lambda: RepSMPConv1d(4, 4, 31, groups=4), ('RepSMPConv1d', 'groups')),
        (lambda: RepSMPConv2d(4, 4, 31, bias=True), ('RepSMPConv2d', 'bias')),
    ):
        with pytest.raises(TypeError) as e:
            make()
        assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize('block, x', [(RepSMPConv1d(4, 4, 7), (4, 4)), (RepSMPConv2d(4, 4, 7), (4, 9, 9))])
def test_two_branches_want_a_batch(block, x):
    """Batch norms could take channels for samples."""
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match='expects a .D input'):
                block.train(training)(torch.randn(x))


def test_arguments_of_torch():
    """In the order of torch.nn: code that was written for its layers makes these."""
    x = torch.randn(2, 4, 9, 9)
    for layer in (SMPConv2d, PeripheralConv2d):
        conv = layer(4, 4, (7, 7), 1, 3, 1, 4, False)
        assert conv.depthwise and conv.bias is None and conv(x).shape == x.shape
    conv = SMPConv1d(4, 6, (7,), 1, 0, 1, 1, False)
    assert conv.bias is None and conv(x.flatten(2)).shape == (2, 6, 81)


@pytest.mark.parametrize('groups, large, small', [(4, 13, 5), (1, 9, 3)])
@torch.no_grad()
def test_two_branches_2d(groups, large, small):
    """y = BN(large(x)) + BN(small(x)), written out with torch's own functions."""
    block = randomize_norms(RepSMPConv2d(4, 4, large, small, groups=groups)).double().eval()
    x = torch.randn(2, 4, 10, 12, dtype=torch.float64)
    wanted = 0
    for kernel, norm in ((block.large.kernel(), block.large_norm), (block.small.weight, block.small_norm)):
        y = F.conv2d(x, kernel, padding=kernel.shape[2] // 2, groups=groups)
        wanted = wanted + F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    assert relative_error(block(x), wanted) < 1e-10


@torch.no_grad()
def test_two_branches_1d():
    block = randomize_norms(RepSMPConv1d(3, 4, 60, large_bias=True, radius=0.1)).double().eval()
    block.large.bias.normal_()
    x = torch.randn(2, 3, 80, dtype=torch.float64)
    wanted = 0
    branches = (block.large.kernel(), block.large.bias, block.large_norm), (block.small.weight, None, block.small_norm)
    for kernel, bias, norm in branches:
        y = F.conv1d(F.pad(x, (kernel.shape[2] - 1, 0)), kernel, bias)
        wanted = wanted + F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    assert block.small.weight.shape[2] == 5 and block.small.bias is None
    assert relative_error(block(x), wanted) < 1e-10


def test_norms_of_sequences_as_maps():
    """The same results, statistics and gradients in the way that is faster on a GPU."""
    block = randomize_norms(RepSMPConv1d(3, 4, 60, radius=0.1)).double().train()
    other = copy.deepcopy(block)
    x = torch.randn(2, 3, 80, dtype=torch.float64)
    upstream = torch.randn(2, 4, 80, dtype=torch.float64)
    wanted = block(x)
    y = other._norm_as_map(other.large(x), other.small(x))
    assert not block._is_faster_as_map(wanted)  # on a CPU
    assert y.stride()[1:] == (1, 4) and relative_error(y, wanted) < 1e-10
    wanted.backward(upstream)
    y.backward(upstream)
    for (name, a), b in zip(block.named_parameters(), other.parameters()):
        assert relative_error(b.grad, a.grad) < 1e-9, name
    for (name, a), b in zip(block.named_buffers(), other.buffers()):
        assert torch.allclose(b, a), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'layer, shape',
    [
        (lambda: SMPConv2d(4, 4, 13, groups=4), (2, 4, 16, 16)),
        (lambda: SMPConv2d(4, 4, 13), (2, 4, 16, 16)),
        (lambda: SMPConv1d(4, 4, 100), (2, 4, 100)),
    ],
)
def test_autocast(layer, shape, dtype):
    module, x = layer(), torch.randn(shape)
    wanted = module(x)
    with torch.autocast('cpu', dtype=dtype):
        y = module(x)
    assert y.dtype == dtype and relative_error(y, wanted) < (5e-2 if dtype == torch.bfloat16 else 1e-2)
    y.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters()
    )


def test_drop_in_for_torch():
    """As layers of any network: in nn.Sequential, trained by a plain optimizer."""
    net = nn.Sequential(SMPConv2d(1, 4, 9), nn.ReLU(), SMPConv2d(4, 4, 9, groups=4), nn.Flatten(2), SMPConv1d(4, 2, 16))
    x, y = torch.randn(4, 1, 4, 4), torch.randn(4, 2, 16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize('bias', [True, False])
def test_layers_of_other_networks_deploy(bias):
    """timm.utils.reparameterize_model makes plain convolutions of them."""
    net = nn.Sequential(
        SMPConv2d(1, 4, 9, bias=bias),
        SMPConv2d(4, 4, 9, groups=4, bias=bias),
        PeripheralConv2d(4, 4, 9, groups=4, bias=bias),
        nn.Flatten(2),
        SMPConv1d(4, 2, 16, bias=bias),
    ).eval()
    for module in net:
        if bias and hasattr(module, 'bias'):
            nn.init.normal_(module.bias)
    x = torch.randn(2, 1, 6, 5)
    deployed = reparameterize_model(net)
    with torch.no_grad():
        assert relative_error(deployed(x), net(x)) < 1e-5
    kinds = [type(m) for m in deployed]
    assert kinds == [LargeConv2d, LargeConv2d, LargeConv2d, nn.Flatten, CausalConv1d]
    assert all((module.bias is not None) == bias for module in deployed if hasattr(module, 'bias'))
    trained = {id(p) for p in net.parameters()} | {p.data_ptr() for p in net.parameters()}
    assert not any(id(p) in trained or p.data_ptr() in trained for p in deployed.parameters())


def test_weight_decay_of_other_networks():
    net = nn.ModuleDict(dict(a=SMPConv2d(1, 4, 9), b=nn.Sequential(SMPConv1d(4, 2, 16)), c=nn.Linear(2, 2)))
    exempt = no_weight_decay(net)
    assert exempt == {f'{part}.kernel.{key}' for part in ('a', 'b.0') for key in ('coords', 'radius_offset')}
    assert exempt <= {name for name, _ in net.named_parameters()}
    assert no_weight_decay(SMPKernel(1, 2, 5)) == {'coords', 'radius_offset'}


def test_eval_folds_and_follows_every_change():
    """In eval mode without gradients a block computes as its deployed form does, for its current values."""
    block = RepSMPConv2d(4, 4, 7, groups=4, num_points=5)
    x = torch.randn(2, 4, 9, 9)
    block.train()(x)  # moves the running statistics
    block.eval()

    def branches():
        return block.large_norm(block.large(x)) + block.small_norm(block.small(x))

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: block.large.kernel.coords.data.add_(0.1),
            lambda: block.small.weight.mul_(2),
            lambda: block.large_norm.running_mean.add_(0.5),
            lambda: block.small_norm.running_var.data.mul_(3),
        ):
            change()
            torch.testing.assert_close(block(x), branches(), rtol=1e-5, atol=1e-5)
        seen = []
        handle = block.small.register_forward_hook(lambda *_: seen.append(1))
        block(x)
        assert seen == [1]  # who watches a branch sees it run
        handle.remove()
        block(x)
        assert seen == [1]
    assert block(x).requires_grad


CONSTANT = {
    'dense': (lambda: LargeConv2d(3, 4, 9), lambda n: torch.randn(2, 3, n, n + 2)),
    'depthwise': (lambda: LargeConv2d(3, 3, 9, groups=3), lambda n: torch.randn(2, 3, n, n + 2)),
    'causal': (lambda: CausalConv1d(3, 4, 70), lambda n: torch.randn(2, 3, 6 * n)),
    'causal, depthwise': (lambda: CausalConv1d(3, 3, 70, groups=3), lambda n: torch.randn(2, 3, 6 * n)),
    'centred': (lambda: LargeConv1d(3, 4, 31), lambda n: torch.randn(2, 3, 6 * n)),
    'centred, depthwise': (lambda: LargeConv1d(3, 3, 31, groups=3), lambda n: torch.randn(2, 3, 6 * n)),
    'points, dense': (lambda: SMPConv2d(3, 4, 9), lambda n: torch.randn(2, 3, n, n + 2)),
    'points, depthwise': (lambda: SMPConv2d(3, 3, 9, groups=3), lambda n: torch.randn(2, 3, n, n + 2)),
    'points, causal': (lambda: SMPConv1d(3, 4, 70), lambda n: torch.randn(2, 3, 6 * n)),
}


@pytest.fixture
def num_transforms(monkeypatch):
    """Counts transforms to the frequency domain: two in a convolution, or one where the kernel's was kept."""
    calls = []
    for backend in (fft, dft):
        real = backend._transform
        monkeypatch.setattr(backend, '_transform', lambda *args, real=real, **kw: calls.append(1) or real(*args, **kw))

    def count(function, *args):
        calls.clear()
        function(*args)
        return len(calls)

    return count


def the_tensor(layer):
    """What the kernel of the layer depends on."""
    return layer.weight if hasattr(layer, 'weight') else layer.kernel.weights


@pytest.mark.parametrize('backend', ['fft', 'dft'])
@pytest.mark.parametrize('kind', CONSTANT)
@torch.no_grad()
def test_constant_kernels_are_transformed_once(kind, backend, num_transforms):
    """In inference, and again for whatever changes: values (also behind version counters), input size, precision."""
    make, batch = CONSTANT[kind]
    layer = make().eval()
    weight = the_tensor(layer)

    def check(x, transforms):
        with ops.use_backend(backend):
            assert num_transforms(layer, x) == transforms
            got = layer(x)
        with ops.use_backend('reference'):
            assert relative_error(got, layer(x)) < 1e-5

    x, wide = batch(8), batch(11)
    check(x, 2)
    check(x, 1)
    check(torch.randn_like(x), 1)
    check(torch.randn(1, *x.shape[1:]), 1)  # a batch of another size
    check(wide, 2)
    check(wide, 1)
    for change in (
        lambda: weight.mul_(2.0),
        lambda: weight.data.flatten()[-1:].add_(0.5),
        lambda: weight.data.copy_(weight.flip(0)),
        lambda: setattr(weight, 'data', torch.randn_like(weight)),
        lambda: layer.load_state_dict(make().state_dict()),
    ):
        change()
        check(wide, 2)
        check(wide, 1)
    layer.double()
    check(wide.double(), 2)
    check(wide.double(), 1)


@pytest.mark.parametrize('kind', CONSTANT)
def test_what_is_kept_stays_out_of_the_way(kind, num_transforms):
    """Of gradients, copies, pickles, state dicts and autocast; and it is not large."""
    make, batch = CONSTANT[kind]
    layer, x = make().eval(), batch(8)
    keys = set(layer.state_dict())
    with ops.use_backend('fft'):
        with torch.no_grad():
            wanted = layer(x)
            assert num_transforms(layer, x) == 1
        assert num_transforms(layer, x) == 2
        layer(x).sum().backward()
        assert the_tensor(layer).grad.abs().sum() > 0
        size = len(pickle.dumps(layer))
        assert size < len(pickle.dumps(make())) + 1000 + sum(
            p.grad.nbytes for p in layer.parameters() if p.grad is not None
        )
        with torch.no_grad():
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert num_transforms(other, x) == 2
                assert num_transforms(other, x) == 1
                torch.testing.assert_close(other(x), wanted)
            with torch.autocast('cpu', dtype=torch.bfloat16):
                half = layer(x)
            assert half.dtype == torch.bfloat16 and relative_error(half, wanted) < 5e-2
            torch.testing.assert_close(layer(x), wanted)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cache, '_MAX_NUMBERS', 10)
                other = copy.deepcopy(layer)
                assert [num_transforms(other, x) for _ in range(2)] == [2, 2]
    assert set(layer.state_dict()) == keys


@pytest.mark.parametrize(
    'layer, x',
    [
        (LargeConv2d(4, 6, 9), torch.randn(2, 4, 12, 12)),
        (PointwiseConv2d(4, 6), torch.randn(2, 4, 12, 12)),
        (CausalConv1d(4, 6, 70), torch.randn(2, 4, 100)),
        (LargeConv1d(4, 6, 31), torch.randn(2, 4, 100)),
    ],
)
def test_adapters_make_convolutions_like_these(layer, x):
    """LoRA builds two convolutions of the class of the layer, with the arguments of torch's."""
    make, ones = type(layer), (1,) * (x.ndim - 2)
    down = make(4, 3, layer.kernel_size, layer.stride, layer.padding, bias=False)
    up = make(3, 6, ones, ones, bias=False)
    wanted = make(4, 6, layer.kernel_size, bias=False)
    wanted.weight.data = torch.einsum('or,ri...->oi...', up.weight.flatten(1), down.weight).data
    torch.testing.assert_close(up(down(x)), wanted(x), rtol=1e-4, atol=1e-5)
    for wrong in (dict(stride=2), dict(padding=3), *([] if make is LargeConv2d else [dict(dilation=2)])):
        with pytest.raises(ValueError, match=f'{make.__name__} has {next(iter(wrong))}='):
            make(4, 3, layer.kernel_size, **wrong)


OTHER_NETWORKS = {  # of timm, and how many of their convolutions are large, dense or depthwise, and keep the size
    'convnext': (lambda: ConvNeXt(depths=[1] * 4, dims=[8, 16, 24, 32], kernel_sizes=(13, 3, 7, 5)), 2),
    'convnext, dilated': (lambda: ConvNeXt(depths=[1] * 4, dims=[8, 16, 24, 32], output_stride=8), 4),
    'convmixer': (lambda: ConvMixer(12, 3, kernel_size=9, patch_size=4), 3),
    'inception_next': (lambda: timm.create_model('inception_next_atto', depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), 8),
    'fastvit': (lambda: timm.create_model('fastvit_t8', embed_dims=(8, 16, 32, 64), layers=(1, 1, 1, 1)), 4),
}


@pytest.mark.parametrize('kind', OTHER_NETWORKS)
def test_large_convolutions_of_other_networks(kind):
    """They compute as before, with the same parameters under the same names, deployed by timm or not."""
    make, num_large = OTHER_NETWORKS[kind]
    model = make().double()
    randomize_norms(model)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    converted = copy.deepcopy(model)
    parameters, modules = list(converted.named_parameters()), list(converted.named_modules())
    assert convert_large_convs(converted) is converted
    assert sum(type(m) is LargeConv2d for m in converted.modules()) == num_large
    assert all(a is b for (_, a), (_, b) in zip(parameters, converted.named_parameters(), strict=True))
    assert all(a is b for (_, a), (_, b) in zip(modules, converted.named_modules(), strict=True))
    assert list(converted.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=fmt)
        outputs = [m.zero_grad() or m(x) for m in (model, converted)]
        for y in outputs:
            y.square().sum().backward()
        assert relative_error(outputs[1], outputs[0]) < 1e-10
        for p, q in zip(model.parameters(), converted.parameters(), strict=True):
            assert relative_error(q.grad, p.grad) < 1e-9 or p.grad.norm() < 1e-9
    model, converted = (reparameterize_model(m.eval()) for m in (model, converted))
    with torch.no_grad():
        assert relative_error(converted(x), model(x)) < 1e-10
        assert relative_error(pickle.loads(pickle.dumps(converted))(x), model(x)) < 1e-10


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize(
    'make, x',
    [
        (lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8), (2, 8, 14, 14)),
        (lambda: nn.Conv2d(8, 8, 31, padding=15), (2, 8, 20, 20)),
        (lambda: nn.Conv1d(8, 8, 31, padding=15, groups=8), (2, 8, 100)),
        (lambda: nn.Conv1d(30, 30, 501, padding=250, bias=False), (1, 30, 1001)),
    ],
)
@pytest.mark.parametrize('backend', [None, 'direct', 'fft'])
def test_large_convolutions_keep_the_memory_format(make, x, last, backend):
    """Code around them may call view."""
    conv, x = make(), torch.randn(x)
    if last:  # or a sequence with its channels behind the steps
        x = to_channels_last(x, x.dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), ops.use_backend(backend):
            wanted, y = conv(x), convert_large_convs(copy.deepcopy(conv))(x)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-4)
    for one in (x[0], x[0].transpose(-1, -2).contiguous().transpose(-1, -2)):  # without a batch
        wanted, y = conv(one), convert_large_convs(copy.deepcopy(conv))(one)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-4)


def test_slices_of_channels_last_keep_the_memory_format():
    """As torch's: some channels, rows or columns of a map in channels_last give a map in channels_last."""
    whole = torch.randn(2, 24, 14, 14).to(memory_format=torch.channels_last)
    for x in (whole[:, 4:12], whole[:, :, 2:10, 3:12], whole[:, :, 2:9]):
        channels = x.shape[1]
        conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        expected = conv(x)
        convert_large_convs(conv)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = conv(x)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride() and y.is_contiguous(memory_format=torch.channels_last)


def test_offsets_that_are_expanded_stay():
    conv = SMPConv1d(2, 2, 80)
    offset = nn.Parameter(torch.full((1, 1), 50.0).expand(2, 30))
    conv.kernel.radius_offset = offset
    conv(torch.randn(1, 2, 80)).sum().backward()
    assert (conv.kernel.radius == 1.0).all() and (offset == 50).all() and len(conv.state_dict()) == 5


def test_shorter_weight_in_the_place_of_another():
    conv = CausalConv1d(1, 1, 200).eval().requires_grad_(False)
    conv.weight[..., :150] = 0
    x = torch.randn(1, 1, 300)
    conv(x)
    for weight in (torch.zeros(1, 1, 100), torch.randn(1, 1, 100)):
        conv.weight = nn.Parameter(weight, requires_grad=False)
        torch.testing.assert_close(conv(x), F.conv1d(F.pad(x, (99, 0)), weight, conv.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, value', [('stride', (2,)), ('dilation', (2,)), ('padding_mode', 'circular')])
def test_causal_convolutions_that_are_changed(name, value):
    """They do not compute something else than they say."""
    conv, block = CausalConv1d(4, 4, 9), RepSMPConv1d(4, 4, 30).eval()
    setattr(conv, name, value)
    block.small = conv
    for part in (conv, block):
        with pytest.raises(ValueError, match='CausalConv1d has stride 1.* have been changed to'):
            part(torch.randn(2, 4, 50))
    with pytest.raises(RuntimeError, match='cannot be reparameterized'):
        block.fuse()
    conv = CausalConv1d(4, 4, 9)
    conv.stride, conv.padding, conv.dilation = 1, 0, 1  # the same in other words
    assert conv(torch.randn(2, 4, 50)).shape == (2, 4, 50)


@pytest.mark.parametrize(
    'make, x',
    [
        (lambda: LargeConv2d(8, 8, 31), (1, 8, 40, 40)),
        (lambda: LargeConv2d(8, 8, 31, groups=8), (1, 8, 40, 40)),
        (lambda: CausalConv1d(4, 4, 128), (1, 4, 200)),
        (lambda: SMPConv2d(8, 8, 31), (1, 8, 40, 40)),
        (lambda: RepSMPConv1d(4, 4, 128), (1, 4, 200)),
        (lambda: RepSMPConv2d(8, 8, 31), (1, 8, 40, 40)),
    ],
)
@pytest.mark.parametrize('mode', ['real', 'fake', 'symbolic'])
def test_traced_by_make_fx(make, x, mode):
    layer, x = make().eval(), torch.randn(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = layer(x)
            traced = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
            torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-5)


def test_pruned_biases_deploy():
    """As the next call computes them."""
    for layer in (SMPConv2d(4, 4, 7, groups=4), SMPConv1d(4, 4, 7), PeripheralConv2d(4, 4, 7, groups=4)):
        nn.init.normal_(layer.bias)
        torch.nn.utils.prune.random_unstructured(layer, 'bias', 0.25)
        layer.bias_orig.data.fill_(5.0)
        assert torch.equal(layer.fuse().bias, 5.0 * layer.bias_mask)


@pytest.mark.parametrize('backend', ['fft', 'dft'])
def test_one_cache_for_two_operations(backend):
    kept, weight, x = cache.KernelCache(), torch.randn(4, 4, 7), torch.randn(1, 4, 20)
    with torch.no_grad(), ops.use_backend(backend):
        for _ in range(2):
            for op in (ops.causal_conv1d, ops.conv1d):
                torch.testing.assert_close(op(x, weight, keep=kept.keep(weight)), op(x, weight))
        one = x[..., :1]  # for which both cut the kernel to one tap, each to another
        for op in (ops.causal_conv1d, ops.conv1d, ops.causal_conv1d):
            torch.testing.assert_close(op(one, weight, keep=kept.keep(weight)), op(one, weight))
        weight, two = torch.randn(4, 1, 7), x[..., :2]
        for op, channels in ((ops.depthwise_conv1d, 4), (ops.conv1d, 1), (ops.depthwise_conv1d, 4)):
            y = op(two[:, :channels], weight, keep=kept.keep(weight))
            torch.testing.assert_close(y, op(two[:, :channels], weight))


def test_large_convolutions_are_found():
    """By what they compute, and only those."""
    converted = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 7, padding=3, groups=4),
            nn.Conv2d(4, 6, (1, 11), padding=(0, 5), bias=False),
            nn.Conv2d(1, 1, 9, padding='same', dilation=2),
            nn.Conv2d(4, 4, 7, padding=(9, 3), groups=4, dilation=(3, 1)),
            nn.Conv1d(4, 4, 31, padding=15, groups=4),
            nn.Conv1d(4, 6, 31, padding='same', bias=False),
        ]
    )
    left = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 5, padding=2, groups=4),
            nn.Conv2d(4, 4, 8, padding='same', groups=4),
            nn.Conv2d(4, 4, 7, groups=4),
            nn.Conv2d(4, 4, 7, padding=3, groups=2),
            nn.Conv2d(4, 8, 7, padding=3, groups=4),
            nn.Conv2d(4, 4, 7, padding=3, stride=2),
            nn.Conv2d(4, 4, 7, padding=3, padding_mode='reflect'),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 7, padding=3)),
            nn.Conv2d(4, 4, 7, padding=3),
            nn.Conv1d(4, 4, 7),
            nn.Conv1d(4, 4, 7, padding='same', dilation=2),
            nn.Conv2d(4, 4, 7, padding=3, dtype=torch.complex64),
            nn.ConvTranspose2d(4, 4, 7, padding=3),
        ]
    )
    left[8].forward = left[8].forward  # as libraries do that move weights
    kinds = [type(m) for m in left]
    convert_large_convs(nn.ModuleList([converted, left]))
    assert [type(m) for m in converted] == [LargeConv2d] * 4 + [LargeConv1d] * 2
    assert [type(m) for m in left] == kinds
    assert type(convert_large_convs(left[0], min_size=5)) is LargeConv2d
    sequences = torch.randn(2, 4, 50)
    for conv in converted[4:]:
        torch.testing.assert_close(conv(sequences), nn.Conv1d.forward(conv, sequences), rtol=1e-4, atol=1e-5)
    conv.padding, conv.dilation = (30,), (2,)  # as code may change them
    torch.testing.assert_close(conv(sequences), F.conv1d(sequences, conv.weight, padding=30, dilation=2))
    assert repr(converted[0]) == repr(nn.Conv2d(4, 4, 7, padding=3, groups=4)).replace('Conv2d', 'LargeConv2d')


def test_small_convolutions_of_our_networks():
    """Converted too if asked for, which deployment takes."""
    model = timm.create_model('smpconv_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        convert_large_convs(model, min_size=1)
        torch.testing.assert_close(reparameterize_model(model)(x), wanted, rtol=1e-3, atol=1e-4)


def test_branches_that_do_not_fit_are_not_folded():
    """A depthwise small branch beside a dense large one, or one that is not causal: called one by one, not deployed."""
    sequences, maps = torch.randn(2, 4, 20), torch.randn(2, 4, 9, 9)
    for block, small, large, x in (
        (RepSMPConv1d(4, 4, 9), CausalConv1d(4, 4, 5, groups=4, bias=False), None, sequences),
        (RepSMPConv1d(4, 4, 9), None, SMPConv1d(4, 4, 9, causal=False), sequences),
        (RepSMPConv2d(4, 4, 9), LargeConv2d(4, 4, 5, groups=4), None, maps),
    ):
        block.small, block.large = small or block.small, large or block.large
        block.eval().requires_grad_(False)
        wanted = block.large_norm(block.large(x)) + block.small_norm(block.small(x))
        torch.testing.assert_close(block(x), wanted)
        with pytest.raises(RuntimeError, match='its small convolution must pad'):
            block.fuse()
    for other in (dict(causal=False), dict(groups=4)):
        with pytest.raises(TypeError, match=f'takes no {next(iter(other))}'):
            RepSMPConv1d(4, 4, 9, **other)
    assert 'causal=False' in repr(SMPConv1d(4, 4, 9, causal=False)) and 'causal' not in repr(SMPConv1d(4, 4, 9))


def test_large_convolutions_keep_what_is_attached_to_them():
    """Hooks that see calls or compute weights, adapters, and the forms that exporters see."""
    conv, x, seen = nn.Conv2d(4, 4, 9, padding='same', groups=4), torch.randn(1, 4, 12, 12), []
    wanted = conv(x)
    conv.register_forward_hook(lambda *args: seen.append(args))
    net = convert_large_convs(nn.Sequential(conv))
    torch.testing.assert_close(net(x), wanted)
    assert len(seen) == 1
    torch.nn.utils.prune.l1_unstructured(conv, 'weight', 0.5)
    torch.testing.assert_close(net(x), F.conv2d(x, conv.weight_orig * conv.weight_mask, conv.bias, padding=4, groups=4))
    net = convert_large_convs(nn.Sequential(nn.Conv2d(4, 4, 9, padding='same', groups=4)))
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))
    if hasattr(torch.compiler, 'is_exporting'):  # torch 2.6 cannot tell an export from a compilation
        (call,) = [n.target for n in exported.graph.nodes if n.op == 'call_function']
        assert call is torch.ops.aten.conv2d.default
    like = type(net[0])(4, 4, net[0].kernel_size, net[0].stride, net[0].padding, groups=4)  # as LoRA does
    like.load_state_dict(net[0].state_dict())
    torch.testing.assert_close(like(x), net(x))


@pytest.mark.parametrize(
    'make', [lambda: LargeConv2d(4, 4, 5), lambda: LargeConv1d(4, 4, 5), lambda: CausalConv1d(4, 4, 5)]
)
def test_weights_that_are_computed_are_computed_once(make):
    """In each call: some draw, or iterate."""
    layer, calls = make(), []

    class Counting(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight

    torch.nn.utils.parametrize.register_parametrization(layer, 'weight', Counting())
    calls.clear()
    layer(torch.randn(1, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(1, 4, 9))
    assert len(calls) == 1


class Gathering(nn.Module):
    """A wrapper as FSDP's: what it wraps has its weights while it is called, and passes on all attributes."""

    def __init__(self, module):
        super().__init__()
        self.module, self.weights = module, module.weights.data.clone()
        module.weights.data = torch.zeros_like(module.weights)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self):
        self.module.weights.data.copy_(self.weights)
        return self.module()


@pytest.mark.parametrize('grad', [False, True])
def test_wrapped_kernels_are_called(grad):
    layer, x = SMPConv2d(4, 4, 9, groups=4).eval(), torch.randn(2, 4, 12, 12)
    wanted = layer(x).detach()
    layer.kernel = Gathering(layer.kernel)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), wanted)
    torch.testing.assert_close(layer.fuse()(x), wanted)


class PeLKKernelOfSomebody(PeripheralKernel):
    """It has one more parameter, of which nothing else knows."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self):
        return self.factor * super().forward()


def test_kernels_with_more_parameters():
    layer, x = PeripheralConv2d(4, 4, 9, groups=4).eval(), torch.randn(2, 4, 12, 12)
    layer.kernel = PeLKKernelOfSomebody(1, 4, 9)
    with torch.no_grad():
        before = layer(x)
        layer.kernel.factor.fill_(2.0)
        torch.testing.assert_close(layer(x) - layer.bias[:, None, None], 2 * (before - layer.bias[:, None, None]))
