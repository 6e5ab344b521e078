"""From checkpoints of any origin to folders for the Hub, and into the local store."""

import argparse
import json
import os
import pickle
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synth import FIXTURE_NAMES, expected, reference_state, relative_error, synth_input

from timm_smpconv import WeightsError, store
from timm_smpconv._files import read_metadata, save_tensors, write_text
from timm_smpconv.checkpoint import CheckpointError, carried_settings, read_checkpoint
from timm_smpconv.classes import SPEECH_WORDS
from timm_smpconv.cli import main
from timm_smpconv.convert import convert
from timm_smpconv.predict import check_inputs, load_model
from timm_smpconv.publish import check_folder
from timm_smpconv.weights import WEIGHTS, bundled_path

SEQ = 'smpconv_seq_speech'


def authors_checkpoint(name):
    """A checkpoint as the authors' code writes it."""
    state = reference_state(name, prefix='module.')
    if timm.get_pretrained_cfg(name).num_classes == 1000:
        args = argparse.Namespace(model=name, lr=4e-3)
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        group = dict(lr=np.float64(1e-7), weight_decay=np.float64(0.05), lr_scale=1.0, flag='radius_flag', params=[0])
        scaler = dict(scale=65536.0)
        return dict(
            epoch=299, arch='SMPConv_T', state_dict=other, optimizer=dict(state={}, param_groups=[group]), version=2,
            args=args, amp_scaler=scaler, state_dict_ema=state, metric=None,
        )  # fmt: skip
    return dict(model=state, optimizer=dict(state={}), lr_scheduler={}, epoch=199)


def with_older_numpy(file):
    """Makes a file that torch.save wrote one of the time before numpy 2, which has renamed a module."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(b'numpy._core.multiarray\n', b'numpy.core.multiarray\n'))


@pytest.mark.parametrize('older', [False, True])
def test_numbers_of_numpy(older, tmp_path):
    """The authors' ImageNet training leaves them in the optimizer; other things of numpy are not taken."""
    name, file = 'smpconv_tiny', tmp_path / 'authors.pth'
    torch.save(authors_checkpoint(name), file)
    if older:
        with_older_numpy(file)
    x, wanted = synth_input(name), torch.from_numpy(expected(name)['logits'])
    overlay = dict(file=str(file))  # what train.py makes of --pretrained-path
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert relative_error(model(x), wanted) < 1e-4
    assert model.pretrained_cfg['file'] == str(file) and 'state_dict' not in model.pretrained_cfg
    kinds = dict(a=np.float64(2.5), b=np.float32(0.5), c=np.int64(-3), d=np.bool_(True), e=torch.ones(2))
    torch.save(kinds, file)
    if older:
        with_older_numpy(file)
    read = read_checkpoint(file)
    assert all(read[key] == kinds[key] and type(read[key]) is type(kinds[key]) for key in 'abcd')
    torch.save(dict(a=np.ones(2)), file)
    with pytest.raises(CheckpointError, match='could run code'):
        read_checkpoint(file)


@pytest.mark.parametrize('name', FIXTURE_NAMES)
def test_convert_install_create(name, tmp_path):
    """Convert, install, create: the expected logits of every reference layout, from the store and from the folder."""
    file = tmp_path / 'authors.pth'
    torch.save(authors_checkpoint(name), file)
    with_older_numpy(file)
    result = convert(file, name, tmp_path / 'out' / 'model', install=True, deployed=True)
    assert result.name == f'{name}.{timm.get_pretrained_cfg(name).tag}'
    x, wanted = synth_input(name), torch.from_numpy(expected(name)['logits'])

    installed, model = (
        timm.create_model(create, pretrained=True).eval() for create in (name, f'local-dir:{result.folder}')
    )
    states = installed.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
    with torch.inference_mode():
        assert relative_error(model(x), wanted) < 1e-4
        if name != 'smpconv_seq_speech_raw':  # 16,000 taps take seconds to render, and the weights are the same
            assert relative_error(installed(x), wanted) < 1e-4
    assert all(m.pretrained_cfg['num_classes'] == m.num_classes for m in (installed, model))
    deployed = timm.create_model(
        name, inference_mode=True, checkpoint_path=str(result.folder / 'deployed.safetensors')
    ).eval()
    with torch.inference_mode():
        assert relative_error(deployed(x), wanted) < 2e-4
    checks = check_folder(result.folder)
    assert [check.name for check in checks] == ['files', 'config', 'card', 'logits', 'logits, deployed']
    assert all(check.ok for check in checks)
    card = (result.folder / 'README.md').read_text()
    assert store.file_sha256(file) in card and 'license: unknown' in card and 'has not been measured' in card
    assert str(tmp_path) not in card + (result.folder / 'config.json').read_text()
    tensors = load_file(result.folder / 'test' / 'rand_tensors.safetensors')
    assert set(tensors) == {'input', 'output', 'features', 'pre_logits'}
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(tensors['input']), tensors['features'], rtol=1e-3, atol=1e-4)


def small(name='smpconv_seq_mnist', **kwargs):
    return timm.create_model(name, **{'depth': 1, 'dim': 4, **kwargs})


SMALL = dict(depth=1, dim=4)


def test_train_script_checkpoint(tmp_path):
    """Checkpoints of timm's train.py: the average of the weights unless told otherwise; other classes and sizes."""
    torch.manual_seed(0)
    model, ema = small(num_classes=3), small(num_classes=3)
    args = argparse.Namespace(model='smpconv_seq_mnist', lr=1e-3)
    checkpoint = dict(
        epoch=3, arch='smpconv_seq_mnist', state_dict=model.state_dict(), state_dict_ema=ema.state_dict(), args=args,
        version=2, optimizer={}, metric=50.0,
    )  # fmt: skip
    torch.save(checkpoint, tmp_path / 'model_best.pth.tar')
    for use_ema, source in ((True, ema), (False, model)):
        out = convert(
            tmp_path / 'model_best.pth.tar',
            'smpconv_seq_mnist',
            tmp_path / str(use_ema),
            use_ema=use_ema,
            model_kwargs=dict(SMALL, num_classes=3),
        ).folder
        loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
        assert loaded.num_classes == 3
        for key, value in source.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(CheckpointError, match='says that it is of smpconv_seq_mnist'):
        convert(tmp_path / 'model_best.pth.tar', 'smpconv_seq_cifar', tmp_path / 'other')
    with pytest.raises(CheckpointError, match=r'shape of head.fc.weight: \(3, 4\)'):
        convert(tmp_path / 'model_best.pth.tar', 'smpconv_seq_mnist', tmp_path / 'other', model_kwargs=SMALL)
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('name,other', [(SEQ, 'smpconv_seq_cifar'), ('smpconv_cifar', 'smpconv_tiny')])
def test_differences_are_listed(name, other, tmp_path, capsys):
    torch.save(authors_checkpoint(name), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError) as e:
        convert(tmp_path / 'a.pth', other, tmp_path / 'out')
    assert f'does not fit {other}' in str(e.value) and 'difference(s)' in str(e.value)
    assert main(['convert', str(tmp_path / 'a.pth'), '--model', other, '--out', str(tmp_path / 'out')]) == 2
    err = capsys.readouterr().err
    assert err.startswith('timm-smpconv: ') and ('shape of' in err or 'missing:' in err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth']


@pytest.mark.parametrize('change', ['missing', 'unknown', 'shape', 'kind', 'nan', 'variance'])
def test_every_difference_counts(change, tmp_path):
    state = small().state_dict()
    key = {'kind': 'head.fc.bias', 'variance': 'stages.0.conv1.large_norm.running_var'}.get(change, 'head.fc.weight')
    if change == 'missing':
        del state[key]
    elif change == 'unknown':
        key = 'head.other'
        state[key] = torch.zeros(2)
    else:
        state[key] = {
            'shape': torch.zeros(11, 4), 'kind': torch.zeros(10, dtype=torch.long),
            'nan': torch.full((10, 4), float('nan')), 'variance': torch.full((4,), -1.0),
        }[change]  # fmt: skip
    save_file(state, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=key.replace('.', r'\.')):
        convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL)
    assert not (tmp_path / 'out').exists()


class _Bomb:
    def __reduce__(self):
        return (open, ('exploded', 'w'))


@pytest.mark.parametrize('protocol', ['zip', 'legacy', 'pickle'])
def test_no_code_is_run(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dict(model=reference_state(SEQ), args=_Bomb())
    if protocol == 'pickle':
        (tmp_path / 'a.pth').write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, 'a.pth', _use_new_zipfile_serialization=protocol == 'zip')
    with pytest.raises(CheckpointError):
        convert('a.pth', SEQ, 'out')
    assert not (tmp_path / 'exploded').exists() and not (tmp_path / 'out').exists()


def test_what_is_no_checkpoint(tmp_path):
    cases = {
        'empty.pth': b'',
        'text.pth': b'not a checkpoint',
        'page.pth': b'<!DOCTYPE html><html><title>Quota exceeded</title></html>',
        'text.safetensors': b'\x10\0\0\0\0\0\0\0{not json at all}',
        'long.safetensors': b'\xff\xff\xff\xff\xff\xff\xff\x7f{',
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name, value in {
        'list.pth': [1, 2],
        'number.pth': dict(model=3),
        'nothing.pth': {},
        'nested.pth': dict(model=dict(weight='text')),
        'keys.pth': {1: torch.zeros(2)},
        'large.pth': dict(reference_state(SEQ), more=torch.zeros(1).expand(1 << 40)),
        'sparse.pth': dict(a=torch.zeros(3, 3).to_sparse()),
    }.items():
        torch.save(value, tmp_path / name)
    circle = {}
    circle['model'] = circle
    torch.save(circle, tmp_path / 'circle.pth')
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'\0' * 10_000_000)
    for path in [tmp_path / 'absent.pth', tmp_path, *sorted(tmp_path.iterdir())]:
        with pytest.raises(CheckpointError) as e:
            convert(path, SEQ, tmp_path / 'out')
        assert path.name in str(e.value) and len(str(e.value)) < 2000
    assert not (tmp_path / 'out').exists()


def test_safetensors_of_any_name(tmp_path):
    state = {key: value.contiguous() for key, value in reference_state(SEQ).items() if value.numel()}
    save_file(state, tmp_path / 'weights.bin')
    assert set(read_checkpoint(tmp_path / 'weights.bin')) == set(state)
    assert convert(tmp_path / 'weights.bin', SEQ, install=True).installed.is_file()


def test_arguments(tmp_path):
    save_file(small().state_dict(), tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='Nothing to do'):
        convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist')
    with pytest.raises(ValueError, match='Unknown model'):
        convert(tmp_path / 'a.safetensors', 'smpconv_huge', tmp_path / 'out')
    with pytest.raises(ValueError, match='standard form'):
        convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', install=True, model_kwargs=SMALL)
    with pytest.raises(ValueError, match='Cannot build'):
        convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=dict(colour=1))
    out = convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL).folder
    with pytest.raises(FileExistsError, match='overwrite'):
        convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', out, model_kwargs=SMALL)
    convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', out, model_kwargs=SMALL, overwrite=True)
    for kwargs, words in (
        (dict(device='nowhere'), 'Cannot build'),
        (dict(features_only=True), 'make something else'),
        # which a configuration cannot hold, or timm would be given twice
        (dict(SMALL, pretrained=False), r'not of the network itself \(pretrained\).*expected some of conv_bias'),
        (dict(SMALL, scriptable=True), r'not of the network itself \(scriptable\)'),
        (dict(SMALL, dtype=torch.float64), r'not of the network itself \(dtype\)'),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'other', model_kwargs=kwargs)
    folder = convert(
        tmp_path / 'a.safetensors', 'smpconv_seq_mnist', out, model_kwargs=dict(SMALL, global_pool=None), overwrite=True
    ).folder
    assert timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.safetensors', 'out']


def test_equal_input_equal_output(tmp_path):
    torch.save(authors_checkpoint(SEQ), tmp_path / 'a.pth')
    folders = [convert(tmp_path / 'a.pth', SEQ, tmp_path / str(i)).folder for i in range(2)]
    for path in folders[0].rglob('*'):
        if path.is_file():
            assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes(), path.name


@pytest.mark.parametrize('ancestors', [[], ['smpconv_cifar.c10']])
def test_transformers(tmp_path, ancestors):
    """transformers' wrapper of timm models reads the folder, and gives the same logits."""
    transformers = pytest.importorskip('transformers')
    model = timm.create_model('smpconv_cifar').eval()
    save_tensors(tmp_path / 'a.safetensors', model.state_dict(), dict(ancestors=ancestors) if ancestors else None)
    out = convert(tmp_path / 'a.safetensors', 'smpconv_cifar', tmp_path / 'out').folder
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(out).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(wrapper(x).logits, model(x), rtol=1e-4, atol=1e-5)


def test_metadata_have_one_order(tmp_path):
    """Which differs from process to process as safetensors writes them, and from file to file."""
    tensors, metadata = dict(b=torch.arange(3), a=torch.ones(2, 2)), dict(names=['größer', '"', '\\'], ancestors=[])
    written = set()
    for i in range(12):
        save_tensors(tmp_path / str(i), tensors, metadata)
        written.add((tmp_path / str(i)).read_bytes())
    assert len(written) == 1 and read_metadata(tmp_path / '0') == metadata
    with safe_open(tmp_path / '0', 'pt') as file:
        assert file.metadata()['format'] == 'pt'
        assert all(torch.equal(file.get_tensor(key), tensors[key]) for key in tensors)


def test_permutations_of_another_length(tmp_path):
    kwargs = dict(img_size=8, dim=4, depth=1)
    model = timm.create_model('smpconv_seq_pmnist', **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    out = convert(tmp_path / 'a.pth', 'smpconv_seq_pmnist', tmp_path / 'out', model_kwargs=kwargs).folder
    loaded, x = timm.create_model(f'local-dir:{out}', pretrained=True).eval(), torch.randn(2, 1, 8, 8)
    assert tuple(loaded.pretrained_cfg['input_size']) == (1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_error_type():
    assert issubclass(CheckpointError, WeightsError) and issubclass(WeightsError, RuntimeError)


def test_only_conversions_are_overwritten(tmp_path, monkeypatch):
    """A folder of a training run, or the checkpoint itself, is not lost to --overwrite."""
    run = tmp_path / 'run'
    run.mkdir()
    save_file(small().state_dict(), run / 'last.safetensors')
    (run / 'log.csv').write_text('epoch')
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.chdir(run)
    for out in (run, '.', run / 'last.safetensors', run / 'log.csv'):
        with pytest.raises(FileExistsError, match='not overwritten'):
            convert(run / 'last.safetensors', 'smpconv_seq_mnist', out, model_kwargs=SMALL, overwrite=True)
    out = convert(run / 'last.safetensors', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL).folder
    with pytest.raises(FileExistsError, match='not overwritten'):  # nor what it reads from
        convert(out / 'model.safetensors', 'smpconv_seq_mnist', out, model_kwargs=SMALL, overwrite=True)
    monkeypatch.chdir(out)
    assert convert(run / 'last.safetensors', 'smpconv_seq_mnist', '.', model_kwargs=SMALL, overwrite=True).folder == out
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'run']


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
@pytest.mark.parametrize('moment', [1, 2])
def test_stopped_while_it_overwrites(error, moment, tmp_path, monkeypatch):
    """There are two renames: whatever comes between leaves the old folder where it was."""
    save_file(small().state_dict(), tmp_path / 'a.safetensors')
    arguments = tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'out'
    out = convert(*arguments, model_kwargs=SMALL).folder
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    replace, calls = os.replace, []

    def fail(old, new):
        if out in (Path(old), Path(new)):
            calls.append(old)
            if len(calls) == moment:
                raise error
        replace(old, new)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(error):
        convert(*arguments, model_kwargs=SMALL, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.safetensors', 'out']


def test_installed_weights_keep_their_statistics(tmp_path):
    """Weights of inputs that were normalised in another way say so, also without a config.json beside them."""
    state = timm.create_model(SEQ).state_dict()
    mean, std = tuple(float(i) for i in range(20)), (3.0,) * 20
    save_tensors(tmp_path / 'a.safetensors', state, dict(mean=mean, std=std))
    result = convert(tmp_path / 'a.safetensors', SEQ, tmp_path / 'out', install=True)
    for model in (
        timm.create_model(SEQ, pretrained=True),
        timm.create_model(f'local-dir:{result.folder}', pretrained=True),
        load_model(SEQ),
        load_model(SEQ, tmp_path / 'a.safetensors'),
    ):
        assert tuple(model.pretrained_cfg['mean']) == mean and tuple(model.pretrained_cfg['std']) == std
    chosen = timm.create_model(SEQ, pretrained=True, pretrained_cfg_overlay=dict(mean=(1.0,)))
    assert chosen.pretrained_cfg['mean'] == (1.0,) and tuple(chosen.pretrained_cfg['std']) == std
    assert result.sha256 == store.file_sha256(result.folder / 'model.safetensors')


def test_folders_of_unknown_normalisation(tmp_path, caplog):
    """The mean and std in their config.json are placeholders, and are not taken for what the weights say."""
    save_file(timm.create_model(SEQ).state_dict(), tmp_path / 'a.safetensors')
    folder = convert(tmp_path / 'a.safetensors', SEQ, tmp_path / 'out').folder
    for use in (check_inputs, lambda name, file: convert(file, name, tmp_path / 'again', install=True)):
        caplog.clear()
        use(SEQ, folder / 'model.safetensors')
        assert 'does not say how its inputs were normalised' in caplog.text
    assert check_folder(folder)[1].ok and timm.create_model(f'local-dir:{folder}', pretrained=True)
    caplog.clear()
    known = convert(bundled_path(f'{SEQ}.sc'), SEQ, tmp_path / 'known').folder
    check_inputs(SEQ, known / 'model.safetensors')
    assert not caplog.text


@pytest.mark.parametrize(
    'statistics', [dict(mean=[float('nan')] * 20), dict(std=[0.0] * 20), dict(mean=[1.0] * 3), dict(std=[])]
)
def test_impossible_statistics(statistics, tmp_path):
    save_tensors(tmp_path / 'a.safetensors', timm.create_model(SEQ).state_dict(), statistics)
    with pytest.raises(CheckpointError, match='numbers'):
        convert(tmp_path / 'a.safetensors', SEQ, tmp_path / 'out')
    with pytest.raises(ValueError, match='numbers'):
        load_model(SEQ, tmp_path / 'a.safetensors')
    assert not (tmp_path / 'out').exists()


def test_numbers_that_do_not_survive(tmp_path):
    """What is no number any more in the dtype of the network, or is none without scales."""
    key = 'head.fc.weight'
    for value, problem in (
        (torch.full((10, 4), 1e39, dtype=torch.float64), 'not finite'),
        (torch.zeros(10, 4).to(torch.float8_e4m3fn), 'float8'),
        (torch.nested.nested_tensor([torch.zeros(4)] * 10), 'nested'),
    ):
        torch.save(dict(small().state_dict(), **{key: value}), tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match=problem):
            convert(tmp_path / 'a.pth', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL)


def test_orders_of_steps(tmp_path):
    for order in (torch.zeros(784, dtype=torch.long), torch.arange(784) + 1):
        state = timm.create_model('smpconv_seq_pmnist').state_dict()
        state['stem.permute.permutation'] = order
        torch.save(state, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='order of the steps'):
            convert(tmp_path / 'a.pth', 'smpconv_seq_pmnist', install=True)


def test_contents_decide_not_names(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'torch.safetensors')
    convert(tmp_path / 'torch.safetensors', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL)


def test_card_of_a_customised_network(tmp_path):
    save_file(small().state_dict(), tmp_path / 'a.safetensors')
    result = convert(
        tmp_path / 'a.safetensors',
        'smpconv_seq_mnist',
        tmp_path / 'out',
        deployed=True,
        model_kwargs=SMALL,
        license='cc-by-4.0',
    )
    card = (result.folder / 'README.md').read_text()
    assert 'license: cc-by-4.0' in card and 'CC-BY-4.0.' in card
    cfg = json.loads((result.folder / 'config.json').read_text())['pretrained_cfg']
    assert cfg['license'] == 'cc-by-4.0' and 'description' not in cfg  # what they were trained on is not known
    (snippet,) = re.findall(r"`timm.create_model\('smpconv_seq_mnist', (.*checkpoint_path=FILE.*)\)`", card)
    file = str(result.folder / 'deployed.safetensors')
    timm.create_model('smpconv_seq_mnist', **eval(f'dict({snippet})', dict(FILE=file)))
    assert all(check.ok for check in check_folder(result.folder))
    save_file(load_file(file) | {'head.fc.bias': torch.ones(10)}, file)
    assert [check.name for check in check_folder(result.folder) if not check.ok] == ['logits, deployed']


def test_a_store_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('smpconv_seq_mnist').state_dict(), path)
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', str(path))  # no folder
    with pytest.raises(WeightsError, match='Cannot store the weights smpconv_seq_mnist.* set TIMM_SMPCONV_CACHE'):
        convert(path, 'smpconv_seq_mnist', install=True)


@pytest.mark.skipif(os.name == 'nt', reason='no umask')
def test_folders_have_the_rights_of_others(tmp_path):
    save_file(small().state_dict(), tmp_path / 'a.safetensors')
    for mask in (0o077, 0o022):
        before = os.umask(mask)
        try:
            folder = convert(tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / str(mask), model_kwargs=SMALL)
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o077 & mask for path in (folder.folder, *folder.folder.iterdir())} == {0}
        assert folder.folder.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.skipif(os.name == 'nt', reason='no devices')
def test_devices_are_not_replaced(tmp_path):
    """A rename would put a file in their place; a link is written through."""
    for path in (Path('/dev/null'), tmp_path):
        with pytest.raises(OSError, match='a folder or a device, expected a file'):
            write_text(path, 'a')
    (tmp_path / 'link').symlink_to(tmp_path / 'target')
    write_text(tmp_path / 'link', 'a')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target').read_text() == 'a'


def test_a_full_disk(tmp_path):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match='Cannot write'):
            save_tensors(tmp_path / 'a.safetensors', dict(a=torch.zeros(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('key', [name for name, weights in WEIGHTS.items() if weights.bundled])
def test_bundled_files_are_what_convert_makes(key, tmp_path):
    """So that a repository on the Hub can be checked against the table, and its card knows what it holds."""
    result = convert(bundled_path(key), key, tmp_path / 'out')
    assert result.sha256 == WEIGHTS[key].sha256 == store.file_sha256(result.folder / 'model.safetensors')
    assert f'license: {WEIGHTS[key].license}' in (result.folder / 'README.md').read_text()


@pytest.mark.parametrize('channels', [1, 4])
def test_other_input_channels(channels, tmp_path):
    """The folder describes the network that it holds."""
    kwargs = dict(in_chans=channels, dims=(4, 4), kernel_size=5)
    save_file(timm.create_model('smpconv_cifar', **kwargs).state_dict(), tmp_path / 'a.safetensors')
    folder = convert(tmp_path / 'a.safetensors', 'smpconv_cifar', tmp_path / 'out', model_kwargs=kwargs).folder
    assert f'torch.randn(1, {channels}, 32, 32)' in (folder / 'README.md').read_text()
    cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert cfg['input_size'] == [channels, 32, 32]
    assert cfg['mean'] == pytest.approx([0.449] * channels, abs=1e-3)
    assert all(check.ok for check in check_folder(folder))


def test_hashes_are_those_of_the_files(tmp_path):
    """Weights say how their inputs were normalised, in a folder and in the store."""
    model = timm.create_model('smpconv_seq_chartraj')
    save_tensors(tmp_path / 'a.safetensors', model.state_dict(), dict(mean=[1.0] * 3, std=[2.0] * 3))
    both = convert(tmp_path / 'a.safetensors', 'smpconv_seq_chartraj', tmp_path / 'out', install=True)
    for file in (both.folder / 'model.safetensors', both.installed):
        assert both.sha256 == store.file_sha256(file)
        assert carried_settings(file, beside=False) == dict(mean=(1.0,) * 3, std=(2.0,) * 3)
    alone = convert(tmp_path / 'a.safetensors', 'smpconv_seq_chartraj', install=True)
    assert alone.sha256 == store.file_sha256(alone.installed) == both.sha256


def test_links_as_folders(tmp_path):
    """What a link leads to is made, or replaced."""
    save_file(small().state_dict(), tmp_path / 'a.safetensors')
    arguments = tmp_path / 'a.safetensors', 'smpconv_seq_mnist', tmp_path / 'link'
    (tmp_path / 'link').symlink_to(tmp_path / 'real', target_is_directory=True)
    for overwrite in (False, True):
        folder = convert(*arguments, model_kwargs=SMALL, overwrite=overwrite).folder
        assert folder == tmp_path / 'real' and (tmp_path / 'link').is_symlink()
        assert (tmp_path / 'link' / 'model.safetensors').is_file()


def test_classes_of_our_own_weights_have_names(tmp_path):
    name = 'smpconv_seq_speech.sc'
    folder = convert(bundled_path(name), name, tmp_path / 'out').folder
    assert json.loads((folder / 'config.json').read_text())['label_names'] == list(SPEECH_WORDS)
    save_file(timm.create_model('smpconv_seq_speech').state_dict(), tmp_path / 'a.safetensors')
    folder = convert(tmp_path / 'a.safetensors', name, tmp_path / 'other', license='other: mine').folder
    assert 'label_names' not in json.loads((folder / 'config.json').read_text())  # they may be of anything
    assert 'license: "other: mine"\n' in (folder / 'README.md').read_text()


def test_averages_of_checkpoints(tmp_path):
    """timm's avg_checkpoints.py makes float32 of all numbers, and fractions of numbers of batches."""
    states = [small().state_dict() for _ in range(2)]
    states[1]['stages.0.conv1.large_norm.num_batches_tracked'] += 5
    average = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
    torch.save(average, tmp_path / 'averaged.pth')
    folder = convert(tmp_path / 'averaged.pth', 'smpconv_seq_mnist', tmp_path / 'out', model_kwargs=SMALL).folder
    found = load_file(folder / 'model.safetensors')
    assert found['stages.0.conv1.large_norm.num_batches_tracked'].dtype == torch.int64
    assert all(torch.equal(found[key], value) for key, value in average.items() if not key.endswith('tracked'))
    average['stages.0.conv1.large_norm.num_batches_tracked'] = torch.tensor(float('nan'))
    torch.save(average, tmp_path / 'averaged.pth')
    with pytest.raises(CheckpointError, match='kind of stages.0.conv1.large_norm.num_batches_tracked'):
        convert(tmp_path / 'averaged.pth', 'smpconv_seq_mnist', tmp_path / 'other', model_kwargs=SMALL)


def test_empty_files(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    save_file({}, tmp_path / 'b.safetensors')
    for file in ('a.pth', 'b.safetensors'):
        with pytest.raises(CheckpointError, match='is empty'):
            read_checkpoint(tmp_path / file)
        with pytest.raises(ValueError, match='is empty'):  # and not the bundled weights
            load_model('smpconv_seq_mnist', tmp_path / file)
