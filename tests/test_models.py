"""What timm users do with a model, for every registered one."""

import copy
import re
import sysconfig
import warnings
from pathlib import Path

import pytest
import timm
import torch
from conftest import ALL_MODELS, SMALLER, build, input_size, make_input, measure_norms
from synth import randomize_norms, relative_error
from timm.layers import DropPath
from timm.models import group_parameters
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from timm_smpconv.layers import PeripheralKernel, SMPKernel
from timm_smpconv.models import SMPConvSeq
from timm_smpconv.models.smpconv import Stem

SEQUENCES = [name for name in ALL_MODELS if '_seq_' in name]
IMAGES = [name for name in ALL_MODELS if name not in SEQUENCES]
IMAGENET = [name for name in IMAGES if timm.get_pretrained_cfg(name).num_classes == 1000]
PAPERS = {'pelk': ('2403.07589', 'PeLK'), 'smpconv': ('2304.02330', 'SMPConv')}
# classes, input size and default tag of each model
TABLE = {
    'pelk_tiny': (1000, (3, 224, 224), 'in1k'),
    'pelk_small': (1000, (3, 224, 224), 'in1k'),
    'pelk_base': (1000, (3, 224, 224), 'in1k'),
    'pelk_base_101': (1000, (3, 384, 384), 'in1k'),
    'smpconv_tiny': (1000, (3, 224, 224), 'in1k'),
    'smpconv_base': (1000, (3, 224, 224), 'in1k'),
    'smpconv_mobile31': (1000, (3, 224, 224), 'in1k'),
    'smpconv_mobile51': (1000, (3, 224, 224), 'in1k'),
    'smpconv_cifar': (10, (3, 32, 32), 'c10'),
    'smpconv_seq_mnist': (10, (1, 28, 28), 'smnist'),
    'smpconv_seq_pmnist': (10, (1, 28, 28), 'pmnist'),
    'smpconv_seq_cifar': (10, (3, 32, 32), 'scifar10'),
    'smpconv_seq_chartraj': (20, (3, 1, 182), 'ct'),
    'smpconv_seq_speech': (10, (20, 1, 161), 'sc'),
    'smpconv_seq_speech_raw': (10, (1, 1, 16000), 'sc_raw'),
}
# small versions for what takes long: compile, export, script
SMALL = {
    'pelk_tiny': dict(depths=(1, 1), dims=(8, 16), kernel_sizes=(13, 7), num_classes=5, ls_init_value=0.5),
    'smpconv_mobile31': dict(depths=(1, 1), dims=(8, 16), kernel_sizes=(9, 7), num_classes=5),
    'smpconv_cifar': dict(dims=(6, 6, 8), kernel_size=9, num_points=4),
    'smpconv_seq_mnist': dict(depth=2, dim=6, kernel_size=100, num_points=5, radius=0.05),
    'smpconv_seq_pmnist': dict(depth=2, dim=6, num_points=5, radius=0.05),
}


def small_model(name, inference_mode=False, **kwargs):
    """One whose blocks count: with initial norms, what they add is smaller than the tolerances of the tests."""
    kwargs = {**SMALL[name], **kwargs}
    model = measure_norms(randomize_norms(timm.create_model(name, **kwargs)).eval(), small_input(name))
    if inference_mode:
        weights = model.reparameterize().state_dict()
        model = timm.create_model(name, inference_mode=True, **kwargs).eval()
        model.load_state_dict(weights)
    return model


def small_input(name, batch=2):
    return torch.randn(batch, 3, 32, 48) if name in IMAGENET else make_input(name, batch)


def head_norm(model):
    """The norm behind the pooling, which some families have."""
    return getattr(model.head, 'norm', nn.Identity())


# --- registry and configuration -----------------------------------------------------------------------------------


def test_registered():
    assert set(TABLE) <= set(ALL_MODELS)
    for name, (num_classes, size, tag) in TABLE.items():
        assert timm.is_model(name)
        assert f'{name}.{tag}' in timm.list_models(f'{name}*', pretrained=False, include_tags=True)
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.num_classes, tuple(cfg.input_size), cfg.tag) == (num_classes, size, tag)
        assert timm.create_model(f'{name}.{tag}', device='meta').num_classes == num_classes


def test_modules_of_the_registry(name):
    assert timm.is_model(name) and timm.model_entrypoint(name).__doc__
    assert timm.model_entrypoint(name).__module__.startswith('timm_smpconv.models')


def test_pretrained_cfg(name):
    model = timm.create_model(name, device='meta')
    cfg = model.pretrained_cfg
    chans = cfg['input_size'][0]
    assert len(cfg['input_size']) == 3 and model.in_chans == chans
    assert len(cfg['mean']) == len(cfg['std']) == chans and all(value > 0 for value in cfg['std'])
    assert cfg['num_classes'] == model.num_classes
    assert cfg['interpolation'] in ('bilinear', 'bicubic', 'random')
    assert 0 < cfg['crop_pct'] <= 1
    paper, title = PAPERS[name.partition('_')[0]]
    assert cfg['license'] == 'mit' and paper in str(cfg['paper_ids'])
    assert cfg['paper_name'].startswith(title) and cfg['origin_url'].startswith('https://')
    assert cfg['description']
    classifier = model.get_submodule(cfg['classifier'])
    assert isinstance(classifier, nn.Linear) and classifier is model.get_classifier()
    assert classifier.out_features == cfg['num_classes']
    first = model.get_submodule(cfg['first_conv'])
    assert first.in_channels == chans
    data = timm.data.resolve_model_data_config(model)
    assert data['input_size'] == tuple(cfg['input_size']) and data['mean'] == tuple(cfg['mean'])


# --- forward passes -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward(name, model, x):
    y = model(x)
    assert tuple(y.shape) == (2, model.num_classes) and y.isfinite().all()
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    assert torch.equal(model.forward_head(features), y)
    pooled = model.forward_head(features, pre_logits=True)
    assert tuple(pooled.shape) == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), y)


@torch.no_grad()
def test_batch_does_not_matter(name, model, x):
    assert relative_error(model(x[:1]), model(x)[:1]) < 1e-4
    assert tuple(model(x[:0]).shape) == (0, model.num_classes)


@pytest.mark.parametrize('num_classes', [0, 1, 13])
@torch.no_grad()
def test_num_classes(name, num_classes, x):
    model = build(name, num_classes=num_classes).eval()
    assert model.num_classes == num_classes
    assert tuple(model(x).shape) == (2, num_classes or model.num_features)


@pytest.mark.parametrize('in_chans', [1, 2, 5])
@torch.no_grad()
def test_in_chans(name, in_chans):
    model = build(name, in_chans=in_chans).eval()
    x = torch.randn(1, in_chans, *input_size(name)[1:])
    assert tuple(model(x).shape) == (1, model.num_classes)
    assert model.get_submodule(model.pretrained_cfg['first_conv']).in_channels == in_chans


@torch.no_grad()
def test_reset_classifier(name, model, x):
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.get_classifier().out_features == 7
    assert tuple(model(x).shape) == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), head_norm(model)(model.forward_features(x)))
    model.reset_classifier(3, 'avg')
    assert tuple(model(x).shape) == (2, 3)
    with pytest.raises(ValueError, match='got -1'):
        model.reset_classifier(-1)
    model = model.double()
    model.reset_classifier(4)
    assert model(x.double()).dtype == torch.float64


@torch.no_grad()
def test_global_pool(name, model, x):
    features = model.forward_features(x)
    average = build(name, global_pool='avg').eval()
    average.load_state_dict(model.state_dict())
    mean = head_norm(average)(features.flatten(2).mean(2)[..., None, None]).flatten(1)
    assert relative_error(average.forward_head(features, pre_logits=True), mean) < 1e-5
    none = build(name, global_pool='', num_classes=0).eval()
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('head.fc.')})
    assert torch.equal(none(x), head_norm(none)(features))
    with pytest.raises((ValueError, AssertionError)):
        build(name, global_pool='nonsense')(x)


# --- feature maps -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_only(name, x):
    model = build(name, features_only=True).eval()
    maps = model(x)
    info = build(name, device='meta').feature_info
    assert len(maps) == len(info)
    assert model.feature_info.channels() == [i['num_chs'] for i in info]
    assert model.feature_info.reduction() == [i['reduction'] for i in info]
    for y, i in zip(maps, info):
        assert tuple(y.shape) == (2, i['num_chs'], *[-(-s // i['reduction']) for s in x.shape[2:]])
    if name in IMAGENET:
        assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize('name', IMAGENET)
@torch.no_grad()
def test_output_stride(name):
    """The same weights make larger maps, in which every second, fourth or eighth row and column is what it was."""
    model = randomize_norms(build(name, num_classes=0)).double().eval()
    # pelk drops the last row of a map of odd sides when it halves the resolution
    x = torch.randn(1, 3, *((64, 32) if name.startswith('pelk') else (75, 44)), dtype=torch.float64)
    wanted = model.forward_intermediates(x, intermediates_only=True)
    for stride in (32, 16, 8):
        other = build(name, num_classes=0, output_stride=stride).double().eval()
        other.load_state_dict(model.state_dict())
        assert [info['reduction'] for info in other.feature_info] == [min(r, stride) for r in (4, 8, 16, 32)]
        deployed = copy.deepcopy(other).reparameterize()
        again = build(name, num_classes=0, output_stride=stride, inference_mode=True).double().eval()
        again.load_state_dict(deployed.state_dict())
        maps = [m.forward_intermediates(x, intermediates_only=True) for m in (other, deployed, again)]
        for i, whole in enumerate(wanted):
            step = 4 * 2**i // min(4 * 2**i, stride)
            for each in maps:
                assert each[i][:, :, ::step, ::step].shape == whole.shape
                assert relative_error(each[i][:, :, ::step, ::step], whole) < 1e-10


@pytest.mark.parametrize('name', [name for name in SMALL if name in IMAGENET])
def test_output_stride_elsewhere(name):
    """Feature maps, training, scripts, exports."""
    backbone = timm.create_model(name, **SMALL[name], features_only=True, output_stride=4)
    assert backbone.feature_info.reduction() == [4, 4]
    x = torch.randn(2, 3, 32, 24)
    maps = backbone(x)
    assert [tuple(y.shape[2:]) for y in maps] == [(8, 6), (8, 6)]
    maps[-1].square().mean().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    model = small_model(name, output_stride=4)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), wanted, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), wanted, rtol=1e-3, atol=1e-4)
    for wrong in (2, 12, 64):
        with pytest.raises(ValueError, match=f'output_stride must be 4, 8, 16 or 32.*got {wrong}'):
            timm.create_model(name, output_stride=wrong)


@torch.no_grad()
def test_feature_networks_keep_the_stem_whole():
    """Taken apart, its convolutions would see contiguous maps, which are slow, and whole batches."""
    model = timm.create_model('smpconv_mobile31', features_only=True).eval()
    assert isinstance(model.stem, Stem)
    maps = []
    model.stem.register_forward_hook(lambda m, i, o: maps.append(o))
    model(torch.randn(2, 3, 32, 32))
    assert len(maps) == 1 and not maps[0].is_contiguous()
    assert maps[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('out_indices', [(0,), (-1,), (1, 3), (0, -2)])
@torch.no_grad()
def test_out_indices(name, out_indices, x):
    model = build(name, features_only=True, out_indices=out_indices).eval()
    info = build(name, device='meta').feature_info
    maps = model(x)
    assert [y.shape[1] for y in maps] == [info[i]['num_chs'] for i in out_indices] == model.feature_info.channels()


@torch.no_grad()
def test_intermediates(name, model, x):
    final, maps = model.forward_intermediates(x)
    features = model.forward_features(x)
    assert torch.equal(final, features) and len(maps) == len(model.feature_info)
    # the same maps from hooks on the modules that feature_info names
    seen = {}
    hooks = [
        model.get_submodule(i['module']).register_forward_hook(lambda m, a, y, k=i['module']: seen.update({k: y}))
        for i in model.feature_info
    ]
    model(x)
    for y, i in zip(maps, model.feature_info):
        assert torch.equal(y, seen[i['module']])
    for hook in hooks:
        hook.remove()
    only = build(name, features_only=True).eval()
    weights = model.state_dict()
    only.load_state_dict({key: weights[re.sub(r'^(stem|stages)_', r'\1.', key)] for key in only.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(only(x), maps))

    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], features) and torch.equal(normed[0], maps[0])
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    final, _ = model.forward_intermediates(x, indices=[0])  # does not stop early
    assert torch.equal(final, features)
    with pytest.raises((ValueError, AssertionError), match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')
    with pytest.raises(Exception):  # noqa: B017  (timm's own check)
        model.forward_intermediates(x, indices=[99])


@torch.no_grad()
def test_prune_intermediate_layers(name, model, x):
    maps = model.forward_intermediates(x, intermediates_only=True)
    before = sum(p.numel() for p in model.parameters())
    assert list(model.prune_intermediate_layers([0, 1])) == [0, 1]
    assert sum(p.numel() for p in model.parameters()) < before
    pruned = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, maps))


@torch.no_grad()
def test_pruned_networks_still_run(name, model, x):
    (first,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    model.prune_intermediate_layers([0])
    features, maps = model.forward_intermediates(x, indices=[0])
    assert torch.equal(maps[0], first) and torch.equal(features, first) and torch.equal(model(x), first)
    assert model.num_features == model.head_hidden_size == first.shape[1]
    model.reset_classifier(5, 'last' if model.sequence else 'avg')
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_cifar'])
@torch.no_grad()
def test_poolings_that_make_more_channels(name):
    model, x = build(name, global_pool='catavgmax').eval(), make_input(name)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape[1] == model.head_hidden_size
    assert model.head_hidden_size == 2 * model.num_features and model(x).shape[1] == model.num_classes
    model.reset_classifier(3, 'avg')
    assert model.head_hidden_size == model.num_features and model(x).shape[1] == 3


@pytest.mark.parametrize('size', [14, (14, 14)])
def test_permuted_images_of_another_size(size):
    model = timm.create_model('smpconv_seq_pmnist', img_size=size, depth=1)
    assert len(model.stem.permute.permutation) == 196
    if hasattr(timm.models, 'get_model_traits'):  # which timm's scripts compare with --img-size
        assert timm.models.get_model_traits(model)['img_size'] == (14, 14)


@torch.no_grad()
def test_prune_norm_and_head(name, model, x):
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
    assert torch.equal(model(x), last)


# --- training -----------------------------------------------------------------------------------------------------


def gradients(model, x):
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return y, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_grad_checkpointing(name, model, x):
    model.train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    y, grads = gradients(model, x)
    y_twin, grads_twin = gradients(twin, x)
    assert relative_error(y_twin, y) < 1e-5
    assert set(grads) == set(grads_twin) == {key for key, _ in model.named_parameters()}
    largest = max(grad.abs().max() for grad in grads.values())
    for key, grad in grads.items():
        assert (grads_twin[key] - grad).abs().max() <= 1e-5 * largest, key
    twin.set_grad_checkpointing(False)
    assert not any(getattr(module, 'grad_checkpointing', False) for module in twin.modules())


def test_grad_checkpointing_recomputes(name, model, x):
    """Not just a flag: the kernels are rendered again in the backward pass."""
    calls = []
    for module in model.modules():
        if type(module).__name__ in ('PeripheralConv2d', 'SMPConv1d', 'SMPConv2d'):
            module.register_forward_hook(lambda *args: calls.append(1))
    model.train()
    model.set_grad_checkpointing()
    y = model(x).sum()
    forward = len(calls)
    y.backward()
    assert len(calls) >= 2 * forward - 1  # the stem is not recomputed


@pytest.mark.parametrize('feature_cls', ['list', 'getter', 'hook'])
def test_weight_decay_of_feature_maps(name, feature_cls):
    """What holds for the classifier holds for its feature maps."""
    model = copy.deepcopy(build(name, features_only=True, feature_cls=feature_cls))
    plain = build(name, device='meta')
    decayed = {id(p) for group in create_optimizer_v2(model, 'adamw', weight_decay=0.1).param_groups
               if group['weight_decay'] for p in group['params']}  # fmt: skip
    exempt = [p for key, p in model.named_parameters() if key.endswith(('coords', 'radius_offset', 'pos_embed'))]
    assert exempt and not any(id(p) in decayed for p in exempt)
    assert len(exempt) <= len(plain.no_weight_decay()) and len(decayed) > 3
    assert timm.utils.reparameterize_model(model.eval()).no_weight_decay is not None


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_cifar', 'smpconv_seq_cifar', 'pelk_tiny'])
def test_construction_on_meta(name):
    """As sharded training begins: memory, then every module draws its own parameters anew."""
    model = build(name, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert not [key for key, value in model.state_dict().items() if not value.isfinite().all()]


def test_no_weight_decay(name):
    model = build(name, device='meta')
    names = dict(model.named_parameters())
    exempt = model.no_weight_decay()
    assert exempt and exempt <= set(names)
    kernels = [key for key, m in model.named_modules() if isinstance(m, SMPKernel)]
    own = {f'{k}.{p}' for k in kernels for p, _ in model.get_submodule(k).named_parameters()}
    embeddings = {key for key in names if key.endswith('.pos_embed')}
    assert exempt == {key for key in own if not key.endswith('.weights')} | embeddings


def test_weight_decay_of_the_optimizer(name):
    """Points, biases and norm parameters are not decayed, all other weights are."""
    model = build(name)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    names = {id(p): key for key, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(names)
    wanted = set()
    for module_name, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            if isinstance(module, SMPKernel):
                decay = key == 'weights'
            elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                decay = False
            else:
                decay = key not in ('bias', 'gamma', 'pos_embed')
            if decay:
                wanted.add(f'{module_name}.{key}')
    assert decayed == wanted


@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher(name, coarse):
    model = build(name, device='meta')
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    found = sorted(key for keys in groups.values() for key in keys)
    assert found == sorted(key for key, _ in model.named_parameters())
    of = {key: i for i, keys in groups.items() for key in keys}
    # ordered by depth: groups do not decrease from one stage to the next, the head is last
    stages = [[of[key] for key in of if key.startswith(f'stages.{i}.')] for i in range(len(model.stages))]
    for before, after in zip(stages, stages[1:]):
        assert max(before) < min(after) if coarse or name not in IMAGENET else max(before) <= min(after)
    assert of['head.fc.weight'] == of['head.fc.bias'] == max(groups) > max(stages[-1])
    stem = [of[key] for key in of if key.startswith('stem.')]
    assert not stem or (set(stem) == {0} and min(stages[0]) > 0)
    if not coarse and hasattr(model.stages[0], 'blocks'):  # a stage has no depth of its own
        assert len(groups) == 2 + sum(len(stage.blocks) for stage in model.stages)


def test_layer_decay(name, x):
    model = build(name)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    scales = [g['lr_scale'] for g in optimizer.param_groups]
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert max(scales) == 1.0 and min(scales) < 0.8
    of = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    assert of[id(model.head.fc.weight)] == 1.0
    assert of[id(next(model.parameters()))] == min(scales)
    assert param_groups_layer_decay(model, layer_decay=0.5)
    model(x).sum().backward()
    optimizer.step()


def test_drop_path_rates(name):
    """Linear from 0 over the blocks; in the ImageNet networks of SMPConv over pairs, both blocks of a pair alike."""
    rate = 0.3
    model = build(name, drop_path_rate=rate, device='meta')
    if name in IMAGENET:
        found = []
        for stage in model.stages:
            blocks = [getattr(block.drop_path, 'drop_prob', 0.0) for block in stage.blocks]
            if name.startswith('smpconv'):
                assert blocks[::2] == blocks[1::2]
                blocks = blocks[::2]
            found += blocks
    else:
        found = [getattr(block.drop_path, 'drop_prob', 0.0) for block in model.stages]
    wanted = [rate * i / (len(found) - 1) for i in range(len(found))]
    assert found == pytest.approx(wanted)
    assert not any(isinstance(m, DropPath) and m.drop_prob for m in build(name, device='meta').modules())


@torch.no_grad()
def test_drop_path_is_random_in_training_alone(name, x):
    model = build(name, drop_path_rate=0.9)
    plain = build(name)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    big = x.repeat(4, *[1] * (x.ndim - 1))
    model.train()
    outputs = [model.forward_features(big) for _ in range(3)]
    assert any(not torch.equal(outputs[0], y) for y in outputs[1:])


@torch.no_grad()
def test_drop_rate(name, x):
    model = build(name, drop_rate=0.5)
    plain = build(name)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    plain.train()
    assert relative_error(plain(x), plain(x)) < 1e-6


@pytest.mark.parametrize('name', SEQUENCES)
@torch.no_grad()
def test_input_drop_rate(name, x):
    model = build(name, input_drop_rate=0.5)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


# --- construction -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_device_and_dtype(name, x):
    model = build(name, device='cpu', dtype=torch.bfloat16).eval()
    points = {n for n, _ in model.named_parameters() if n.endswith(('.coords', '.radius_offset'))}
    assert {p.dtype for n, p in model.named_parameters() if n not in points} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if n in points} <= {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert next(model.parameters()).dtype == torch.bfloat16  # which many take for that of the network
    model.reset_classifier(3)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and y.shape[1] == 3
    model = build(name, dtype=torch.float64).eval()
    assert {b.dtype for b in model.buffers()} <= {torch.float64, torch.long}
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize('inference_mode', [False, True])
@torch.no_grad()
def test_meta_device(name, inference_mode, x):
    source = build(name, inference_mode=inference_mode).eval()
    model = build(name, device='meta', inference_mode=inference_mode).eval()
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert tuple(model(x.to('meta')).shape) == (2, model.num_classes)
    model = model.to_empty(device='cpu')
    model.load_state_dict(source.state_dict())
    reinit_non_persistent_buffers(model)
    assert torch.equal(model(x), source(x))


@torch.no_grad()
def test_meta_then_reinit_without_weights():
    """What no checkpoint of the authors holds comes back after construction on the meta device."""
    model = timm.create_model('smpconv_seq_pmnist', device='meta').to_empty(device='cpu')
    reinit_non_persistent_buffers(model)
    wanted = timm.create_model('smpconv_seq_pmnist').stem.permute.permutation
    assert torch.equal(model.stem.permute.permutation, wanted)


@torch.no_grad()
def test_deepcopy(name, model, x):
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    for p in twin.parameters():
        p.zero_()
    assert model(x).abs().sum() > 0


def test_construction_is_quiet_and_seeded(name, capfd):
    torch.manual_seed(3)
    first = build(name)
    torch.manual_seed(3)
    second = build(name)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_cifar', 'smpconv_seq_chartraj'])
def test_frozen_points(name):
    """Table 6: fixed coordinates and radii."""
    model = build(name, learn_coords=False, learn_radius=False)
    frozen = {key.rsplit('.', 1)[-1] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'coords', 'radius_offset'}
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, layer_decay=0.8, weight_decay=0.05)
    assert all(p.requires_grad for g in optimizer.param_groups for p in g['params'])


@torch.no_grad()
def test_layout_arguments_imagenet():
    model = timm.create_model(
        'smpconv_tiny', depths=(1, 2, 1), dims=(8, 12, 16), kernel_sizes=(11, 9, 5), num_points=(7, 6, 5), num_classes=3
    ).eval()
    kernels = [m for m in model.modules() if isinstance(m, SMPKernel)]
    assert [k.num_points for k in kernels] == [7, 6, 6, 5]
    assert [tuple(k.kernel_size) for k in kernels] == [(11, 11), (9, 9), (9, 9), (5, 5)]
    assert [k.out_chs for k in kernels] == [8, 12, 12, 16]
    assert tuple(model(torch.randn(1, 3, 48, 40)).shape) == (1, 3)
    assert [i['reduction'] for i in model.feature_info] == [4, 8, 16] and model.num_features == 16
    default_points = timm.create_model('smpconv_mobile51', device='meta')
    kernels = [m for m in default_points.modules() if isinstance(m, SMPKernel)]
    assert [k.num_points for k in kernels[::2]] == [51 * 51 // 8, 49 * 49 // 8, 47 * 47 // 8, 13 * 13 // 8]
    features = timm.create_model(
        'smpconv_tiny', depths=(1, 1, 1), dims=(8, 8, 8), kernel_sizes=(5, 5, 5), features_only=True
    )
    assert features.feature_info.reduction() == [4, 8, 16]


@torch.no_grad()
def test_layout_arguments_others():
    model = timm.create_model('smpconv_cifar', dims=(4, 6, 6, 8), kernel_size=11, num_points=3, radius=0.3).eval()
    assert len(model.stages) == 3 and model.num_features == 8
    assert {(k.num_points, tuple(k.kernel_size)) for k in model.modules() if isinstance(k, SMPKernel)} == {
        (3, (11, 11))
    }
    assert (
        len(
            timm.create_model('smpconv_cifar', dims=(4, 6, 6), kernel_size=5, features_only=True)(
                torch.randn(1, 3, 8, 8)
            )
        )
        == 2
    )
    model = timm.create_model('smpconv_seq_cifar', depth=3, dim=5, kernel_size=40, num_points=4, radius=0.1).eval()
    assert len(model.stages) == 3 and tuple(model(torch.randn(2, 3, 64)).shape) == (2, 10)


@pytest.mark.parametrize(
    'name, wanted',
    [
        ('smpconv_seq_mnist', 0.002),
        ('smpconv_seq_pmnist', 0.002),
        ('smpconv_seq_cifar', 0.002),
        ('smpconv_seq_chartraj', 0.012),
        ('smpconv_seq_speech', 0.012),
        ('smpconv_seq_speech_raw', 0.0002),
        ('smpconv_cifar', 0.12),
    ],
)
def test_initial_radii(name, wanted):
    kernels = [m for m in timm.create_model(name).modules() if isinstance(m, SMPKernel)]
    assert all(torch.allclose(k.radius, torch.tensor(wanted)) for k in kernels)


@pytest.mark.parametrize('name', IMAGENET)
def test_initial_values_imagenet(name):
    model = timm.create_model(name, **({'depths': (1, 1, 1, 1)}))
    for m in model.modules():
        if isinstance(m, SMPKernel):
            assert torch.allclose(m.radius, torch.tensor(4 / m.kernel_size[0]))
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            if m.weight.numel() > 1000:
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert m.bias is None or (m.bias == 0).all()


# --- inputs that cannot work --------------------------------------------------------------------------------------


def test_wrong_channels(name, model):
    chans, size = model.in_chans, input_size(name)
    for bad in ((2, size[1]), (chans, *size[1:], 1, 1)):
        with pytest.raises(ValueError) as e:
            model(torch.zeros(bad))
        assert str(tuple(bad)) in str(e.value)
    for forward in (model, model.forward_intermediates):
        with pytest.raises((RuntimeError, ValueError), match=rf'\b{chans}\b.*channels.*\b{chans + 1}\b'):
            forward(torch.zeros(2, chans + 1, *size[1:]))


@torch.no_grad()
def test_another_first_layer():
    """The usual way to more channels."""
    model = build('pelk_tiny').eval()
    model.stem[0] = torch.nn.Conv2d(6, model.stem[0].out_channels, 4, 4)
    assert model(torch.randn(1, 6, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    'name, kwargs, words',
    [
        ('smpconv_tiny', dict(kernel_sizes=(30, 29, 27, 13)), ('odd', '30')),
        ('smpconv_tiny', dict(kernel_sizes=(31, 29, 27)), ('(31, 29, 27)',)),
        ('smpconv_tiny', dict(depths=(2, 2)), ('(2, 2)', 'dims')),
        ('smpconv_tiny', dict(num_points=0), ('num_points', '0')),
        ('smpconv_tiny', dict(num_points=(1, 2)), ('num_points', '(1, 2)', '4')),
        ('smpconv_tiny', dict(radius=-1.0), ('radius', '-1.0')),
        ('smpconv_tiny', dict(coord_std=0.0), ('coord_std', '0.0')),
        ('smpconv_tiny', dict(points_divisor=0), ('points_divisor', '0')),
        ('smpconv_tiny', dict(small_kernel_size=4), ('odd', '4')),
        ('smpconv_tiny', dict(in_chans=0), ('in_chans', '0')),
        ('smpconv_tiny', dict(num_classes=-1), ('num_classes', '-1')),
        ('smpconv_cifar', dict(kernel_size=32), ('odd', '32')),
        ('smpconv_cifar', dict(dims=(4,)), ('dims', '(4,)')),
        ('smpconv_cifar', dict(num_points=-2), ('num_points', '-2')),
        ('smpconv_cifar', dict(radius=0.0), ('radius', '0.0')),
        ('smpconv_seq_mnist', dict(kernel_size=0), ('kernel_size', '0')),
        ('smpconv_seq_mnist', dict(depth=0), ('depth', '0')),
        ('smpconv_seq_mnist', dict(radius=2.0), ('radius', '2.0')),
        ('smpconv_seq_mnist', dict(num_points=0), ('num_points', '0')),
        ('smpconv_seq_mnist', dict(global_pool='max'), ('last', 'avg', 'max')),
        ('smpconv_seq_mnist', dict(global_pool=''), ('global_pool', 'num_classes')),
        ('smpconv_seq_mnist', dict(permutation=[0, 0, 1]), ('permutation', '2')),
    ],
)
def test_arguments_that_cannot_work(name, kwargs, words):
    with pytest.raises(ValueError) as e:
        timm.create_model(name, **kwargs)
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('pool', ['', None])
def test_classes_need_pooling(pool):
    with pytest.raises(ValueError, match='nothing to classify'):
        SMPConvSeq(global_pool=pool, kernel_size=9, depth=1)


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_cifar', 'smpconv_seq_mnist'])
def test_unknown_arguments_are_errors(name):
    with pytest.raises(TypeError):
        timm.create_model(name, no_such_argument=1)


# --- sequences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SEQUENCES)
@torch.no_grad()
def test_images_are_read_row_by_row(name, model, x):
    flat = torch.stack([torch.cat(list(row.unbind(1)), 1) for row in x])  # rows one behind the other
    assert flat.shape == x.flatten(2).shape
    assert torch.equal(model(flat), model(x))
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *x.shape[2:])
    assert torch.equal(features.flatten(2), model.forward_features(flat))
    for a, b in zip(*(model.forward_intermediates(i, intermediates_only=True) for i in (x, flat))):
        assert a.ndim == 4 and b.ndim == 3 and torch.equal(a.flatten(2), b)


@pytest.mark.parametrize('name', SEQUENCES)
@pytest.mark.parametrize('length', [1, 7, 150, 1500])
@torch.no_grad()
def test_other_lengths(name, length, model):
    x = torch.randn(2, model.in_chans, length)
    if 'pmnist' in name:
        with pytest.raises(ValueError) as e:
            model(x)
        assert '784' in str(e.value) and str(tuple(x.shape)) in str(e.value)
        with pytest.raises(ValueError, match='784'):
            model(torch.randn(2, 1, 28, 27))
        return
    assert tuple(model(x).shape) == (2, model.num_classes)
    assert tuple(model.forward_features(x).shape) == (2, model.num_features, length)


@pytest.mark.parametrize('name', [name for name in SEQUENCES if 'pmnist' not in name])
@torch.no_grad()
def test_causality(name, model):
    """What comes later changes nothing before it, and changes what is behind it."""
    length, cut = 200, 120
    x = torch.randn(1, model.in_chans, length)
    changed = x.clone()
    changed[..., cut:] += 1.0
    for deployed in (False, True):
        if deployed:
            model.reparameterize()
        a, b = model.forward_features(x), model.forward_features(changed)
        scale = a.abs().max()
        assert (a[..., :cut] - b[..., :cut]).abs().max() <= 1e-5 * scale
        assert (a[..., cut] - b[..., cut]).abs().max() > 1e-3 * scale
        short = model.forward_features(x[..., :cut])  # the future may as well be missing
        assert (a[..., :cut] - short).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize('name', SEQUENCES)
@torch.no_grad()
def test_pooling_of_sequences(name, model, x):
    features = model.forward_features(x)
    last = model.forward_head(features, pre_logits=True)
    assert model.head.pool_type == 'last' and torch.equal(last, features[:, :, -1, -1])
    model.reset_classifier(model.num_classes, 'avg')
    average = model.forward_head(features, pre_logits=True)
    assert relative_error(average, features.mean((2, 3))) < 1e-5
    with pytest.raises(ValueError, match='max'):
        model.reset_classifier(3, 'max')
    with pytest.raises(ValueError, match='num_classes'):
        model.reset_classifier(3, '')


# --- script, export, compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_script(name, inference_mode):
    model, x = small_model(name, inference_mode=inference_mode), small_input(name)
    scripted = torch.jit.script(model)
    assert relative_error(scripted(x), model(x)) < 1e-4
    if name != 'smpconv_seq_pmnist':
        other = small_input(name, 3)[..., :24] if x.shape[-1] > 24 else small_input(name, 3)
        assert relative_error(scripted(other), model(other)) < 1e-4


@pytest.mark.parametrize('scriptable', [False, True])
@torch.no_grad()
def test_trace(scriptable):
    model, x = small_model('smpconv_mobile31', scriptable=scriptable), small_input('smpconv_mobile31')
    assert relative_error(torch.jit.trace(model, x)(x), model(x)) < 1e-4


def other_sizes(name):
    shapes = {'smpconv_cifar': [(24, 20), (36, 9)], 'smpconv_seq_mnist': [(20, 30), (9, 7)]}
    return [torch.randn(2, 1 if 'seq' in name else 3, *size) for size in shapes.get(name, [(64, 80), (96, 32)])]


@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name', sorted(SMALL.keys() - {'smpconv_seq_pmnist'}))
@torch.no_grad()
def test_traces_are_for_any_size(name, inference_mode, tmp_path):
    """Those of torch.jit.trace and of the older exporter to ONNX; and there is no more to warn of than elsewhere."""
    model, x = small_model(name, inference_mode=inference_mode), small_input(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        traced = torch.jit.trace(model, x)
    assert not [w for w in seen if issubclass(w.category, torch.jit.TracerWarning)]
    for other in other_sizes(name):
        assert relative_error(traced(other), model(other)) < 1e-4
    runtime = pytest.importorskip('onnxruntime')
    path, axes = str(tmp_path / 'model.onnx'), dict(x={0: 'batch', 2: 'height', 3: 'width'})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=['x'], dynamic_axes=axes)
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for other in other_sizes(name):
        (got,) = session.run(None, dict(x=other[:1].numpy()))
        assert relative_error(torch.from_numpy(got), model(other[:1])) < 1e-4


@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_export(name, inference_mode):
    model, x = small_model(name, inference_mode=inference_mode), small_input(name)
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), model(x)) < 1e-4
    other = small_input(name)
    assert relative_error(program.module()(other), model(other)) < 1e-4


@torch.no_grad()
def test_export_with_dynamic_batch():
    model, x = small_model('smpconv_mobile31', inference_mode=True), small_input('smpconv_mobile31')
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    other = small_input('smpconv_mobile31', 5)
    assert relative_error(program.module()(other), model(other)) < 1e-4


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch 2.6 cannot tell export from compilation')
@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_onnx(name, inference_mode, tmp_path):
    """A file for any batch size gives the same in ONNX Runtime, by plain convolutions."""
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    model, x = small_model(name, inference_mode=inference_mode), small_input(name)
    path = str(tmp_path / 'model.onnx')
    batch = torch.export.Dim('batch', min=1, max=64)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert 'Conv' in operators and 'DFT' not in operators
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for other in (x, small_input(name, 3), small_input(name, 1)):
        (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert relative_error(torch.from_numpy(got), model(other)) < 1e-4


def has_compiler():
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # any failure means that inductor cannot compile here
        return False
    return Path(sysconfig.get_path('include'), 'Python.h').exists()  # which all that it compiles includes


@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_one_graph(name):
    """No graph breaks, with any backend of torch.compile."""
    model, x = small_model(name), small_input(name)
    wanted = model(x)
    torch._dynamo.reset()
    assert relative_error(torch.compile(model, fullgraph=True, backend='aot_eager')(x), wanted) < 1e-4


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch 2.6 cannot tell export from compilation')
@pytest.mark.parametrize('name', sorted(SMALL.keys() - {'smpconv_seq_pmnist'}))
@torch.no_grad()
def test_compiled_once_for_all_sizes(name):
    """After the first: which backend is best for a size is found out in the call."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = small_model(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for x in (small_input(name), *other_sizes(name)):
        assert relative_error(compiled(x), model(x)) < 1e-4
    assert len(graphs) == 2


@pytest.mark.skipif(not has_compiler(), reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize(
    'name, kwargs',
    [('smpconv_mobile31', dict(depths=(1,), dims=(8,), kernel_sizes=(9,))), ('smpconv_seq_mnist', dict(depth=1))],
)
@torch.no_grad()
def test_compile(name, kwargs):
    model, x = small_model(name, **kwargs), small_input(name)
    wanted = model(x)
    torch._dynamo.reset()
    assert relative_error(torch.compile(model, fullgraph=True)(x), wanted) < 1e-4


def test_small_versions_exist():
    assert set(SMALL) | set(SMALLER) <= set(ALL_MODELS)


@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_small_versions_notice_their_kernels(name):
    """Else what the tests of scripts, exports and compilation compare would be stem and classifier alone."""
    model, x = small_model(name), small_input(name)
    before = model(x)
    for module in model.modules():
        if isinstance(module, (PeripheralKernel, SMPKernel)):
            module.weights.zero_()
    assert relative_error(model(x), before) > 1e-3


def test_unknown_arguments_name_the_network(name):
    with pytest.raises(TypeError, match=r'^(SMPConv|SMPConvCifar|SMPConvSeq|PeLK)\.__init__.*bn_eps'):
        build(name, bn_eps=1e-3)
    if not build(name, device='meta').pretrained_cfg['fixed_input_size']:
        with pytest.raises(TypeError, match='img_size'):
            build(name, img_size=64)


PAPER_RADII = {
    'mnist': 0.002,
    'pmnist': 0.002,
    'cifar': 0.002,
    'chartraj': 0.012,
    'speech': 0.012,
    'speech_raw': 0.0002,
}


@pytest.mark.parametrize('data', PAPER_RADII)
def test_radius_of_sequence_networks(data):
    """The paper's at its number of taps; at another one that which reaches a tap, unless one is given."""
    kernels = [
        timm.create_model(f'smpconv_seq_{data}', depth=1, dim=4, **kwargs).stages[0].conv1.large.kernel
        for kwargs in ({}, dict(kernel_size=64), dict(kernel_size=64, radius=0.1))
    ]
    assert [kernel.init_radius for kernel in kernels] == [PAPER_RADII[data], 2 / 64, 0.1]
    (grad,) = torch.autograd.grad(kernels[1]().sum(), kernels[1].weights)
    assert (grad != 0).float().mean() > 0.9  # of its points learn


@pytest.mark.parametrize('taps, radius', [(33, 0.12), (17, 0.12), (7, 4 / 7)])
def test_radius_of_the_cifar_network(taps, radius):
    kernel = timm.create_model('smpconv_cifar', kernel_size=taps, dims=(4, 4)).stages[0].conv1.large.kernel
    assert kernel.init_radius == pytest.approx(radius) and kernel.coord_std == (0.05 if taps > 15 else 0.2)
    assert (kernel().abs().sum((0, 1)) > 0).sum() > 5
