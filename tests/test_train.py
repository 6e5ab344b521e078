"""Training on a few made-up samples: reproducible, resumable after any kill, and clear about what is wrong."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from datasets import write_mnist, write_speech, write_trajectories
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from synth import reference_state

from timm_smpconv import train as module
from timm_smpconv._files import read_metadata, save_tensors, write_text
from timm_smpconv.catalog import model_names
from timm_smpconv.checkpoint import CheckpointError, ancestors, carried_settings
from timm_smpconv.convert import convert
from timm_smpconv.data import Samples, load_mnist, load_speech, speaker_number
from timm_smpconv.features import MFCC
from timm_smpconv.models.smpconv_seq import change_rate
from timm_smpconv.predict import load_model
from timm_smpconv.recipe import Recipe, field_texts, read_recipe, recipe_text, same_recipe
from timm_smpconv.tasks import (
    TASKS,
    augment_digits,
    augment_waves,
    channel_statistics,
    heard,
    mask_spectrogram,
    network_input,
    normalize,
    split,
)
from timm_smpconv.train import _mix, _seed, train
from timm_smpconv.validate import evaluate, validate
from timm_smpconv.weights import WEIGHTS, bundled_path, training_speakers

RECIPE = Recipe(epochs=2, batch_size=4, val_images=5, lr=1e-3, model_kwargs=dict(dim=6, depth=2))
SPEECH = dict(
    batch_size=8,
    lr=1e-3,
    input_drop_rate=0.0,
    drop=0.1,
    model_kwargs=dict(dim=8, depth=2),
)
AUGMENTATION = dict(
    time_shift=0.1, speed=0.1, gain=6.0, noise=0.01, time_mask=20, freq_mask=8, mixup=0.4, smoothing=0.1
)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Small MNIST, Speech Commands and character trajectories."""
    return write_trajectories(write_speech(write_mnist(tmp_path_factory.mktemp('data'))))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _log(output):
    with (output / 'log.csv').open() as f:
        return list(csv.DictReader(f))


def _same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


RAW = dict(kernel_size=50, radius=0.05, dim=4, depth=1)  # arguments of a small network for raw speech


def _save(path, name, metadata=None, sharpness=1.0, **kwargs):
    """Random weights; with more sharpness the logits are no longer almost zero, and depend on the input."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    model.head.fc.weight.data *= sharpness
    save_tensors(path, model.state_dict(), metadata or {})
    return model


def _one_step(folder, data_dir, output, **fields):
    """How one step of plain gradient descent on all digits changes each parameter, what there was, and the loss."""
    model = _save(folder / 'start.safetensors', RECIPE.model, sharpness=100.0, **RECIPE.model_kwargs)
    recipe = dict(
        epochs=1, batch_size=20, warmup_epochs=0, weight_decay=0.0, model_ema_decay=0.0, opt='momentum', lr=1.0,
        opt_kwargs=dict(momentum=0.0), augment=False, input_drop_rate=0.0,
        initial_checkpoint=str(folder / 'start.safetensors'),
    )  # fmt: skip
    path = train(dataclasses.replace(RECIPE, **{**recipe, **fields}), data_dir, folder / output, progress=False)
    after, before = load_file(path), {key: value.detach() for key, value in model.named_parameters()}
    return {key: after[key] - before[key] for key in before}, before, float(_log(folder / output)[-1]['train_loss'])


def _norm(tensors):
    return torch.cat([value.flatten() for value in tensors.values()]).norm().item()


# runs


def _start(config, data_dir, output):
    command = [sys.executable, '-m', 'timm_smpconv', 'train', '--threads', '1', '--recovery-interval', '5']
    command += ['--config', config, '--data', data_dir, '--output', output]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='this system has no kill -9')
def test_killed_run_continues(data_dir, tmp_path):
    """kill -9 within an epoch, twice, then the end: weights and log of an unbroken run, bit for bit."""
    data = write_speech(tmp_path / 'data', train=160, test=10)
    kwargs = {**SPEECH, **AUGMENTATION, 'batch_size': 4, 'drop': 0.3, 'kd_model_name': 'smpconv_seq_speech'}
    recipe = Recipe('smpconv_seq_speech', epochs=2, **kwargs)
    config = tmp_path / 'recipe.yaml'
    config.write_text(recipe_text(recipe))
    whole = train(recipe, data, tmp_path / 'whole', progress=False)
    broken = tmp_path / 'broken'

    def step():
        try:
            return torch.load(broken / 'checkpoint.pt', weights_only=True)['step']
        except FileNotFoundError:
            return 0

    per_epoch = len(split(load_speech(data, True), recipe, TASKS[recipe.model])[0]) // 4
    stops = []
    for goal in (per_epoch // 4, per_epoch + per_epoch // 4):
        process = _start(config, data, broken)
        while step() < goal and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        stops.append(step())
    assert 0 < stops[0] < per_epoch < stops[1] < 2 * per_epoch and stops[0] % 5 == 0
    assert not (broken / 'model.safetensors').exists()
    torch.manual_seed(123)  # the state of the generator is not what a run depends on
    path = train(recipe, data, broken, progress=False)
    assert _same(whole, path) and whole.read_bytes() == path.read_bytes()
    rows = [[{**row, 'seconds': '', 'samples_per_second': ''} for row in _log(path.parent)] for path in (whole, path)]
    assert rows[0] == rows[1] and [row['epoch'] for row in rows[0]] == ['1', '2']


def test_run_on_digits(data_dir, tmp_path):
    path = train(RECIPE, data_dir, tmp_path / 'run', progress=False)
    again = train(RECIPE, data_dir, tmp_path / 'again', progress=False, recovery_interval=0)
    assert _same(path, again) and path.read_bytes() == again.read_bytes()
    other = train(dataclasses.replace(RECIPE, seed=1), data_dir, tmp_path / 'other', progress=False)
    assert not _same(path, other)
    rows = _log(tmp_path / 'run')
    assert [row['epoch'] for row in rows] == ['1', '2'] and float(rows[0]['samples_per_second']) > 0
    assert 0 <= float(rows[0]['val_accuracy']) <= 1 and rows[0]['seed'] == '0'
    names = {'checkpoint.pt', 'config.json', 'log.csv', 'model.safetensors', 'recipe.yaml'}
    assert {file.name for file in path.parent.iterdir()} == names
    assert train(RECIPE, data_dir, tmp_path / 'run', progress=False) == path  # finished: nothing more to do
    assert _log(tmp_path / 'run') == rows


def test_the_average_is_kept(data_dir, tmp_path, monkeypatch):
    """And evaluated, where there is one."""
    evaluated = []

    def watching(model, *args, **kwargs):
        evaluated.append(model.head.fc.weight.clone())
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(module, 'evaluate', watching)
    path = train(dataclasses.replace(RECIPE, model_ema_decay=0.9), data_dir, tmp_path, progress=False)
    checkpoint, kept = torch.load(tmp_path / 'checkpoint.pt', weights_only=True), load_file(path)
    average, last = checkpoint['state_dict_ema'], checkpoint['state_dict']
    assert kept.keys() == average.keys() and all(torch.equal(kept[key], average[key]) for key in kept)
    assert not any(torch.equal(kept[key], last[key]) for key in ('head.fc.weight', 'stages.0.conv1.small.weight'))
    assert torch.equal(evaluated[-1], average['head.fc.weight'])


@pytest.mark.parametrize('name', ['smpconv_seq_speech', 'smpconv_seq_chartraj'])
def test_result_carries_its_statistics(data_dir, tmp_path, name):
    recipe = Recipe(name, epochs=1, val_percent=20, model_ema_decay=0.0, **SPEECH)
    path = train(recipe, data_dir, tmp_path, progress=False)
    task = TASKS[name]
    samples, held = split(task.load(data_dir, True), recipe, task)
    mean, std = channel_statistics(samples, task)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert model.pretrained_cfg['mean'] == pytest.approx(mean) and model.pretrained_cfg['std'] == pytest.approx(std)
    assert read_metadata(path)['mean'] == mean
    x = normalize(task.features(task.signal(samples.inputs, None, None), None, None), mean, std).double()
    dims = (0, 2)
    torch.testing.assert_close(x.mean(dims), torch.zeros(x.shape[1]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(x.std(dims), torch.ones(x.shape[1]).double(), rtol=0, atol=1e-3)
    accuracy = (evaluate(model, held, task, progress=False) == held.labels).float().mean().item()
    assert float(_log(tmp_path)[0]['val_accuracy']) == pytest.approx(accuracy, abs=1e-5)


def test_weights_alone_carry_the_statistics(data_dir, tmp_path):
    recipe = Recipe('smpconv_seq_chartraj', epochs=1, batch_size=16)
    path = train(recipe, data_dir, tmp_path, progress=False)
    cfg = load_model('smpconv_seq_chartraj', path).pretrained_cfg
    assert cfg['mean'] == pytest.approx([5] * 3, abs=0.2) and cfg['std'] == pytest.approx([2] * 3, abs=0.2)


def test_raw_speech(data_dir, tmp_path):
    """Raw audio is not normalised, and nothing need be held out."""
    kwargs = dict(kernel_size=50, radius=0.05, dim=4, depth=1)
    recipe = Recipe('smpconv_seq_speech_raw', epochs=1, **{**SPEECH, 'model_kwargs': kwargs}, val_percent=0)
    train(recipe, data_dir, tmp_path, progress=False)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['mean'] == [0.0]
    config = json.loads((tmp_path / 'config.json').read_text())
    config['pretrained_cfg']['mean'] = [0.5]
    (tmp_path / 'config.json').write_text(json.dumps(config))  # which has the last word
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['mean'] == [0.5]
    assert _log(tmp_path)[0]['val_accuracy'] == ''


def test_raw_speech_at_a_lower_rate(data_dir, tmp_path):
    """The result says which input it wants, is validated on it, and starts a run at a higher rate."""
    recipe = Recipe('smpconv_seq_speech_raw', epochs=1, val_percent=20, sample_rate=1000, **SPEECH)
    kwargs = dict(dim=4, depth=1)
    low = dataclasses.replace(recipe, model_kwargs=dict(kwargs, kernel_size=100, radius=0.02))
    path = train(low, data_dir, tmp_path / 'low', progress=False)
    model = timm.create_model(f'local-dir:{tmp_path / "low"}', pretrained=True)
    assert tuple(model.pretrained_cfg['input_size']) == (1, 1, 1000)
    task = TASKS[recipe.model]
    held = split(task.load(data_dir, True), recipe, task)[1]
    accuracy = (evaluate(model, held, task, progress=False) == held.labels).float().mean().item()
    assert float(_log(tmp_path / 'low')[0]['val_accuracy']) == pytest.approx(accuracy, abs=1e-5)

    high = dict(sample_rate=4000, lr=0.0, min_lr=0.0, model_ema_decay=0.0, initial_checkpoint=str(path))
    high['model_kwargs'] = dict(kwargs, kernel_size=400, radius=0.02, small_kernel_size=17)
    recipe = dataclasses.replace(recipe, **high)
    with pytest.raises(ValueError, match='set initial_sample_rate=1000'):
        train(recipe, data_dir, tmp_path / 'high', progress=False)
    recipe = dataclasses.replace(recipe, initial_sample_rate=1000)
    again = train(recipe, data_dir, tmp_path / 'higher', progress=False)
    before, after = load_file(path), load_file(again)
    for key, value in before.items():
        if 'kernel' in key:
            assert torch.equal(value, after[key])
        elif 'small.' in key:
            assert after[key].shape[2] == 17 and torch.equal(value, after[key][..., ::4])


def test_weights_at_four_times_the_rate():
    """Sequences of four times the steps in the same time come to similar features, and less so without the change."""
    torch.manual_seed(0)
    kwargs = dict(dim=8, depth=2, num_classes=0, global_pool='')
    low = timm.create_model('smpconv_seq_speech_raw', kernel_size=100, radius=0.1, small_kernel_size=2, **kwargs)
    high = timm.create_model('smpconv_seq_speech_raw', kernel_size=397, radius=0.1, small_kernel_size=5, **kwargs)
    time = torch.linspace(0, 1, 1997)
    x = sum(torch.sin(2 * torch.pi * (pitch * time + torch.rand(16, 1, 1))) for pitch in (5, 30, 60))
    x = x * torch.sin(torch.pi * time) ** 2
    wanted = low(x[..., ::4])  # in training mode: the norms adapt
    padded = {k: F.pad(v, (3, 0)) if k.endswith('small.weight') else v for k, v in low.state_dict().items()}
    errors = []
    for weights in (change_rate(low.state_dict(), high, 4.0), padded):
        high.load_state_dict(weights)
        errors.append(((high(x)[..., ::4] - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.25 and errors[0] < 0.7 * errors[1]


@given(taps=st.integers(1, 9), new=st.integers(1, 9), ratio=st.sampled_from([0.25, 1.0, 4.0]))
def test_small_kernels_at_another_rate(taps, new, ratio):
    """Same values at taps of the same age, those between on a straight line, zero beyond the first."""
    model = timm.create_model('smpconv_seq_mnist', dim=1, depth=1, small_kernel_size=new)
    key = 'stages.0.conv1.small.weight'
    old = torch.arange(1.0, taps + 1)  # the line that ends at the present, age 0, with the value `taps`
    found = change_rate({key: old.reshape(1, 1, -1), 'head.fc.bias': old}, model, ratio)
    for tap, value in enumerate(found[key].flatten().tolist()):
        age = (new - 1 - tap) / ratio
        inside, beyond = taps - age, max(taps - age, 0.0)  # old[0] is 1: from there it falls to 0 within a tap
        assert value == pytest.approx(inside if age <= taps - 1 else beyond)
    assert found['head.fc.bias'] is old


def test_lower_rate_is_the_same_sound():
    """Tones below half the rate stay as they are, at each sample that both rates have; those above vanish."""
    steps = torch.arange(16000, dtype=torch.float64) / 16000
    low, high = (torch.sin(2 * torch.pi * pitch * steps) * 32767 * 0.5 for pitch in (440, 3000))
    raw = torch.stack([low, low + high]).round().to(torch.int16)
    cfg = dict(input_size=(1, 1, 4000), mean=(0.0,), std=(1.0,))
    x = network_input(TASKS['smpconv_seq_speech_raw'], raw, cfg)
    assert x.shape == (2, 1, 4000)
    wanted = (low / 32768)[::4].float().expand(2, 1, -1)
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['smpconv_seq_mnist', 'smpconv_seq_speech'])
def test_start_from_the_bundled_weights(data_dir, tmp_path, name):
    """With a learning rate of 0 weights stay; the inputs are normalised as they were for these weights."""
    held = dict(val_images=5) if name == 'smpconv_seq_mnist' else dict(val_percent=20)
    recipe = Recipe(name, epochs=1, batch_size=8, lr=0.0, min_lr=0.0, pretrained=True, **held)
    path = train(recipe, data_dir, tmp_path / 'run', progress=False)
    model = timm.create_model(name, pretrained=True)
    found, wanted = load_file(path), model.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if 'norm' not in key)
    assert read_metadata(path)['mean'] == pytest.approx(list(model.pretrained_cfg['mean']))
    # the same from a file, which carries its statistics
    file = tmp_path / 'weights.safetensors'
    save_tensors(file, model.state_dict(), dict(mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std']))
    recipe = dataclasses.replace(recipe, pretrained=False, initial_checkpoint=str(file))
    assert _same(path, train(recipe, data_dir, tmp_path / 'file', progress=False))
    other = Recipe('smpconv_seq_chartraj', epochs=1, batch_size=8, initial_checkpoint=str(file))
    with pytest.raises(CheckpointError):
        train(other, data_dir, tmp_path / 'other', progress=False)


@pytest.mark.parametrize('fields', [dict(), dict(sample_rate=8000), dict(sample_rate=8000, initial_sample_rate=2000)])
def test_start_of_another_sample_rate(data_dir, tmp_path, fields):
    """Raw speech: what the file says of its rate must be what it is taken to be."""
    file = tmp_path / 'weights.safetensors'
    _save(file, 'smpconv_seq_speech_raw', dict(mean=[0.0], std=[1.0], input_size=[1, 1, 4000]), **RAW)
    recipe = Recipe('smpconv_seq_speech_raw', batch_size=8, model_kwargs=RAW, initial_checkpoint=str(file), **fields)
    assumed = fields.get('initial_sample_rate') or fields.get('sample_rate') or 16000
    message = f'weights.safetensors is of 4000 samples a second, .* of {assumed}: set initial_sample_rate=4000'
    with pytest.raises(ValueError, match=message):
        train(recipe, data_dir, tmp_path / 'run', progress=False)
    # of another network whose weights have the same shapes
    metadata = dict(architecture='smpconv_seq_mnist', mean=[0.0], std=[1.0], input_size=[1, 28, 28])
    _save(file, 'smpconv_seq_mnist', metadata, **RAW)
    with pytest.raises(CheckpointError, match='says that it is of smpconv_seq_mnist'):
        train(dataclasses.replace(recipe, initial_sample_rate=28), data_dir, tmp_path / 'run', progress=False)
    assert not (tmp_path / 'run').exists()


def test_the_authors_weights_at_another_rate(data_dir, tmp_path):
    """Their small kernels have other names, and are resampled all the same."""
    name = 'smpconv_seq_speech_raw'
    torch.save(reference_state(name), tmp_path / 'authors.pth')
    own = convert(tmp_path / 'authors.pth', name, install=True).installed
    results = []
    for file in (tmp_path / 'authors.pth', own):
        recipe = Recipe(
            name, epochs=1, batch_size=8, lr=0.0, min_lr=0.0, model_ema_decay=0.0, initial_checkpoint=str(file),
            sample_rate=1000, initial_sample_rate=16000, model_kwargs=dict(kernel_size=1000),
        )  # fmt: skip
        results.append(load_file(train(recipe, data_dir, tmp_path / file.stem, progress=False)))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0] if 'norm' not in key)
    before = load_file(own)
    assert not any(torch.equal(before[key], results[0][key]) for key in before if key.endswith('.small.weight'))


def test_pretrained_weights_have_one_sample_rate():
    with pytest.raises(ValueError, match='sample_rate=8000 is another: .*, with initial_sample_rate=16000'):
        Recipe('smpconv_seq_speech_raw', pretrained=True, sample_rate=8000)
    assert Recipe('smpconv_seq_speech_raw', pretrained=True, sample_rate=16000)


def test_start_from_weights_of_unknown_normalisation(data_dir, tmp_path, caplog):
    """They may be the authors', who normalise each time step: that is said once, and not of weights that tell."""
    name, file = 'smpconv_seq_chartraj', tmp_path / 'weights.safetensors'
    recipe = Recipe(name, epochs=1, initial_checkpoint=str(file), val_percent=20, **{**SPEECH, 'batch_size': 32})
    for metadata, warnings in (({}, 1), (dict(mean=[5.0] * 3, std=[2.0] * 3), 0)):
        _save(file, name, metadata, **SPEECH['model_kwargs'])
        caplog.clear()
        train(recipe, data_dir, tmp_path / str(warnings), progress=False)
        assert caplog.text.count('weights.safetensors does not say how its inputs were normalised') == warnings
    caplog.clear()
    train(dataclasses.replace(recipe, initial_checkpoint=''), data_dir, tmp_path / 'fresh', progress=False)
    assert 'normalised' not in caplog.text


def test_recordings_that_weights_have_heard(tmp_path):
    """Their contents tell whose voices they were trained on, wherever they lie; nothing is known of other files."""
    bundled = bundled_path('smpconv_seq_speech.sc')
    first, last = (speaker_number(training_speakers('smpconv_seq_speech.sc')[i]) for i in (0, -1))
    speakers = torch.tensor([first, 12345, last, first])
    samples = Samples(torch.zeros(4, 16000), torch.zeros(4).long(), speakers)
    copy, other = tmp_path / 'copy.pt', tmp_path / 'smpconv_seq_speech.sc.safetensors'
    shutil.copy(bundled, copy)
    data = bundled.read_bytes()
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    again = tmp_path / 'again.pth'
    torch.save(dict(state_dict=load_file(bundled)), again)
    half = tmp_path / 'half.safetensors'
    save_file({key: t.half() if t.is_floating_point() else t for key, t in load_file(bundled).items()}, half)
    for path in (bundled, copy, again, half):
        assert heard(samples, ancestors(path)).tolist() == [True, False, True, True]
    for path in (other, tmp_path / 'absent', bundled_path('smpconv_seq_mnist.smnist')):
        assert heard(samples, ancestors(path)).tolist() == [False] * 4
    assert heard(Samples(samples.inputs, samples.labels), ancestors(bundled)).tolist() == [False] * 4


@pytest.mark.parametrize('how', ['pretrained', 'initial_checkpoint', 'kd_model_name', 'fresh'])
def test_held_out_speakers_that_weights_have_heard(tmp_path, caplog, how):
    """The accuracy on them says nothing: a warning, whether the run begins with such weights or is taught by them."""
    file = write_speech(tmp_path / 'data', train=12) / 'speech_commands' / 'train.safetensors'
    known = [speaker_number(speaker) for speaker in training_speakers('smpconv_seq_speech.sc')]
    held = [number for number in known if number % 100 < 15][:2]
    tensors = load_file(file)
    tensors['speakers'] = torch.tensor([*held, 100, *[50] * 9])  # three are held out, of two of the speakers
    save_file(tensors, file)
    start = {
        'pretrained': dict(pretrained=True),
        'initial_checkpoint': dict(initial_checkpoint=str(bundled_path('smpconv_seq_speech.sc'))),
        'kd_model_name': dict(kd_model_name='smpconv_seq_speech', model_kwargs=dict(dim=4, depth=1)),
        'fresh': dict(model_kwargs=dict(dim=4, depth=1)),
    }[how]
    train(Recipe('smpconv_seq_speech', epochs=1, batch_size=8, **start), tmp_path / 'data', tmp_path, progress=False)
    assert caplog.text.count('2 of 3 held-out recordings are by speakers that') == (how != 'fresh')


def test_mixed_precision(data_dir, tmp_path):
    """Weights stay in single precision, and learn nearly the same, far from where the loss is that of guessing."""
    changes, _, loss = _one_step(tmp_path, data_dir, 'plain')
    rounded, _, other = _one_step(tmp_path, data_dir, 'amp', amp=True)
    assert abs(loss - math.log(10)) > 0.5 and 0 < abs(other - loss) < 0.02 * loss
    assert {value.dtype for value in load_file(tmp_path / 'amp' / 'model.safetensors').values()} == {
        value.dtype for value in load_file(tmp_path / 'plain' / 'model.safetensors').values()
    }
    errors = {key: rounded[key] - changes[key] for key in changes}
    assert 0 < _norm(errors) < 0.5 * _norm(changes)  # rounding adds up from the last layers to the first
    assert 0 < errors['head.fc.weight'].norm() < 0.02 * changes['head.fc.weight'].norm()


@pytest.mark.parametrize('mixup', [0.0, 0.4])
def test_teacher(data_dir, tmp_path, monkeypatch, mixup):
    """Raw waves are learned with the probabilities that the MFCC network has for the very same waves."""
    kwargs = dict(kernel_size=50, radius=0.05, dim=4, depth=1)
    recipe = Recipe(
        'smpconv_seq_speech_raw', epochs=1, batch_size=8, time_shift=0.1, noise=0.01, mixup=mixup, smoothing=0.1
    )
    recipe = dataclasses.replace(recipe, kd_model_name='smpconv_seq_speech', task_loss_weight=0.25, model_kwargs=kwargs)
    steps, mixes = [], []
    step, mix = module._Run.train_step, module._mix
    monkeypatch.setattr(module._Run, 'train_step', lambda run, *batch: steps.append(batch) or step(run, *batch))
    monkeypatch.setattr(module, '_mix', lambda *batch: mixes.append((batch[:2], mix(*batch))) or mixes[-1][1])
    path = train(recipe, data_dir, tmp_path / 'run', progress=False)
    assert _same(path, train(recipe, data_dir, tmp_path / 'again', progress=False))

    teacher = timm.create_model('smpconv_seq_speech', pretrained=True).eval()
    cfg = teacher.pretrained_cfg
    assert len(steps) > 0 and len(mixes) == (len(steps) if mixup else 0)
    for i, (x, target, labels) in enumerate(steps):
        if mixup:  # what is mixed is what is learned from each, labels and lesson, and nothing comes after it
            (before, target_before), (mixed, mixed_target) = mixes[i]
            assert torch.equal(x, mixed) and torch.equal(target, mixed_target) and not torch.equal(x, before)
            x, target = before, target_before
        assert x.shape == (8, 1, 16000) and target.shape == (8, 10)
        with torch.no_grad():
            lesson = teacher(normalize(MFCC()(x[:, 0]), cfg['mean'], cfg['std'])).softmax(1)
        wanted = 0.25 * F.one_hot(labels, 10) + 0.75 * lesson
        torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-5)


def test_teachers_lesson_is_learned(tmp_path):
    """Without a share for the labels, the student of a teacher that tells the recordings apart agrees with it."""
    data = write_speech(tmp_path / 'data', train=120, test=40)
    recipe = Recipe('smpconv_seq_speech', epochs=8, **{**SPEECH, 'lr': 1e-2}, model_ema_decay=0.0)
    train(recipe, data, tmp_path / 'teacher', progress=False)
    recipe = dataclasses.replace(
        recipe, kd_model_name=f'local-dir:{tmp_path / "teacher"}', task_loss_weight=0.0, smoothing=0.0
    )
    student = train(recipe, data, tmp_path / 'student', progress=False).parent
    samples, task = load_speech(data, True), TASKS[recipe.model]
    first, second = (
        evaluate(timm.create_model(f'local-dir:{folder}', pretrained=True), samples, task, progress=False)
        for folder in (tmp_path / 'teacher', student)
    )
    assert (first == second).float().mean() > 0.5


def test_it_learns(tmp_path):
    """Tones that differ in pitch are told apart within seconds."""
    data = write_speech(tmp_path / 'data', train=120, test=40)
    recipe = Recipe('smpconv_seq_speech', epochs=8, **{**SPEECH, 'lr': 1e-2}, model_ema_decay=0.0)
    train(recipe, data, tmp_path / 'run', progress=False)
    assert float(_log(tmp_path / 'run')[-1]['train_accuracy']) > 0.5


def test_arguments_of_the_optimizer(data_dir, tmp_path):
    """Those of Muon reach it, here one that keeps coordinates where they are; the recipe in the folder has them."""
    recipe = dataclasses.replace(
        RECIPE, opt='nmuon', opt_kwargs=dict(fallback_no_weight_decay=True, fallback_lr_scale=0.0), model_ema_decay=0.0
    )
    torch.manual_seed(recipe.seed)
    fresh = timm.create_model(recipe.model, **recipe.model_kwargs).state_dict()
    trained = load_file(train(recipe, data_dir, tmp_path, progress=False))
    moved = {key for key in trained if not torch.equal(trained[key], fresh[key])}
    assert {key for key in moved if key.endswith('large.kernel.weights')} and 'head.fc.weight' in moved
    assert not {key for key in moved if key.endswith(('coords', 'radius_offset', 'head.fc.bias'))}
    assert Recipe(**read_recipe(tmp_path / 'recipe.yaml')) == recipe


def test_limit_of_the_gradient(data_dir, tmp_path):
    """With a learning rate of one, a step is as long as the gradient; the radii learn at a tenth of it."""
    changes, *_ = _one_step(tmp_path, data_dir, 'clipped', clip_grad=1e-3)
    free, *_ = _one_step(tmp_path, data_dir, 'free')
    assert 0.5e-3 < _norm(changes) < 1.001e-3 < 0.1 * _norm(free)


def test_weight_decay(data_dir, tmp_path):
    """Everything but points, biases and norms shrinks by it."""
    decayed, before, _ = _one_step(tmp_path, data_dir, 'decayed', lr=0.1, weight_decay=0.5)
    changes, *_ = _one_step(tmp_path, data_dir, 'plain', lr=0.1)
    for key, value in before.items():
        kept = value.ndim < 2 or key.endswith(('coords', 'radius_offset'))
        wanted = torch.zeros_like(value) if kept else -0.05 * value
        torch.testing.assert_close(decayed[key] - changes[key], wanted, rtol=1e-3, atol=1e-5)


def test_label_smoothing(data_dir, tmp_path):
    samples = split(load_mnist(data_dir, True), RECIPE, TASKS[RECIPE.model])[0]
    losses = []
    for smoothing in (0.0, 0.5):
        _, _, loss = _one_step(tmp_path, data_dir, str(smoothing), smoothing=smoothing)
        model = timm.create_model(RECIPE.model, **RECIPE.model_kwargs)
        model.load_state_dict(load_file(tmp_path / 'start.safetensors'))
        logits = model.train()(network_input(TASKS[RECIPE.model], samples.inputs, model.pretrained_cfg))
        losses.append(F.cross_entropy(logits, samples.labels, label_smoothing=smoothing).item())
        assert loss == pytest.approx(losses[-1], rel=1e-3)
    assert abs(losses[1] - losses[0]) > 0.01 * losses[0]


def _first_step(monkeypatch, recipe, data_dir, output):
    """The run and the inputs of its first step, which is not taken."""

    class Stop(Exception):
        pass

    def stop(run, x, *_):
        seen.extend((run, x))
        raise Stop

    seen = []
    monkeypatch.setattr(module._Run, 'train_step', stop)
    with pytest.raises(Stop):
        train(recipe, data_dir, output, progress=False)
    return seen


def test_dropout_of_the_recipe(data_dir, tmp_path, monkeypatch):
    rates = dict(drop=0.2, drop_path=0.3, input_drop_rate=0.4)
    run, _ = _first_step(monkeypatch, dataclasses.replace(RECIPE, **rates), data_dir, tmp_path)
    assert run.model.training and run.model.stem.drop.p == 0.4
    assert [block.drop.p for block in run.model.stages] == [0.2, 0.2]
    assert run.model.stages[-1].drop_path.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize(
    'name,plain,fields',
    [
        ('smpconv_seq_mnist', dict(val_images=5, augment=False), dict(augment=True)),
        ('smpconv_seq_speech', {}, dict(noise=0.1)),
        ('smpconv_seq_speech', {}, dict(time_mask=20)),
        ('smpconv_seq_speech_raw', {}, dict(gain=6.0)),
    ],
)
def test_training_sees_augmented_samples(data_dir, tmp_path, monkeypatch, name, plain, fields):
    kwargs = RAW if name == 'smpconv_seq_speech_raw' else dict(dim=4, depth=1)
    recipe = Recipe(name, batch_size=20, model_kwargs=kwargs, **plain)
    run, x = _first_step(monkeypatch, recipe, data_dir, tmp_path / 'plain')
    task = TASKS[name]
    inputs = network_input(task, split(task.load(data_dir, True), recipe, task)[0].inputs, run.model.pretrained_cfg)
    distances = (x.flatten(1).unsqueeze(1) - inputs.flatten(1)).norm(dim=2)
    assert distances.min(1).values.max() < 1e-3 < distances.median()  # each is one of the samples
    _, augmented = _first_step(monkeypatch, dataclasses.replace(recipe, **fields), data_dir, tmp_path / 'augmented')
    assert x.shape == augmented.shape and ((x - augmented).flatten(1).norm(dim=1) > 1e-2).float().mean() > 0.5


def test_the_same_recipe_in_other_words():
    """As Python writes it and as YAML gives it back."""
    one = Recipe(clip_grad=1, mixup=0, opt_kwargs=dict(betas=(0.9, 0.98)), model_kwargs=dict(dim=6, depth=2))
    other = Recipe(clip_grad=1.0, opt_kwargs=dict(betas=[0.9, 0.98]), model_kwargs=dict(depth=2, dim=6))
    assert same_recipe(one, other) and not same_recipe(one, dataclasses.replace(one, clip_grad=2))


@pytest.mark.parametrize('prefix', [False, True])
def test_schedule(prefix, data_dir, tmp_path, monkeypatch):
    """A linear warm-up, then the cosine: whole after it, as the authors have it, or without its first epochs."""
    rates, step = [], module._Run.train_step

    def watching(self, *args):
        step(self, *args)
        rates.append(self.optimizer.param_groups[0]['lr'])

    monkeypatch.setattr(module._Run, 'train_step', watching)
    recipe = dataclasses.replace(RECIPE, epochs=5, warmup_epochs=2, warmup_prefix=prefix, lr=1e-2, min_lr=1e-3)
    train(recipe, data_dir, tmp_path, progress=False)
    steps, warm = len(rates), 2 * len(rates) // 5
    assert rates[:warm] == pytest.approx([1e-3 + 9e-3 * i / warm for i in range(warm)])
    first, length = (warm, steps - warm) if prefix else (0, steps)
    cosine = [1e-3 + 4.5e-3 * (1 + math.cos(math.pi * (i - first) / length)) for i in range(warm, steps)]
    assert rates[warm:] == pytest.approx(cosine)


def test_other_recipe_in_the_same_folder(data_dir, tmp_path):
    one = dataclasses.replace(RECIPE, epochs=1)
    train(one, data_dir, tmp_path, progress=False)
    with pytest.raises(ValueError, match='another recipe'):
        train(dataclasses.replace(one, lr=1e-2), data_dir, tmp_path, progress=False)
    (tmp_path / 'checkpoint.pt').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='Cannot continue from .*it is damaged.*: delete it to start over'):
        train(one, data_dir, tmp_path, progress=False)
    (tmp_path / 'recipe.yaml').unlink()
    with pytest.raises(ValueError, match='without its recipe.yaml'):
        train(one, data_dir, tmp_path, progress=False)


def test_two_recipes_at_once_in_one_folder(data_dir, tmp_path, monkeypatch):
    """That which saves later stops; a checkpoint knows whose it is."""
    one, other = (dataclasses.replace(RECIPE, epochs=1, seed=seed) for seed in (0, 1))
    begin = module._try_out

    def meanwhile(*args):
        monkeypatch.setattr(module, '_try_out', begin)
        train(other, data_dir, tmp_path, progress=False)
        begin(*args)

    monkeypatch.setattr(module, '_try_out', meanwhile)
    with pytest.raises(ValueError, match='another recipe'):
        train(one, data_dir, tmp_path, progress=False)
    assert read_recipe(tmp_path / 'recipe.yaml')['seed'] == 1
    kept = (tmp_path / 'checkpoint.pt').read_bytes()
    write_text(tmp_path / 'recipe.yaml', recipe_text(one))
    with pytest.raises(ValueError, match='it is of another recipe'):
        train(one, data_dir, tmp_path, progress=False)
    assert (tmp_path / 'checkpoint.pt').read_bytes() == kept


def test_recipe_in_other_words(data_dir, tmp_path):
    """Is the same one: a run continues."""
    one = dataclasses.replace(
        RECIPE, epochs=1, drop=0.0, model_kwargs=dict(RECIPE.model_kwargs, num_points=5, radius=0.1)
    )
    path = train(one, data_dir, tmp_path, progress=False)
    kept = path.read_bytes()
    other = dataclasses.replace(one, drop=0, model_kwargs=dict(reversed(one.model_kwargs.items())))
    assert train(other, data_dir, tmp_path, progress=False).read_bytes() == kept


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(model='smpconv_cifar'), r"timm's own train.py trains smpconv_cifar: recipes/smpconv_cifar.yaml"),
        (dict(noise=0.1), 'noise=0.1 has no effect on smpconv_seq_mnist, which knows augment, erase_size, val_images'),
        (dict(model='smpconv_seq_speech_raw', freq_mask=3), 'freq_mask=3 has no effect'),
        (dict(sample_rate=4000), 'sample_rate=4000 has no effect'),
        (dict(val_percent=0), 'val_percent=0 has no effect'),
        (dict(model='smpconv_seq_speech', augment=False), 'augment=False has no effect'),
        (dict(val_images=22), 'Of 25 training samples 22 are held out'),
        (dict(model_kwargs=dict(colour=1)), r"model_kwargs=\{'colour': 1\} cannot work: .*colour"),
        (dict(model_kwargs=dict(drop_rate=0.1)), 'cannot work: .*drop_rate'),
        (dict(pretrained=True), r"model_kwargs=\{'dim': 6, 'depth': 2\} cannot work: .*"),
        (dict(model_kwargs=dict(depth=0)), 'depth and dim must be positive'),
        (dict(model_kwargs=dict(num_classes=5)), 'give 5 classes, the data have 10'),
        (dict(model_kwargs=dict(in_chans=2)), 'do not fit the data: .*expects 2 input channels'),
        (dict(opt='adahessian'), 'second derivatives'),
        (dict(opt='hope'), 'Optimizer hope not found'),
        (dict(kd_model_name='hope'), "kd_model_name='hope' cannot teach: Unknown model"),
        (
            dict(kd_model_name='smpconv_seq_speech'),
            "'smpconv_seq_speech' is of other data than smpconv_seq_mnist, which smpconv_seq_mnist, smpconv_seq_pmnist",
        ),
        (dict(kd_model_name='smpconv_cifar'), "'smpconv_cifar' is of other data"),
        (
            dict(kd_model_name='smpconv_seq_mnist', model_kwargs=dict(num_classes=11)),
            "'smpconv_seq_mnist' tells 10 classes apart, smpconv_seq_mnist 11",
        ),
        (dict(opt_kwargs=dict(betas=[0.9])), r"opt='adam', opt_kwargs=\{'betas': \[0.9\]\} cannot work"),
        (dict(model_kwargs=dict(features_only=True)), r"model_kwargs=\{'features_only': True\} make something else"),
        (dict(opt_kwargs=dict(colour=1)), r"opt='adam', opt_kwargs=\{'colour': 1\} cannot work: .*colour"),
    ],
)
def test_wrong_recipes(data_dir, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(RECIPE, **fields), data_dir, tmp_path / 'run', progress=False)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', list(TASKS))
def test_wrong_data_folder(tmp_path, name):
    """Nothing is begun where there are no data."""
    with pytest.raises(FileNotFoundError, match='timm-smpconv data'):
        train(Recipe(name), tmp_path, tmp_path / 'run', progress=False)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'fields, words',
    [
        (dict(opt_kwargs=dict(capturable=True)), "opt='adam', .*capturable.* cannot work"),
        (dict(opt='nmuon', opt_kwargs=dict(ns_steps='x')), "opt='nmuon', .* cannot work"),
        (dict(opt='fusedadam'), "opt='fusedadam', .* cannot work"),
        (dict(opt='adamw', opt_kwargs=dict(betas=dict(a=1))), "opt='adamw', .* cannot work"),
        (dict(weight_decay=1e308), 'weight_decay=1e[+]308, .* cannot work'),
    ],
)
def test_first_steps_that_fail(data_dir, tmp_path, fields, words):
    """The message names what may be wrong, and the folder is free for a recipe that works."""
    with pytest.raises(ValueError, match=words):
        train(dataclasses.replace(RECIPE, **fields), data_dir, tmp_path, progress=False)
    assert train(dataclasses.replace(RECIPE, epochs=1), data_dir, tmp_path, progress=False).is_file()


def test_output_that_is_a_file(data_dir, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='file is a file: expected a folder'):
        train(RECIPE, data_dir, tmp_path / 'file', progress=False)


@pytest.mark.parametrize('fields', [{}, dict(batch_size=20, val_images=5)])
def test_loss_that_explodes(data_dir, tmp_path, fields):
    """In a step, or only seen by the held-out samples."""
    recipe = dataclasses.replace(RECIPE, lr=1e30, opt='sgd', warmup_epochs=0, **fields)
    with pytest.raises(FloatingPointError, match='lower lr'):
        train(recipe, data_dir, tmp_path, progress=False)


# recipes


def test_recipe_file(tmp_path):
    path = tmp_path / 'recipe.yaml'
    recipe = Recipe('smpconv_seq_speech', lr=1e-5, model_kwargs=dict(dim=4))
    path.write_text(recipe_text(recipe))
    assert Recipe(**read_recipe(path)) == recipe
    path.write_text('{"epochs": 5, "lr": 1, "augment": false}')
    assert read_recipe(path) == dict(epochs=5, lr=1.0, augment=False)
    path.write_text('lr: 1e-3  # text to YAML\n')
    assert read_recipe(path) == dict(lr=1e-3)


@pytest.mark.parametrize('field', ['epochs', 'batch_size', 'speed', 'val_percent', 'model_ema_decay'])
def test_fields_out_of_range(field):
    with pytest.raises(ValueError, match=f'{field} must be .*got -1'):
        Recipe(**{field: -1})


# parts


def test_split_by_speaker(data_dir):
    task = TASKS['smpconv_seq_speech']
    samples = load_speech(data_dir, True)
    part, held = split(samples, Recipe('smpconv_seq_speech', batch_size=1), task)
    assert len(part) + len(held) == 30 and len(held) > 0
    assert not set(part.speakers.tolist()) & set(held.speakers.tolist()) and (held.speakers % 100 < 15).all()
    part, held = split(samples, Recipe('smpconv_seq_speech', batch_size=1, val_percent=0), task)
    assert (len(part), len(held)) == (30, 0)


def test_split_of_others(data_dir):
    task = TASKS['smpconv_seq_chartraj']
    samples = task.load(data_dir, True)
    parts = [split(samples, Recipe(batch_size=1, val_percent=25), task) for _ in range(2)]
    assert [len(part) for part in parts[0]] == [30, 10] and torch.equal(parts[0][1].inputs, parts[1][1].inputs)
    digits = load_mnist(data_dir, True)
    part, held = split(digits, RECIPE, TASKS['smpconv_seq_mnist'])  # the last ones, of any data set
    for found, wanted in ((part, digits[:20]), (held, digits[-5:])):
        assert torch.equal(found.inputs, wanted.inputs) and torch.equal(found.labels, wanted.labels)


def test_augment_digits():
    images = torch.zeros(400, 1, 28, 28)
    images[:, :, 8:20, 8:20] = 1.0
    augmented = augment_digits(images, torch.Generator().manual_seed(0))
    again = augment_digits(images, torch.Generator().manual_seed(0))
    assert torch.equal(augmented, again)
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1 + 1e-6
    unchanged = (augmented == images).flatten(1).all(1).float().mean().item()
    # four operations with probability 1/2, and an erased patch may miss the digit
    assert 1 / 16 - 0.05 < unchanged < 1 / 16 + 0.12
    # the centre of mass moves by at most 2 pixels and what rotation and erasing add
    rows = (augmented.sum((1, 3)) * torch.arange(28)).sum(1) / augmented.sum((1, 2, 3))
    assert (rows - 13.5).abs().max() < 4 and (rows - 13.5).abs().mean() > 0.2


def _generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize('name', ['smpconv_seq_mnist', 'smpconv_seq_pmnist'])
def test_digits_of_a_task(name):
    """What a recipe says of augmentation reaches them."""
    raw = torch.randint(1, 256, (400, 1, 28, 28), dtype=torch.uint8, generator=_generator())
    signal = TASKS[name].signal
    for recipe in (None, Recipe(name, augment=False)):
        assert torch.equal(signal(raw, recipe, _generator()), raw / 255)
    empty = {}
    for size in (4, 28):
        images = signal(raw, Recipe(name, erase_size=size), _generator()).flatten(1)
        empty[size] = (images == 0).all(1).float().mean().item()
        assert (images != raw.flatten(1) / 255).any(1).float().mean() > 0.8
    assert empty[4] == 0 and 0.4 < empty[28] < 0.6


@pytest.mark.parametrize('name', ['smpconv_seq_speech', 'smpconv_seq_speech_raw'])
def test_waves_of_a_task(name):
    raw = torch.randint(-3000, 3000, (4, 16000), dtype=torch.int16, generator=_generator())
    signal = TASKS[name].signal
    for recipe in (None, Recipe(name)):
        assert torch.equal(signal(raw, recipe, _generator()), raw / 32768)
    for fields in (dict(time_shift=0.1), dict(speed=0.1), dict(gain=6.0), dict(noise=0.1)):
        changed = signal(raw, Recipe(name, **fields), _generator()) != raw / 32768
        assert changed.any(1).all(), fields


def test_spectrograms_of_a_task():
    waves = 0.1 * torch.randn(4, 16000, generator=_generator())
    features = TASKS['smpconv_seq_speech'].features
    plain = features(waves, None, None)
    assert torch.equal(features(waves, Recipe(), _generator()), plain)
    for fields in (dict(time_mask=20), dict(freq_mask=8)):
        changed = (features(waves, Recipe(**fields), _generator()) - plain).abs() > 1e-3
        assert changed.any() and not changed.all(), fields


@pytest.mark.parametrize('size', [0, 4, 11, 28])
def test_erased_squares(size):
    """Of half of the images, at any place."""
    images = torch.ones(400, 1, 28, 28)
    augmented = augment_digits(images, torch.Generator().manual_seed(0), size)
    lost = (augment_digits(images, torch.Generator().manual_seed(0), 0) - augmented)[:, 0] > 0.5
    count = lost.flatten(1).sum(1)
    assert count.max() == size**2 and (size == 0 or 0.35 < (count > 0).float().mean() < 0.65)
    assert lost[:, 14:, 14:].any() == lost[:, :14, :14].any() == (size > 0)


def _augmented(waves, **fields):
    return augment_waves(waves, Recipe(**fields), torch.Generator().manual_seed(0))


def test_augment_waves():
    assert torch.equal(_augmented(torch.ones(3, 50)), torch.ones(3, 50))
    # a shift is a shift: whole samples, silence moves in
    waves = torch.zeros(200, 16000)
    waves[:, 8000] = 1.0
    shifted = _augmented(waves, time_shift=0.1)
    assert torch.equal(shifted.sum(1), torch.ones(200)) and shifted.max() == 1
    places = shifted.argmax(1) - 8000
    assert places.abs().max() <= 1600 and places.min() < -1300 and places.max() > 1300
    ones = _augmented(torch.ones(200, 16000), time_shift=0.1)
    assert set(ones.unique().tolist()) == {0.0, 1.0} and ((ones == 0).sum(1) == places.abs()).all()
    # faster: the two ends come nearer
    waves = torch.zeros(100, 16000)
    waves[:, 4000:12000] = 1.0
    durations = _augmented(waves, speed=0.2).sum(1)
    assert durations.min() > 8000 / 1.2 - 2 and durations.max() < 8000 / 0.8 + 2
    assert durations.min() < 7000 and durations.max() > 9500
    factors = _augmented(torch.ones(500, 2), gain=6.0)[:, 0]
    assert 10 ** (-6 / 20) <= factors.min() < 0.55 and 1.9 < factors.max() <= 10 ** (6 / 20)
    noise = _augmented(torch.zeros(200, 4000), noise=0.1).std(1)
    assert 0 < noise.min() < 0.01 and 0.09 < noise.max() < 0.105


def test_mask_spectrogram():
    spectrogram = torch.randn(300, 64, 161, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(time_mask=25, freq_mask=8)
    masked = mask_spectrogram(spectrogram, recipe, torch.Generator().manual_seed(0))
    changed = masked != spectrogram
    frames, bands = changed.all(1).sum(1), changed.all(2).sum(1)
    assert frames.max() <= 25 and frames.max() >= 22 and bands.max() <= 8 and bands.max() >= 7
    assert (changed.flatten(1).sum(1) == frames * 64 + bands * 161 - frames * bands).all()
    assert masked[changed].abs().max() < 0.1  # the mean
    assert torch.equal(mask_spectrogram(spectrogram, Recipe(), torch.Generator()), spectrogram)
    # the first and the last are as likely as each other, and all in the middle
    hidden = changed.all(2).float().mean(0)
    assert hidden[0] > 0 and hidden[-1] > 0 and hidden[8:-8].std() < 0.03
    whole = mask_spectrogram(spectrogram, Recipe(time_mask=500), torch.Generator().manual_seed(0))
    assert (whole != spectrogram).all(1).sum(1).max() == 161


def test_mix():
    x, labels = torch.arange(4.0).reshape(4, 1, 1), torch.tensor([0, 1, 2, 3])
    mixed, target = _mix(x, F.one_hot(labels, 4).float(), np.random.default_rng(0), 0.4)
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    assert torch.equal(target.argmax(1), labels)
    torch.testing.assert_close(mixed.flatten(), target @ torch.arange(4.0))


def test_seeds_differ():
    assert len({_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_evaluate(data_dir):
    samples = load_mnist(data_dir, train=False)
    model = timm.create_model('smpconv_seq_mnist')
    predictions = evaluate(model, samples, TASKS['smpconv_seq_mnist'], batch_size=3, progress=False)
    x = (samples.inputs.float() / 255 - 0.1307) / 0.3081
    with torch.no_grad():
        assert torch.equal(predictions, model.eval()(x).argmax(1))


# options of timm's train.py, which takes any other field of a recipe without a word
TRAIN_PY = (
    'aa', 'batch_size', 'color_jitter', 'cutmix', 'drop', 'drop_path', 'epochs', 'grad_accum_steps', 'hflip',
    'input_size', 'lr', 'min_lr', 'mixup', 'model', 'model_ema', 'model_ema_decay', 'opt', 'ratio', 'reprob', 'scale',
    'sched', 'sched_on_updates', 'smoothing', 'train_interpolation', 'val_split', 'warmup_epochs', 'warmup_lr',
    'weight_decay',
)  # fmt: skip


def test_recipes_of_this_repository():
    """The recipe of each model names it, and its head holds the command."""
    folder = Path(__file__).resolve().parents[1] / 'recipes'
    names = [path.stem for path in folder.glob('*.yaml')]
    assert sorted(names) == model_names()
    for name in names:
        path = folder / f'{name}.yaml'
        text = path.read_text()
        head = ' '.join(line.lstrip('# ').rstrip('\\') for line in text.splitlines() if line.startswith('#'))
        fields = yaml.safe_load(text)
        assert fields['model'] == name
        if name in TASKS:
            assert f'timm-smpconv train --config recipes/{name}.yaml --data data --output' in head
            Recipe(**read_recipe(path))
        else:
            assert f'train.py --config recipes/{name}.yaml --device-modules timm_smpconv --data-dir' in head
            total = fields['batch_size'] * fields.get('grad_accum_steps', 1) * 8
            assert fields['sched'] == 'cosine' and total in (4096, 2048, 512)
            assert not set(fields) - set(TRAIN_PY)
    shipped = list((folder / 'shipped').glob('*.yaml'))
    assert {'.'.join(path.name.split('.')[:2]) for path in shipped} == {k for k, w in WEIGHTS.items() if w.bundled}
    for path in shipped:
        model = yaml.safe_load(path.read_text())['model']
        assert path.stem.startswith(model + '.') and path.with_suffix('.csv').is_file()
        assert f'--config recipes/shipped/{path.name}' in path.read_text()
        if model in TASKS:
            Recipe(**read_recipe(path))


def test_slow_steps_are_saved_by_the_clock(data_dir, tmp_path, monkeypatch):
    saved = []
    save = module._Run.save
    monkeypatch.setattr(module._Run, 'save', lambda run: (saved.append(run.step), save(run)))
    monkeypatch.setattr(module, '_RECOVERY_SECONDS', 0)
    train(dataclasses.replace(RECIPE, epochs=1), data_dir, tmp_path / 'a', progress=False)
    assert saved == [1, 2, 3, 4, 5]
    saved.clear()
    train(dataclasses.replace(RECIPE, epochs=1), data_dir, tmp_path / 'b', progress=False, recovery_interval=0)
    assert saved == [5]


@pytest.mark.parametrize(
    'fields',
    [
        dict(opt_kwargs=dict(eps=1e-8)),
        dict(model_kwargs=dict(radius=2e-5, depth=1)),
        dict(initial_checkpoint='12e3', opt_kwargs=dict(name='1e5')),
        {},
    ],
)
def test_recipes_are_read_as_they_were_written(fields, tmp_path):
    fields = {'initial_checkpoint': "a: b'#.pt", **fields}
    recipe = dataclasses.replace(RECIPE, lr=1e-7, min_lr=1e-8, **fields)
    (tmp_path / 'recipe.yaml').write_text(recipe_text(recipe))
    assert Recipe(**read_recipe(tmp_path / 'recipe.yaml')) == recipe
    assert yaml.safe_load(recipe_text(recipe)) == dataclasses.asdict(recipe)


def test_numbers_without_a_point(tmp_path):
    text = 'lr: 1e-3\nepochs: 3\nopt_kwargs: {eps: 1e-8, betas: [.5, 1E-2]}\nmodel_kwargs: {"radius": 2e+0}\n'
    (tmp_path / 'a.yaml').write_text(text)
    fields = read_recipe(tmp_path / 'a.yaml')
    assert fields == dict(
        lr=1e-3, epochs=3, opt_kwargs=dict(eps=1e-8, betas=[0.5, 0.01]), model_kwargs=dict(radius=2.0)
    )


@pytest.mark.parametrize(
    'fields',
    [
        dict(clip_grad=-1.0), dict(smoothing=2.0), dict(mixup=-1.0), dict(lr=float('inf')), dict(noise=float('nan')),
        dict(weight_decay=float('nan')), dict(gain=1000.0), dict(time_shift=float('nan')), dict(drop_path=-0.5),
        dict(time_mask=-5), dict(min_lr=5.0), dict(seed=2**64), dict(task_loss_weight=1.5),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f'{name} must be'):
        Recipe(**fields)


def test_options_without_effect():
    for fields, words in ((dict(time_mask=10, masks=0), 'masks=0 leaves nothing'), (dict(masks=2), 'one of these too')):
        with pytest.raises(ValueError, match=words):
            Recipe('smpconv_seq_speech', **fields)
    with pytest.raises(ValueError, match='leaves nothing to learn from kd_model_name'):
        Recipe(kd_model_name='smpconv_seq_mnist', task_loss_weight=1.0)


def test_share_of_the_labels_without_a_teacher():
    with pytest.raises(ValueError, match='beside kd_model_name: give that too'):
        Recipe(task_loss_weight=0.3)


def test_every_field_is_described():
    assert set(field_texts()) == {field.name for field in dataclasses.fields(Recipe)}
    assert field_texts()['clip_grad'] == 'Largest norm of the gradient, 0 for no limit.'
    assert field_texts()['sample_rate'].endswith('of `model_kwargs` have to fit.')


def test_a_teacher_of_unknown_normalisation(data_dir, tmp_path, caplog):
    """Its lessons may be nonsense, if it is the authors'."""
    name, kwargs = 'smpconv_seq_speech', dict(dim=4, depth=1)
    torch.save(timm.create_model(name, **kwargs).state_dict(), tmp_path / 'a.pth')
    folder = convert(tmp_path / 'a.pth', name, tmp_path / 'teacher', model_kwargs=kwargs).folder
    caplog.clear()
    recipe = Recipe(name, epochs=1, batch_size=8, model_kwargs=kwargs, kd_model_name=f'local-dir:{folder}')
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    assert 'does not say how its inputs were normalised' in caplog.text


def test_another_teacher_in_the_same_run(data_dir, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1, kd_model_name=f'local-dir:{tmp_path / "teacher"}')
    train(dataclasses.replace(RECIPE, epochs=1), data_dir, tmp_path / 'teacher', progress=False)
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    file = tmp_path / 'teacher' / 'model.safetensors'
    tensors = load_file(file)
    save_file({**tensors, 'head.fc.bias': tensors['head.fc.bias'] + 1}, file)
    with pytest.raises(ValueError, match='teacher has other weights; delete it to start over'):
        train(recipe, data_dir, tmp_path / 'run', progress=False)


def test_other_data_in_the_same_run(data_dir, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    other = write_mnist(tmp_path / 'other')
    path = other / 'MNIST' / 'raw' / 'train-images-idx3-ubyte'
    data = bytearray(path.read_bytes())
    data[20] ^= 1  # of the first image
    path.write_bytes(data)
    held = write_mnist(tmp_path / 'more', train=26)
    for folder in (held, other):
        with pytest.raises(ValueError, match='other data'):
            train(dataclasses.replace(recipe, val_images=5), folder, tmp_path / 'run', progress=False)


@pytest.mark.parametrize('device', ['meta', 'nowhere', 'cuda:77'])
def test_devices_that_cannot_be_used(device, data_dir, tmp_path):
    with pytest.raises(ValueError, match=f'device .*{device}'):
        train(RECIPE, data_dir, tmp_path / 'run', progress=False, device=device)
    with pytest.raises(ValueError, match=f'device .*{device}'):
        validate('smpconv_seq_mnist', data_dir, progress=False, device=device)
    with pytest.raises(ValueError, match='recovery_interval'):
        train(RECIPE, data_dir, tmp_path / 'run', progress=False, recovery_interval=-5)
    assert not (tmp_path / 'run').exists()


def test_a_full_disk(data_dir, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError('unexpected pos 64 vs 0')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='Cannot write .*checkpoint.pt'):
        train(RECIPE, data_dir, tmp_path, progress=False)


def test_every_form_of_the_weights_carries_the_statistics(data_dir, tmp_path):
    """Checkpoint, weights, what is converted and what is installed: all are used to the same inputs."""
    name = 'smpconv_seq_chartraj'
    recipe = Recipe(model=name, epochs=1, **{**SPEECH, 'model_kwargs': {}})
    path = train(recipe, data_dir, tmp_path / 'run', progress=False)
    mean = tuple(read_metadata(path)['mean'])
    assert mean[0] == pytest.approx(5, abs=0.5)
    checkpoint = tmp_path / 'run' / 'checkpoint.pt'
    folder = convert(checkpoint, name, tmp_path / 'folder', install=True, deployed=True).folder
    shutil.copy(path, tmp_path / 'weights.pt')  # contents decide
    shutil.copy(tmp_path / 'run' / 'checkpoint.pt', tmp_path / 'checkpoint.pt')
    for file in (path, tmp_path / 'checkpoint.pt', folder / 'model.safetensors', folder / 'deployed.safetensors', None):
        assert tuple(load_model(name, file).pretrained_cfg['mean']) == mean, file
    assert tuple(timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg['mean']) == mean
    assert carried_settings(tmp_path / 'weights.pt')['mean'] == mean
    for i, file in enumerate((tmp_path / 'checkpoint.pt', folder / 'model.safetensors')):
        again = dataclasses.replace(recipe, initial_checkpoint=str(file))
        path = train(again, write_trajectories(tmp_path / str(i), train=60), tmp_path / f'run{i}', progress=False)
        assert tuple(read_metadata(path)['mean']) == mean


def test_runs_of_a_sister_network(data_dir, tmp_path):
    """Weights of the same shapes, whose file says which network it is of."""
    path = train(dataclasses.replace(RECIPE, epochs=1, model_kwargs={}), data_dir, tmp_path / 'run', progress=False)
    for file in (path, tmp_path / 'run' / 'checkpoint.pt'):
        assert load_model('smpconv_seq_mnist', file)
        for other in ('smpconv_seq_pmnist', 'smpconv_seq_speech_raw'):
            message = f'says that it is of smpconv_seq_mnist, not of {other}'
            with pytest.raises(ValueError, match=message):
                load_model(other, file)
            with pytest.raises(CheckpointError, match=message):
                convert(file, other, install=True)


def test_bundled_weights_keep_their_statistics(data_dir, tmp_path):
    """As a file to begin with, wherever it lies."""
    shutil.copy(bundled_path('smpconv_seq_speech.sc'), tmp_path / 'a.safetensors')
    recipe = Recipe('smpconv_seq_speech', epochs=1, initial_checkpoint=str(tmp_path / 'a.safetensors'), batch_size=8)
    path = train(recipe, data_dir, tmp_path / 'run', progress=False)
    assert tuple(read_metadata(path)['mean']) == timm.get_pretrained_cfg('smpconv_seq_speech').mean


@pytest.mark.parametrize('how', ['pretrained', 'initial_checkpoint', 'lower_rate'])
def test_stopped_run_continues(how, data_dir, tmp_path, monkeypatch):
    """In the ways of the shipped runs: Muon, bfloat16, with and without an average, from weights that are there."""
    muon = dict(opt='nmuon', opt_kwargs=dict(fallback_no_weight_decay=True, betas=(0.9, 0.98)), amp=True)
    if how == 'pretrained':
        recipe = Recipe('smpconv_seq_pmnist', pretrained=True, epochs=2, batch_size=4, val_images=9, **muon)
    else:
        kwargs = dict(kernel_size=500, radius=0.008) if how == 'lower_rate' else {}
        model = 'smpconv_seq_speech_raw' if how == 'lower_rate' else 'smpconv_seq_speech'
        muon |= {**SPEECH, 'model_kwargs': {**SPEECH['model_kwargs'], **kwargs}, 'model_ema_decay': 0.0}
        recipe = Recipe(model, epochs=1, sample_rate=500 if kwargs else 0, **muon)
        first = train(recipe, data_dir, tmp_path / 'first', progress=False)
        recipe = dataclasses.replace(recipe, epochs=2, initial_checkpoint=str(first), mixup=0.2)
    whole = train(recipe, data_dir, tmp_path / 'whole', progress=False)
    step = module._Run.train_step

    def stopping(self, *args):
        step(self, *args)
        if self.step in stops:
            stops.remove(self.step)
            raise KeyboardInterrupt

    per_epoch = torch.load(tmp_path / 'whole' / 'checkpoint.pt')['step'] // 2
    stops = [2, per_epoch + 2]
    monkeypatch.setattr(module._Run, 'train_step', stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data_dir, tmp_path / 'broken', progress=False, recovery_interval=1)
    path = train(recipe, data_dir, tmp_path / 'broken', progress=False, recovery_interval=1)
    assert not stops and path.read_bytes() == whole.read_bytes()


def test_what_says_nothing_of_a_checkpoint(data_dir, tmp_path, monkeypatch, caplog):
    """Nobody is told to delete a checkpoint that could not be opened; a log that is open elsewhere does not matter."""
    recipe = dataclasses.replace(RECIPE, epochs=1)
    train(recipe, data_dir, tmp_path, progress=False)
    load = torch.load

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(torch, 'load', refuse)
    with pytest.raises(PermissionError, match='Permission denied'):
        train(recipe, data_dir, tmp_path, progress=False)
    monkeypatch.setattr(torch, 'load', load)
    monkeypatch.setattr(module, 'write_rows', refuse)
    train(recipe, data_dir, tmp_path, progress=False)
    assert 'log.csv cannot be written now' in caplog.text


def test_a_checkpoint_is_read_once(data_dir, tmp_path, monkeypatch):
    """A torch file holds the weights and the statistics, and may be large."""
    name = 'smpconv_seq_chartraj'
    recipe = Recipe(model=name, epochs=1, **{**SPEECH, 'model_kwargs': {}})
    train(recipe, data_dir, tmp_path / 'run', progress=False)
    file = tmp_path / 'run' / 'checkpoint.pt'
    reads, load = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda source, **kwargs: reads.append(source) or load(source, **kwargs))
    for use in (
        lambda: load_model(name, file),
        lambda: convert(file, name, tmp_path / 'folder'),
        lambda: train(
            dataclasses.replace(recipe, initial_checkpoint=str(file)), data_dir, tmp_path / 'next', progress=False
        ),
    ):
        use()
        assert len(reads) == 1
        reads.clear()


def test_weights_of_another_rate_are_not_validated(data_dir, tmp_path):
    name = 'smpconv_seq_speech_raw'
    kwargs = dict(kernel_size=500, radius=0.008, small_kernel_size=5)
    recipe = Recipe(model=name, epochs=1, sample_rate=500, **{**SPEECH, 'model_kwargs': kwargs})
    path = train(recipe, data_dir, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r'inputs of size \(1, 1, 500\)'):
        load_model(name, path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['input_size'][2] == 500
    with pytest.raises(ValueError, match='can be installed'):
        convert(path, name, install=True)


def test_half_of_the_digits_are_shifted():
    images = torch.zeros(2000, 1, 28, 28)
    images[:, :, 12:16, 12:16] = 1.0  # rotation and scale leave its middle
    augmented = augment_digits(images, torch.Generator().manual_seed(0))[:, 0]
    places = torch.arange(28.0) - 13.5
    mass = augmented.sum((1, 2)).clamp_min(1e-6)
    x, y = (augmented.sum(1) * places).sum(1) / mass, (augmented.sum(2) * places).sum(1) / mass
    erased = augmented.sum((1, 2)) < 0.9 * 0.75**2 * 16
    moved = ((x.abs() > 0.05) | (y.abs() > 0.05))[~erased]
    assert 0.44 < moved.float().mean() < 0.60


def test_images_of_another_size_are_taken(tmp_path):
    """A network of images is used at the size that its folder says."""
    path = convert(bundled_path('smpconv_cifar.c10'), 'smpconv_cifar', tmp_path / 'out').folder / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['input_size'] = [3, 40, 40]
    path.write_text(json.dumps(config))
    assert tuple(load_model('smpconv_cifar', path.with_name('model.safetensors')).pretrained_cfg['input_size'])[1] == 40
