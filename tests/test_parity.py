"""Agreement with the authors' implementation at full size, through the path that a user takes."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from synth import FIXTURE_NAMES, expected, reference_state, relative_error, spec, synth_input
from timm.utils import reparameterize_model

from timm_smpconv.layers import SMPKernel

# the table of models: parameters, top-1 of the paper is no concern of the code
PARAMS = {
    'smpconv_tiny': 26_705_248,
    'smpconv_base': 79_546_520,
    'smpconv_mobile31': 2_892_494,
    'smpconv_mobile51': 3_066_884,
    'smpconv_cifar': 489_646,
    'smpconv_seq_mnist': 370_960,
    'smpconv_seq_pmnist': 370_960,
    'smpconv_seq_cifar': 373_480,
    'smpconv_seq_chartraj': 373_790,
    'smpconv_seq_speech': 391_840,
    'smpconv_seq_speech_raw': 370_960,
}
IMAGENET = ('smpconv_tiny', 'smpconv_base', 'smpconv_mobile31', 'smpconv_mobile51')


def save_reference(name, path):
    """A checkpoint file as the authors' training scripts write it."""
    if name in IMAGENET:
        prefix = 'module.' if name == 'smpconv_base' else ''
        state = reference_state(name, prefix=prefix)
        raw = {key: torch.zeros_like(value) for key, value in state.items()}
        ema, plain = ('model_ema', 'model') if name != 'smpconv_mobile31' else ('state_dict_ema', 'state_dict')
        checkpoint = {plain: raw, ema: state, 'optimizer': {}, 'epoch': 1, 'args': argparse.Namespace(lr=1.0)}
    else:
        prefix = 'module.' if name in ('smpconv_cifar', 'smpconv_seq_speech') else ''
        checkpoint = dict(model=reference_state(name, prefix=prefix), optimizer={}, lr_scheduler={}, epoch=1)
    torch.save(checkpoint, path)
    return str(path)


def load_reference(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs).eval()


def rendered(name, model, key):
    """The rendered kernel of a module given by its name in the reference."""
    parts = key.split(':')[1].split('.')
    if name in IMAGENET:  # stages.0.blocks.0.large_kernel.smp.conv
        module = model.get_submodule('.'.join([*parts[:4], 'mix.large.kernel']))
    elif parts == ['cconv1']:
        module = model.stem.conv.large.kernel
    else:  # backbone.0.cconv1 or blocks.0.cconv1
        module = model.get_submodule(f'stages.{parts[1]}.{parts[2].replace("cconv", "conv")}.large.kernel')
    assert isinstance(module, SMPKernel)
    return module()


@torch.no_grad()
def errors(name, model, dtype):
    """Relative error of everything that the fixture has a value for."""
    wanted = expected(name)
    inputs = synth_input(name).to(dtype)
    out = {}
    if 'features_mean' in wanted:  # of the last stage, in front of the norm
        x, (last,) = model.forward_intermediates(inputs, indices=1)
        logits = model.forward_head(x)
        out['features_mean'] = relative_error(last.mean((2, 3)), wanted['features_mean'])
    else:
        logits = model(inputs)
    assert logits.dtype == dtype
    out['logits'] = relative_error(logits, wanted['logits'])
    for key, value in wanted.items():
        if key.startswith('kernel:'):
            kernel = rendered(name, model, key)
            kernel = kernel if kernel.ndim == value.ndim else kernel.flatten(0, 1)
            out[key] = relative_error(kernel[: len(value)], value)
    assert len(out) == len(wanted) >= 3
    return out


@pytest.fixture(scope='module', params=FIXTURE_NAMES)
def case(request, tmp_path_factory):
    """(name, checkpoint file, model loaded from it in float32)."""
    name = request.param
    path = save_reference(name, tmp_path_factory.mktemp('reference') / f'{name}.pth')
    yield name, path, load_reference(name, path)
    Path(path).unlink()


def test_fixtures_complete():
    assert len(FIXTURE_NAMES) == 10
    assert {n for n in FIXTURE_NAMES} | {'smpconv_seq_pmnist'} == set(PARAMS)


def test_float32(case):
    name, _, model = case
    found = errors(name, model, torch.float32)
    assert all(error <= 1e-4 for error in found.values()), found


@torch.no_grad()
def test_deployed(case):
    """The deployed form is as exact in float32 as the training form is: no rounding of its own."""
    name, _, model = case
    x, wanted = synth_input(name), expected(name)['logits']
    error = relative_error(reparameterize_model(model)(x), wanted)
    assert error <= 1e-4
    assert error <= 2 * relative_error(model(x), wanted) + 1e-6


def test_parameters(case):
    name, _, model = case
    assert sum(p.numel() for p in model.parameters()) == spec(name)['params'] == PARAMS[name]


def test_float64(case):
    """The weights loaded in float64, expected values stored in float32."""
    name, path, _ = case
    model = load_reference(name, path, dtype=torch.float64)
    found = errors(name, model, torch.float64)
    assert all(error <= 1e-6 for error in found.values()), found
    if name in ('smpconv_base', 'smpconv_seq_speech_raw'):
        return  # seconds each; the others show it
    with torch.no_grad():
        deployed = model.reparameterize()(synth_input(name).double())
    assert relative_error(deployed, expected(name)['logits']) <= 1e-6


def test_float64_after_load(case):
    """Loaded in float32 like any weights, then converted: loading must not have rounded."""
    name, path, model = case
    model.double()  # the last test that uses it
    wanted = load_reference(name, path, dtype=torch.float64)
    found, exact = ({**m.state_dict(), **dict(m.named_buffers())} for m in (model, wanted))
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    if name in IMAGENET or name == 'smpconv_seq_speech_raw':
        return  # seconds each, of the very weights that test_float64 has tried
    found = errors(name, model, torch.float64)
    assert all(error <= 1e-6 for error in found.values()), found


@pytest.mark.parametrize('name', sorted(PARAMS))
def test_table_of_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


def test_table_is_complete():
    assert set(timm.list_models('smpconv*')) >= set(PARAMS)


def test_pmnist_is_mnist_on_permuted_input(tmp_path):
    """There is no fixture for the permuted network: the plain one has it on the inversely permuted input."""
    path = save_reference('smpconv_seq_mnist', tmp_path / 'mnist.pth')
    model = load_reference('smpconv_seq_pmnist', path)
    x = synth_input('smpconv_seq_mnist')
    unpermuted = torch.empty_like(x)
    unpermuted[:, :, model.stem.permute.permutation] = x
    with torch.no_grad():
        for inputs in (unpermuted, unpermuted.reshape(-1, 1, 28, 28)):
            assert relative_error(model(inputs), expected('smpconv_seq_mnist')['logits']) <= 1e-4
