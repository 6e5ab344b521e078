"""Deployment of every registered model: same outputs, plain modules, nothing that a user does with a model breaks."""

import copy
import warnings

import pytest
import timm
import torch
from conftest import ALL_MODELS, SMALLER, build, input_size, make_input
from safetensors.torch import save_file
from synth import randomize_norms, relative_error
from timm.utils import freeze, reparameterize_model, unfreeze
from torch import nn
from torch.nn.utils import prune

from timm_smpconv.layers import (
    ConvNorm,
    LargeConv2d,
    PeripheralKernel,
    RepSMPConv1d,
    RepSMPConv2d,
    SMPConv2d,
    SMPKernel,
    convert_large_convs,
    fold_norm_into_next,
)
from timm_smpconv.models.smpconv import ConvFFN

PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Linear,
    nn.LayerNorm,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.Dropout,
    nn.Flatten,
    nn.AdaptiveAvgPool2d,
)
KERNELS = (PeripheralKernel, SMPKernel)
FOLDED = (*KERNELS, RepSMPConv1d, RepSMPConv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def assert_plain(model):
    """No kernels to render, no norms with statistics, and weights in plain layers alone."""
    for name, module in model.named_modules():
        assert not isinstance(module, FOLDED), f'{name}: {module}'
        if list(module.parameters(recurse=False)):
            assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LayerNorm)), f'{name}: {module}'
        if not list(module.children()):
            ours = type(module).__module__.startswith('timm_smpconv')
            timms = type(module).__module__.startswith('timm.layers')  # global pooling
            assert isinstance(module, PLAIN) or ours or timms, f'{name}: {module}'
            assert list(module.parameters()) == [] or isinstance(module, PLAIN), f'{name}: {module}'
    buffers = {name.rsplit('.', 1)[-1] for name, _ in model.named_buffers()}
    assert buffers <= {'permutation'}


def spread_points(model, seed=0):
    """Moves the points of all kernels about, so that the whole support carries weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SMPKernel):
                dtype = module.coords.dtype
                module.coords.copy_(0.5 * torch.randn(module.coords.shape, generator=generator))
                radius = 0.05 + 0.15 * torch.rand(module.base_radius.shape, generator=generator)
                module.set_radius(radius.to(dtype))
    return model


@pytest.mark.parametrize('how', ['method', 'timm'])
@torch.no_grad()
def test_same_outputs(name, how, model, x):
    wanted = model(x)
    deployed = model.reparameterize() if how == 'method' else reparameterize_model(model)
    if how == 'method':
        assert deployed is model
    else:
        assert any(isinstance(m, KERNELS) for m in model.modules())  # a copy was changed
        assert torch.equal(model(x), wanted)
    assert_plain(deployed)
    assert not any(module.training for module in deployed.modules())  # or batches are not computed in parts
    assert relative_error(deployed(x), wanted) <= 1e-5


@torch.no_grad()
def test_same_outputs_with_points_spread(name, model, x):
    """Kernels that fill their support: float64, where only a mistake shows."""
    model, x = spread_points(model).double(), x.double()
    wanted, features = model(x), model.forward_features(x)
    deployed = model.reparameterize()
    assert {p.dtype for p in deployed.parameters()} == {torch.float64}
    assert relative_error(deployed(x), wanted) <= 1e-9
    assert relative_error(deployed.forward_features(x), features) <= 1e-9


@torch.no_grad()
def test_other_sizes(name, model):
    """The deployed kernel is the rendered one at any resolution or length."""
    size = list(timm.get_pretrained_cfg(name).input_size)
    if 'pmnist' in name:
        pytest.skip('fixed length')
    size[1:] = [1, 300] if size[1] == 1 else ([20, 24] if size[1] < 64 else [96, 64])
    x = torch.randn(1, *size)
    wanted = model(x)
    assert relative_error(model.reparameterize()(x), wanted) <= 1e-5


def test_refused_in_train_mode(name, model, x):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match='train mode.*eval'):
        model.reparameterize()
    assert model.training and [type(m) for m in model.modules()] == modules
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
def test_timm_deploys_in_train_mode(name, model, x):
    """Its scripts do (validate.py --reparam), and go to eval mode afterwards."""
    wanted = model(x)
    deployed = reparameterize_model(model.train())
    assert_plain(deployed)
    assert all(m.training for m in deployed.modules())
    assert relative_error(deployed.eval()(x), wanted) <= 1e-5


@pytest.mark.parametrize('how', ['method', 'timm'])
def test_deployed_networks_become_folders(name, how, model, x, tmp_path):
    deployed = model.reparameterize() if how == 'method' else reparameterize_model(model)
    if not hasattr(timm.models, 'get_model_args'):
        pytest.skip('this version of timm notes no arguments')
    timm.models.save_for_hf(deployed, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), deployed(x))


def test_frozen_networks_stay_frozen(name, model, x):
    for frozen in (model.requires_grad_(False).reparameterize(), model):
        assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(
    'name, trained, deployed',
    [
        ('pelk_tiny', 'mlp.fc2.bias', 'mlp.fc2'),
        ('pelk_tiny', 'gamma', 'mlp.fc2'),
        ('pelk_tiny', 'pos_embed', 'conv'),
        ('smpconv_mobile31', 'blocks.0.norm.weight', 'blocks.0.pw1.conv'),
    ],
)
def test_what_trains_trains_on(name, trained, deployed):
    model = build(name).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.endswith(trained))
    model.reparameterize()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, _ in model.named_parameters() if f'.{deployed}.' in key
    }


@torch.no_grad()
def test_padding_is_kept():
    """Of images whose borders meet, for one."""
    model = randomize_norms(build('smpconv_mobile31')).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.stride == (2, 2):
            m.padding_mode, m._reversed_padding_repeated_twice = 'circular', [p for p in m.padding[::-1] for _ in '12']
    x = make_input('smpconv_mobile31', 1)
    wanted = model(x)
    assert relative_error(model.reparameterize()(x), wanted) <= 1e-5
    layer, plain = LargeConv2d(4, 4, 5, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4, padding_mode='circular')
    layer.load_state_dict(plain.state_dict())
    layer.padding_mode, layer._reversed_padding_repeated_twice = 'circular', [2] * 4
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(layer(x), plain(x))
    block = RepSMPConv2d(4, 4, 9, groups=4).eval()
    block.small.padding_mode, block.small._reversed_padding_repeated_twice = 'circular', [2] * 4
    wanted = block.large_norm(block.large(x)) + block.small_norm(block.small(x))
    torch.testing.assert_close(block(x), wanted)
    with pytest.raises(RuntimeError, match='must pad with zeros.*padding_mode=circular'):
        block.fuse()


def test_dilated_small_kernels():
    """As code makes them that gives a backbone a smaller stride: shortcuts see it, folding cannot."""
    block, x = RepSMPConv2d(4, 4, 9, groups=4).eval(), torch.randn(1, 4, 16, 16)
    nn.init.normal_(block.small.weight)
    block.small.dilation, block.small.padding = (2, 2), (4, 4)
    wanted = block(x)
    dilated = nn.functional.conv2d(x, block.small.weight, padding=4, dilation=2, groups=4)
    torch.testing.assert_close(wanted, block.large_norm(block.large(x)) + block.small_norm(dilated))
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
    with pytest.raises(RuntimeError, match=r'with the dilation of the large one, \(1, 1\)'):
        block.fuse()
    block.large.dilation = (2, 2)
    wanted = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
        torch.testing.assert_close(block.fuse()(x), wanted)
    block.large.dilation = (1, 1)
    block.small.dilation, block.small.padding = (1, 1), (0, 0)
    assert block.small(x).shape[2:] == (12, 12)


@torch.no_grad()
def test_pruned_norms():
    """Their weights are what is stored, and not those of the last call."""
    model = build('smpconv_mobile31').eval()
    keys = [key for key, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for key in keys:
        norm = model.get_submodule(key)
        prune.random_unstructured(norm, 'weight', 0.5)
        norm.weight_orig.data.uniform_(1, 2)  # as of a checkpoint
    state = copy.deepcopy(model.state_dict())
    deployed = model.reparameterize()
    other = build('smpconv_mobile31').eval()
    other.load_state_dict({**other.state_dict(), **{k: v for k, v in state.items() if k in other.state_dict()}})
    for norm, key in zip([m for m in other.modules() if isinstance(m, nn.BatchNorm2d)], keys):
        norm.weight.data = state[f'{key}.weight_orig'] * state[f'{key}.weight_mask']
    x = make_input('smpconv_mobile31', 1)
    assert relative_error(deployed(x), other(x)) <= 1e-5


def test_norms_without_statistics():
    """As adaptation at test time leaves them."""
    model = build('smpconv_mobile31').eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = m.running_var = None
    with pytest.raises(RuntimeError, match='Only batch norms with running statistics'):
        model.reparameterize()


@torch.no_grad()
def test_twice_is_harmless(name, model, x):
    model.reparameterize()
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    again = reparameterize_model(model.reparameterize().reparameterize())
    assert torch.equal(again(x), wanted)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    assert set(again.state_dict()) == set(state)


def test_gradients_flow(name, model, x):
    deployed = model.reparameterize()
    assert all(p.requires_grad and p.is_leaf for p in deployed.parameters())
    x.requires_grad_()
    deployed(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for key, p in deployed.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    optimizer = torch.optim.SGD(deployed.parameters(), lr=1e-3)
    optimizer.step()  # fine-tuning of the deployed form, also in train mode
    assert deployed.train()(x.detach()).isfinite().all()


@torch.no_grad()
def test_deepcopy(name, model, x):
    copied = copy.deepcopy(model)
    wanted = model(x)
    model.reparameterize()
    assert torch.equal(copied(x), wanted)  # not affected
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


@torch.no_grad()
def test_state_dict_and_inference_mode(name, model, x, tmp_path):
    model.reparameterize()
    wanted, state = model(x), model.state_dict()
    other = build(name, inference_mode=True)
    assert_plain(other)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.eval()(x), wanted)

    path = tmp_path / f'{name}.safetensors'
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    loaded = build(name, inference_mode=True, checkpoint_path=str(path))
    assert torch.equal(loaded.eval()(x), wanted)

    torch.save({'state_dict': state}, tmp_path / 'deployed.pth')
    loaded = build(name, inference_mode=True, checkpoint_path=str(tmp_path / 'deployed.pth'))
    assert torch.equal(loaded.eval()(x), wanted)
    with pytest.raises(RuntimeError):  # never half loaded into the training form
        build(name, checkpoint_path=str(path))


@torch.no_grad()
def test_deployed_weights_as_pretrained(name, model, x, tmp_path):
    model.reparameterize()
    path = tmp_path / 'deployed.safetensors'
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), inference_mode=True)
    assert torch.equal(loaded.eval()(x), model(x))


@torch.no_grad()
def test_inference_mode_from_training_weights(name, model, x, tmp_path):
    """Training-form weights given to a model that is built deployed."""
    path = tmp_path / 'train.safetensors'
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), inference_mode=True)
    assert_plain(loaded)
    assert relative_error(loaded.eval()(x), model(x)) <= 1e-5
    # no classifier: features
    overlay = dict(file=str(path))
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=overlay, inference_mode=True, num_classes=0)
    wanted = model.forward_head(model.forward_features(x), pre_logits=True)
    assert relative_error(loaded.eval()(x), wanted) <= 1e-5
    # half precision: kernels are rendered before they are rounded
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=overlay, inference_mode=True, dtype=torch.bfloat16)
    wanted = model.reparameterize().bfloat16().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


def test_weights_of_another_network_are_not_deployed(tmp_path):
    """Whose kernels have the same size once they are rendered."""
    path = tmp_path / 'train.safetensors'
    save_file(build('smpconv_cifar', num_points=8).state_dict(), path)
    for inference_mode in (False, True):
        with pytest.raises(RuntimeError, match='size mismatch for .*coords'):
            overlay = dict(file=str(path))
            build('smpconv_cifar', pretrained=True, pretrained_cfg_overlay=overlay, inference_mode=inference_mode)


@torch.no_grad()
def test_features_of_a_deployed_model(name, model, x):
    wanted = model.forward_intermediates(x, intermediates_only=True)
    model.reparameterize()
    got = model.forward_intermediates(x, intermediates_only=True)
    assert len(got) == len(wanted)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, wanted))
    assert tuple(model.forward_head(model.forward_features(x), pre_logits=True).shape) == (2, model.num_features)


@torch.no_grad()
def test_features_only_deployed(name, x):
    last = len(build(name, device='meta').feature_info) - 1
    model = randomize_norms(build(name, features_only=True, out_indices=(0, last))).eval()
    wanted = model(x)
    deployed = reparameterize_model(model)
    assert_plain(deployed)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(deployed(x), wanted))
    built = build(name, features_only=True, out_indices=(0, last), inference_mode=True).eval()
    built.load_state_dict(deployed.state_dict())
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(built(x), wanted))


@torch.no_grad()
def test_classifier_of_a_deployed_model(name, model, x):
    model.reparameterize()
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert tuple(model(x).shape) == (2, 7)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_inference_mode_in_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = timm.create_model('smpconv_seq_mnist', pretrained=True, inference_mode=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_inference_mode_starts_like_any_model(name):
    """A deployed model that is built is in train mode, and has fewer parameters than the training form."""
    model = build(name, inference_mode=True)
    assert len(list(model.parameters())) < len(list(build(name).parameters()))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['smpconv_mobile31', 'smpconv_cifar', 'smpconv_seq_chartraj', 'smpconv_seq_mnist'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_half_precision(name, dtype, tolerance):
    model = randomize_norms(build(name)).eval()
    x = make_input(name, 1)
    wanted = model(x)
    assert relative_error(copy.deepcopy(model).to(dtype)(x.to(dtype)), wanted) <= tolerance
    deployed = model.reparameterize().to(dtype)
    assert relative_error(deployed(x.to(dtype)), wanted) <= tolerance


@pytest.mark.parametrize(
    'block, shape',
    [
        (lambda: RepSMPConv2d(6, 6, 13, groups=6), (2, 6, 9, 20)),
        (lambda: RepSMPConv2d(6, 6, 3, groups=6, small_kernel_size=5), (2, 6, 9, 20)),  # large is the smaller one
        (lambda: RepSMPConv2d(3, 5, 9, small_kernel_size=3, small_bias=True, radius=0.4), (2, 3, 9, 20)),
        (lambda: RepSMPConv2d(3, 5, 1, small_kernel_size=1), (2, 3, 9, 20)),
        (lambda: RepSMPConv2d(1, 1, 7, small_kernel_size=3, groups=1), (2, 1, 9, 20)),
        (lambda: RepSMPConv2d(3, 5, (3, 9), small_kernel_size=5), (2, 3, 9, 20)),
        (lambda: RepSMPConv2d(6, 6, 13, dilation=3, groups=6), (2, 6, 9, 20)),
        (lambda: RepSMPConv1d(3, 4, 50, large_bias=True, radius=0.1), (2, 3, 64)),
        (lambda: RepSMPConv1d(3, 4, 51, radius=0.1), (2, 3, 20)),
        (lambda: RepSMPConv1d(3, 4, 2, small_kernel_size=5), (2, 3, 20)),
    ],
)
@torch.no_grad()
def test_blocks(block, shape):
    module = spread_points(randomize_norms(block())).double().eval()
    for m in module.modules():
        if getattr(m, 'bias', None) is not None:
            m.bias.copy_(torch.randn(m.bias.shape))
    x = torch.randn(shape, dtype=torch.float64)
    wanted = module(x)
    conv = module.fuse()
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d)) and conv.bias is not None
    assert relative_error(conv(x), wanted) <= 1e-10
    assert module.train().fuse().training


class Adapter(nn.Sequential):
    """What fine-tuning of few parameters puts in the place of a layer."""

    @property
    def weight(self):
        return self[0].weight

    @property
    def bias(self):
        return self[0].bias


@pytest.mark.parametrize(
    'name, part, where',
    [
        ('smpconv_tiny', 'stages.0.blocks.0.mix.small', 'RepSMPConv2d'),
        ('smpconv_tiny', 'stages.0.blocks.0.mix.large', 'RepSMPConv2d'),
        ('smpconv_tiny', 'stem.0.conv', 'ConvNorm'),
        ('smpconv_seq_mnist', 'stages.1.conv2.small', 'RepSMPConv1d'),
        ('pelk_tiny', 'stages.0.blocks.0.mlp.fc2', 'PeLKBlock'),
        ('pelk_tiny', 'stages.0.blocks.0.conv', 'PeLKBlock'),
    ],
)
def test_adapters_are_not_lost(name, part, where):
    """Folding what an adapter wraps would drop what it has learned."""
    model = build(name).eval()
    parent, _, last = part.rpartition('.')
    setattr(model.get_submodule(parent), last, Adapter(model.get_submodule(part)).eval())
    with pytest.raises(RuntimeError, match=f'{where} cannot be reparameterized: .* got Adapter. Merge it'):
        model.reparameterize()


def test_convolutions_with_norm():
    """All arguments of the convolution are kept, and one that does more than convolve is refused."""
    x = torch.randn(2, 4, 11, 11)
    for kwargs in (dict(dilation=2), dict(kernel_size=3, stride=2, groups=2), dict(kernel_size=1), dict(bias=True)):
        module = randomize_norms(ConvNorm(4, 4, **{'kernel_size': 3, **kwargs})).eval()
        with torch.no_grad():
            wanted = module(x)
            module.reparameterize()
            assert relative_error(module(x), wanted) <= 1e-5
            assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    module = randomize_norms(ConvNorm(4, 4, 3)).eval()
    torch.nn.utils.parametrizations.weight_norm(module.conv)  # whose weight is what it computes
    module.eval()
    with torch.no_grad():
        wanted = module(x)
        module.reparameterize()
        assert relative_error(module(x), wanted) <= 1e-5
    with pytest.raises(RuntimeError, match='its convolution is a Conv2dSame'):
        ConvNorm(4, 4, 3, stride=2, padding='same').eval().reparameterize()


def test_deployed_pelk_with_other_convolutions():
    """There is nothing left to fold: the second time is harmless."""
    model = build('pelk_tiny').eval().reparameterize()
    block = model.stages[0].blocks[0]
    block.conv = Adapter(block.conv).eval()
    model.reparameterize()


def test_stages_of_pelk_deploy_their_blocks():
    """A block alone does not know the embedding of its stage."""
    stage, x = build('pelk_tiny').stages[0].eval(), torch.randn(1, 96, 9, 9)
    with pytest.raises(RuntimeError, match='embedding .* is in its PeLKStage'):
        reparameterize_model(stage)
    plain = build('pelk_tiny', pos_embed=False).stages[0].eval()
    deployed = reparameterize_model(plain)
    assert_plain(deployed)
    with torch.no_grad():
        assert relative_error(deployed(x), plain(x)) <= 1e-5


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_base', 'smpconv_mobile51'])
@torch.no_grad()
def test_full_size(name):
    """The depth that the other tests cut."""
    model = randomize_norms(timm.create_model(name)).eval()
    x = make_input(name, 1)
    wanted = model(x)
    assert relative_error(model.reparameterize()(x), wanted) <= 1e-5


@torch.no_grad()
def test_random_numbers(name):
    """Neither an evaluation, which folds blocks, nor deployment draws random numbers: training goes on as without."""
    model = build(name)
    state = torch.random.get_rng_state()
    model.eval()(torch.zeros(1, *input_size(name)))
    model.reparameterize()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_models_made_smaller_exist():
    assert set(SMALLER) <= set(ALL_MODELS)


def test_fused_block_is_what_torch_computes():
    """The deployed convolution is an nn.Conv2d whose attributes say what it does: torch's own op agrees."""
    conv = RepSMPConv2d(4, 4, 11, groups=4).eval().fuse()
    x = torch.randn(1, 4, 16, 16)
    plain = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert relative_error(conv(x), plain) <= 1e-5
    assert SMPConv2d(4, 4, 11, groups=4).depthwise


@pytest.mark.parametrize('again', [False, True], ids=['frozen', 'unfrozen'])
def test_frozen_norms(name, model, x, again):
    expected = model(x).detach()
    freeze(model)
    if again:
        unfreeze(model)
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-4
        model.reparameterize()
        assert relative_error(model(x), expected) < 1e-4
    build(name, inference_mode=True).load_state_dict(model.state_dict())


def pruned_twice(module):
    """A layer whose weight a hook computes, and that has another one since it was last called."""
    prune.l1_unstructured(module, 'weight', 0.3)
    module.weight_orig.data.mul_(-2.0)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.nn.utils.weight_norm(module)
    module.weight_g.data.mul_(3.0)


@pytest.mark.parametrize('change', [pruned_twice, old_weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize(
    'name, part',
    [
        ('smpconv_mobile31', 'stages.0.blocks.0.mix.small'),
        ('smpconv_mobile31', 'stages.0.blocks.1.pw1.conv'),
        ('smpconv_seq_mnist', 'stages.0.conv1.small'),
        ('pelk_tiny', 'stages.0.blocks.0.mlp.fc2'),
    ],
)
def test_computed_weights(name, part, change):
    """Pruned or normalised layers deploy with the weight of the next call, and keep what is folded into it."""
    kwargs = dict(depths=(1, 1), dims=(8, 8), kernel_sizes=(5, 5)) if 'seq' not in name else dict(depth=1, dim=4)
    if 'pelk' in name:
        kwargs['ls_init_value'] = 0.5

    def make():
        torch.manual_seed(0)
        model = randomize_norms(timm.create_model(name, **kwargs))
        change(model.get_submodule(part))
        return model.eval()

    x = torch.randn(2, *timm.get_pretrained_cfg(name).input_size)
    with torch.no_grad():
        assert relative_error(make().reparameterize()(x), make()(x)) <= 1e-5


class DoublingLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    'change',
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda conv: prune.random_unstructured(conv, 'weight', 0.5),
    ],
)
def test_norms_before_computed_weights(change):
    """What is computed anew in each call cannot take them: they stay."""
    block = randomize_norms(ConvFFN(8, 16)).eval()
    block.pw1.reparameterize()
    change(block.pw1.conv)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        wanted = block(x)
        block.reparameterize()
        assert relative_error(block(x), wanted) <= 1e-5
    with pytest.raises(RuntimeError, match='a weight and bias of its own'):
        fold_norm_into_next(nn.BatchNorm2d(8), block.pw1.conv)


def test_converted_convolutions_stay_fast():
    module = randomize_norms(ConvNorm(4, 4, 9)).eval()
    convert_large_convs(module)
    x = torch.randn(2, 4, 11, 11)
    with torch.no_grad():
        wanted = module(x)
        module.reparameterize()
        assert type(module.conv) is LargeConv2d and relative_error(module(x), wanted) <= 1e-5


def test_last_layers_that_do_more_than_multiply():
    model = build('pelk_tiny').eval()
    mlp = model.stages[0].blocks[0].mlp
    mlp.fc2 = DoublingLinear(mlp.fc2.in_features, mlp.fc2.out_features)
    with pytest.raises(RuntimeError, match='last layer is a DoublingLinear'):
        model.reparameterize()


def test_parts_in_train_mode():
    """A classifier that is new, and dropout that goes on in inference, are no part of what is folded."""
    model = build('smpconv_mobile31', drop_rate=0.5).eval()
    model.head.fc = nn.Linear(model.num_features, 3)
    model.head.drop.train()
    assert_plain(model.reparameterize())


def test_norms_that_stay():
    """A block whose first convolution has another norm behind it keeps its own as a convolution."""
    model = randomize_norms(build('smpconv_mobile31')).eval()
    model.stages[0].blocks[1].pw1.bn = nn.GroupNorm(1, model.stages[0].blocks[1].hidden_dim)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        assert relative_error(model.reparameterize()(x), wanted) <= 1e-5


def test_deployed_in_inference_mode():
    model = build('smpconv_mobile31').eval()
    with torch.inference_mode():
        model.reparameterize()
    assert not any(p.is_inference() for p in model.parameters())
    model(torch.randn(1, 3, 64, 64)).sum().backward()
