"""What checkpoint files may look like, and what is refused."""

import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import build
from safetensors.torch import save_file
from synth import FIXTURE_NAMES, randomize_norms, reference_state, relative_error, spec, synth_input
from timm.models import load_checkpoint
from timm.models._manipulate import reinit_non_persistent_buffers

from timm_smpconv import WeightsError
from timm_smpconv._files import save_tensors
from timm_smpconv.checkpoint import CheckpointError, carried_settings, check_architecture, read_checkpoint
from timm_smpconv.layers import SMPKernel
from timm_smpconv.models._builder import checkpoint_filter_fn
from timm_smpconv.models.smpconv_seq import change_rate
from timm_smpconv.predict import load_model

LIGHT = ['smpconv_mobile31', 'smpconv_cifar', 'smpconv_seq_chartraj', 'smpconv_seq_speech']


def from_file(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """Plain reference checkpoints and the logits of the models that load them."""
    folder, out = tmp_path_factory.mktemp('plain'), {}
    for name in LIGHT:
        path = folder / f'{name}.pth'
        torch.save({'model': reference_state(name), 'optimizer': {}, 'epoch': 1}, path)
        with torch.no_grad():
            out[name] = path, from_file(name, path)(synth_input(name))
    return out


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda s: {**s, 'head.fc.weight': torch.tensor(1.0)}, 'do not fit smpconv_seq_chartraj|size mismatch'),
        (lambda s: {**s, 'stages.0.conv1.small.weight': torch.tensor(1.0)}, 'do not fit smpconv_seq_chartraj'),
        (lambda s: {**s, 'stages.0.conv1.small.weight': 1}, "a int at 'stages.0.conv1.small.weight'"),
        (lambda s: {**s, 3: torch.ones(1)}, 'keys that are no text'),
        (lambda s: {'state_dict': {'model': {}}}, 'is empty'),
    ],
)
def test_files_that_are_no_weights(change, words, tmp_path):
    name = 'smpconv_seq_chartraj'
    torch.save(change(timm.create_model(name).state_dict()), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=words):
        from_file(name, tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=words):
        from_file(name, tmp_path / 'a.pth', num_classes=20, inference_mode=True)


def test_checkpoints_that_hold_themselves(tmp_path):
    itself = {}
    itself['model'] = itself
    torch.save(itself, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='holds itself'):
        from_file('smpconv_seq_chartraj', tmp_path / 'a.pth')


def test_what_is_refused_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'could run code \(it names torch.nn.modules.linear.Linear\)'):
        read_checkpoint(tmp_path / 'a.pth')


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


WRAPPINGS = {
    'model_ema': lambda s: dict(model=zeros(s), model_ema=s, optimizer={}, epoch=1, args=argparse.Namespace(lr=1.0)),
    'ema first': lambda s: dict(model_ema=s, model=zeros(s), epoch=1),
    'state_dict_ema': lambda s: dict(state_dict=zeros(s), state_dict_ema=s, epoch=3),
    'no ema': lambda s: dict(model=s, model_ema=None, optimizer={}, args=argparse.Namespace(lr=1.0)),
    'no state_dict_ema': lambda s: dict(state_dict=s, state_dict_ema=None),
    'empty state_dict_ema': lambda s: dict(state_dict=s, state_dict_ema={}),
    'model': lambda s: dict(model=s, optimizer={}, lr_scheduler={}, epoch=2),
    'state_dict': lambda s: dict(state_dict=s, arch='x'),
    'bare': lambda s: s,
    'module.': lambda s: dict(model={f'module.{k}': v for k, v in s.items()}),
    'module.module.': lambda s: dict(model={f'module.module.{k}': v for k, v in s.items()}),
    '_orig_mod.': lambda s: dict(model={f'_orig_mod.{k}': v for k, v in s.items()}),
    'ema module.': lambda s: dict(model_ema={f'module.{k}': v for k, v in s.items()}, model=zeros(s)),
}


@pytest.mark.parametrize('name', ['smpconv_mobile31', 'smpconv_seq_chartraj'])
@pytest.mark.parametrize('wrapping', WRAPPINGS)
@torch.no_grad()
def test_wrappings(name, wrapping, reference, tmp_path):
    path = tmp_path / 'reference.pth'
    torch.save(WRAPPINGS[wrapping](reference_state(name)), path)
    assert torch.equal(from_file(name, path)(synth_input(name)), reference[name][1])


@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_reference_with_other_classes(name, reference):
    path, _ = reference[name]
    wanted = from_file(name, path)
    x = synth_input(name)
    model = from_file(name, path, num_classes=7)
    assert tuple(model(x).shape) == (len(x), 7)
    assert torch.equal(model.forward_features(x), wanted.forward_features(x))
    model = from_file(name, path, num_classes=0)
    assert torch.equal(model(x), wanted.forward_head(wanted.forward_features(x), pre_logits=True))


@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_reference_with_one_channel(name, inference_mode, reference):
    """Weights summed over the input channels: the same as showing the grey image to every channel."""
    path, _ = reference[name]
    chans = spec(name)['input'][1]
    x = synth_input(name)[:, :1]
    model = from_file(name, path, in_chans=1, inference_mode=inference_mode)
    wanted = from_file(name, path)(x.expand(-1, chans, *x.shape[2:]))
    assert relative_error(model(x), wanted) <= 1e-5


@pytest.mark.parametrize('in_chans', [2, 4, 6])
@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_reference_with_other_channels(name, in_chans, reference):
    """Weights repeated over the channels and scaled, timm's rule: channel i gets weight i mod n, times n / in_chans."""
    path, _ = reference[name]
    chans = spec(name)['input'][1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, in_chans, *synth_input(name).shape[2:], generator=generator)
    model = from_file(name, path, in_chans=in_chans)
    folded = torch.zeros(2, chans, *x.shape[2:])
    for i in range(in_chans):
        folded[:, i % chans] += x[:, i] * chans / in_chans
    assert relative_error(model(x), from_file(name, path)(folded)) <= 1e-5


@torch.no_grad()
def test_one_channel_to_three(tmp_path):
    """A network of one input channel that is given three."""
    name = 'smpconv_seq_mnist'
    path = tmp_path / 'mnist.pth'
    torch.save(dict(model=reference_state(name)), path)
    x = synth_input(name)
    got = from_file(name, path, in_chans=3)(x.repeat(1, 3, 1))
    assert relative_error(got, from_file(name, path)(x)) <= 1e-5


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@torch.no_grad()
def test_own_layout(name, suffix, model, x, tmp_path):
    path = tmp_path / f'own{suffix}'
    if suffix == '.pth':
        torch.save({'state_dict': zeros(model.state_dict()), 'state_dict_ema': model.state_dict(), 'epoch': 1}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = build(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    assert torch.equal(loaded(x), model(x))
    loaded = build(name, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(x), model(x))
    loaded = build(name).eval()
    load_checkpoint(loaded, str(path))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('in_chans', [1, 4])
@torch.no_grad()
def test_own_layout_other_channels_and_classes(name, in_chans, model, x, tmp_path):
    path = tmp_path / 'own.safetensors'
    save_file(model.state_dict(), path)
    loaded = build(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), in_chans=in_chans, num_classes=5
    ).eval()
    x = x[:, :1].expand(-1, in_chans, *x.shape[2:])
    assert tuple(loaded(x).shape) == (2, 5)
    # the same grey image in all channels: the sum of the first layer's weights is what it was
    chans = model.in_chans
    if in_chans == 1 or in_chans % chans == 0:
        grey = x[:, :1].expand(-1, chans, *x.shape[2:])
        assert relative_error(loaded.forward_features(x), model.forward_features(grey)) <= 1e-5


def test_radii_arrive_exactly_enough(reference):
    path, _ = reference['smpconv_cifar']
    model = from_file('smpconv_cifar', path)
    stored = torch.load(path, weights_only=True)['model']['cconv1.Kernel.radius'].flatten(1)
    assert torch.allclose(model.stem.conv.large.kernel.radius, stored.clamp(1e-4, 1.0), rtol=2e-7, atol=0)


def test_checkpoint_is_not_modified(reference):
    """The filter works on what it was given, not in it."""
    model = timm.create_model('smpconv_cifar')
    checkpoint = {'model': reference_state('smpconv_cifar', prefix='module.')}
    keys = list(checkpoint['model'])
    shapes = [tuple(v.shape) for v in checkpoint['model'].values()]
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)
    assert list(checkpoint['model']) == keys and [tuple(v.shape) for v in checkpoint['model'].values()] == shapes


@pytest.mark.parametrize('name', ['smpconv_mobile31', 'smpconv_cifar', 'smpconv_seq_chartraj'])
@pytest.mark.parametrize('change', ['unexpected', 'missing', 'shape'])
def test_reference_that_does_not_fit(name, change, tmp_path):
    state = reference_state(name)
    key = next(k for k in state if k.endswith('radius'))
    if change == 'unexpected':
        state['some.other.weight'] = torch.zeros(3)
    elif change == 'missing':
        del state[key]
    else:
        state[key] = state[key][:, :-1]
    torch.save(dict(model=state), tmp_path / 'bad.pth')
    with pytest.raises(RuntimeError) as e:
        from_file(name, tmp_path / 'bad.pth')
    assert ('some.other.weight' if change == 'unexpected' else 'radius_offset') in str(e.value)


@pytest.mark.parametrize('name', ['smpconv_seq_chartraj'])
def test_own_layout_that_does_not_fit(name, tmp_path):
    state = dict(build(name).state_dict(), other=torch.zeros(1))
    save_file(state, tmp_path / 'bad.safetensors')
    with pytest.raises(RuntimeError, match='other'):
        from_file(name, tmp_path / 'bad.safetensors')


def test_weights_of_another_model(tmp_path, reference):
    with pytest.raises(RuntimeError):
        from_file('smpconv_seq_chartraj', reference['smpconv_seq_speech'][0], in_chans=20, num_classes=10, dim=20)


class _Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('how', ['pretrained', 'checkpoint_path', 'load_checkpoint'])
@pytest.mark.parametrize('kind', ['torch.save', 'legacy', 'bare pickle', 'nested'])
def test_pickles_with_code_are_refused(how, kind, tmp_path):
    """The code of a malicious file does not run; the same file read carelessly proves that it would."""
    target, path = tmp_path / 'executed', tmp_path / 'evil.pth'
    name = 'smpconv_seq_chartraj'
    payload = dict(model=reference_state(name), args=_Attack(target))
    if kind == 'torch.save':
        torch.save(payload, path)
    elif kind == 'legacy':
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    elif kind == 'nested':
        torch.save(dict(model=dict(payload['model'], extra=_Attack(target))), path)
    else:
        path.write_bytes(pickle.dumps(_Attack(target)))
    with pytest.raises(Exception) as e:
        if how == 'pretrained':
            from_file(name, path)
        elif how == 'checkpoint_path':
            timm.create_model(name, checkpoint_path=str(path))
        else:
            load_checkpoint(timm.create_model(name), str(path))
    assert not isinstance(e.value, (KeyError, AttributeError))
    assert not target.exists(), 'the code in the file was run'
    if kind == 'torch.save' and how == 'pretrained':
        assert zipfile.is_zipfile(path)
        torch.load(path, weights_only=False)
        assert target.exists()


@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_inference_mode_from_the_reference(name, reference):
    path, wanted = reference[name]
    model = from_file(name, path, inference_mode=True)
    assert not any(isinstance(m, SMPKernel) for m in model.modules())
    assert relative_error(model(synth_input(name)), wanted) <= 1e-4  # float32 itself is 1e-5 off with these weights
    trained = from_file(name, path).reparameterize()
    assert relative_error(model(synth_input(name)), trained(synth_input(name))) <= 1e-6
    model = from_file(name, path, inference_mode=True, num_classes=3)
    assert tuple(model(synth_input(name)).shape) == (len(wanted), 3)


@pytest.mark.parametrize('name', LIGHT)
@torch.no_grad()
def test_features_only_from_the_reference(name, reference):
    path, _ = reference[name]
    features = from_file(name, path, features_only=True)
    wanted = from_file(name, path).forward_intermediates(synth_input(name), intermediates_only=True)
    got = features(synth_input(name))
    assert len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted))


class TestPermutation:
    name = 'smpconv_seq_pmnist'

    def test_is_the_reference_s(self):
        model = timm.create_model(self.name)
        wanted = np.random.RandomState(0).permutation(784)
        buffers = dict(model.named_buffers())
        key = next(k for k in buffers if k.endswith('permutation'))
        assert np.array_equal(buffers[key].numpy(), wanted) and key in model.state_dict()

    def test_global_numpy_state_is_left_alone(self):
        np.random.seed(123)
        wanted = np.random.rand(3)
        np.random.seed(123)
        timm.create_model(self.name)
        assert np.array_equal(np.random.rand(3), wanted)

    def test_input_is_permuted(self):
        model = timm.create_model(self.name)
        x = torch.arange(784.0).reshape(1, 1, 784)
        wanted = torch.from_numpy(np.random.RandomState(0).permutation(784)).float()
        assert torch.equal(model.stem.eval()(x)[0, 0], wanted)
        assert torch.equal(model.stem(x.reshape(1, 1, 28, 28)).flatten(), wanted)

    @torch.no_grad()
    def test_a_stored_permutation_wins(self, tmp_path):
        """The real weights may have been trained on another one."""
        model = randomize_norms(timm.create_model(self.name)).eval()
        model.stem.permute.permutation.copy_(torch.arange(783, -1, -1))
        save_file(model.state_dict(), tmp_path / 'own.safetensors')
        loaded = from_file(self.name, tmp_path / 'own.safetensors')
        x = torch.randn(1, 1, 28, 28)
        assert torch.equal(loaded(x), model(x))
        loaded = from_file(self.name, tmp_path / 'own.safetensors', inference_mode=True)
        assert relative_error(loaded(x), model(x)) <= 1e-5
        reinit_non_persistent_buffers(loaded)  # of timm, for models whose buffers are in no checkpoint
        assert relative_error(loaded(x), model(x)) <= 1e-5
        empty = timm.create_model(self.name, device='meta')  # as transformers loads, without load_state_dict
        empty.to_empty(device='cpu').eval()
        for key, value in model.state_dict().items():
            module, _, last = key.rpartition('.')
            empty.get_submodule(module)._parameters.pop(last, None)
            setattr(empty.get_submodule(module), last, value)
        reinit_non_persistent_buffers(empty)
        assert torch.equal(empty.stem.permute.permutation, model.stem.permute.permutation)


@pytest.mark.parametrize('name', ['smpconv_seq_pmnist', 'smpconv_seq_speech'])
def test_weights_stay_where_they_are(name):
    """timm reads files to the CPU, whatever the default device is."""
    state, model = build(name).state_dict(), build(name, in_chans=4)
    with torch.device('meta'):
        adapted = change_rate(checkpoint_filter_fn(state, model), model, 0.5)
    assert {value.device.type for value in adapted.values()} == {'cpu'}
    model.load_state_dict(adapted)


def test_a_file_of_the_caller(tmp_path):
    """Its classifier is kept, unless another one is asked for, and so is what it says of its inputs."""
    torch.manual_seed(0)
    state = timm.create_model('smpconv_seq_speech', num_classes=5).state_dict()
    file, mean = tmp_path / 'a.safetensors', [float(i) for i in range(20)]
    save_tensors(file, state, dict(architecture='smpconv_seq_speech', mean=mean, std=[2.0] * 20))

    def create(**kwargs):
        overlay = dict(file=str(file), **kwargs.pop('overlay', {}))
        return timm.create_model('smpconv_seq_speech', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    model = create(num_classes=5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert tuple(model.pretrained_cfg['mean']) == tuple(mean) and model.pretrained_cfg['num_classes'] == 5
    assert create(num_classes=7).head.fc.out_features == 7
    with pytest.raises(RuntimeError, match='size mismatch for head.fc.weight'):  # nobody has asked for a new one
        create()
    fresh = create(num_classes=5, overlay=dict(num_classes=-1, mean=(1.0,)))  # as train.py --pretrained-path
    assert not torch.equal(fresh.head.fc.weight, state['head.fc.weight']) and fresh.pretrained_cfg['mean'] == (1.0,)
    features = create(features_only=True, feature_cls='getter')
    assert not [m for m in features.modules() if 'state_dict' in getattr(m, 'pretrained_cfg', ())]
    with pytest.raises(WeightsError, match='says that it is of smpconv_seq_speech, not of smpconv_seq_chartraj'):
        timm.create_model('smpconv_seq_chartraj', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    with pytest.raises(CheckpointError, match='says that it is of smpconv_seq_speech'):  # as train.py --model writes
        check_architecture(dict(arch='smpconv_seq_speech.sc'), 'smpconv_seq_chartraj', 'it')


def test_deployed_weights_are_never_half_loaded(tmp_path):
    """Nor where another classifier makes timm take what fits."""
    name, file = 'smpconv_mobile31', tmp_path / 'deployed.pth'
    torch.save(build(name, inference_mode=True).state_dict(), file)
    overlay = dict(file=str(file), num_classes=-1)
    with pytest.raises(
        RuntimeError, match='do not fit SMPConv .*missing.*unknown.*deployed weights need inference_mode'
    ):
        build(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert build(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay, inference_mode=True)


def test_globals_of_the_caller_stay(reference):
    """What somebody has allowed torch to unpickle is still allowed after a checkpoint was read."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([np.dtype])
    try:
        read_checkpoint(reference['smpconv_cifar'][0])
        assert np.dtype in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_checkpoint_of_a_sister_network(tmp_path):
    """The same keys and widths, other numbers of points: kernels of one size would hide it."""
    save_file(build('smpconv_mobile31').state_dict(), tmp_path / 'mobile31.safetensors')
    with pytest.raises(ValueError, match='size mismatch.* Expected a checkpoint of this model'):
        load_model('smpconv_mobile51', tmp_path / 'mobile31.safetensors')


def test_no_weights_is_an_error():
    with pytest.raises(RuntimeError) as e:
        timm.create_model('smpconv_mobile31', pretrained=True)
    assert 'smpconv_mobile31' in str(e.value) and 'pretrained=False' in str(e.value)


def test_fixtures_match_the_models():
    """Every key of a reference checkpoint has its place: nothing is left over on either side."""
    for name in FIXTURE_NAMES:
        model = timm.create_model(name, device='meta')
        state = spec(name)['state']
        # learned offsets of the radii start at zero and are no part of a reference checkpoint
        offsets = [key for key in model.state_dict() if key.endswith('.radius_offset')]
        assert len(state) == len(model.state_dict()) - len(offsets)


def test_header_that_begins_like_an_archive(tmp_path):
    """The length of a header, with which a safetensors file begins, may read PK."""
    path = tmp_path / 'a.safetensors'
    save_file({'x': torch.ones(3)}, path, metadata={'a': ''})
    padding = 0x4B50 - int.from_bytes(path.read_bytes()[:8], 'little')
    save_file({'x': torch.ones(3)}, path, metadata={'a': ' ' * padding})
    assert path.read_bytes()[:2] == b'PK'
    assert torch.equal(read_checkpoint(path)['x'], torch.ones(3))


SIZES = [[], ['a', 'b', 'c'], [3, 32.5, 32], [3, 10**9, 32], [3, -5, 32], [3, 0, 0], [32], [7, 32, 32]]


@pytest.mark.parametrize('size', SIZES)
def test_sizes_that_cannot_be(tmp_path, size):
    said = dict(mean=[0.0], std=[1.0], input_size=size)
    save_tensors(tmp_path / 'a.safetensors', {'x': torch.ones(3)}, said)
    with pytest.raises(CheckpointError, match='size') as e:
        carried_settings(tmp_path / 'a.safetensors', 3)
    assert 'height' in str(e.value)
