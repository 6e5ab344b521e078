"""Deterministic synthetic weights, statistics and inputs.

`synth_state` fills the reference layout listed in fixtures/NAME.json with the numbers that the expected outputs in
fixtures/NAME.seed1.safetensors were computed with; each depends on the seed and its key alone.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from timm_smpconv.classes import CIFAR10

FIXTURES = Path(__file__).resolve().parent / 'fixtures'
FIXTURE_NAMES = sorted(path.stem for path in FIXTURES.glob('*.json'))
SEED = 1


def _rng(seed, key):
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))


def spec(name):
    """Layout of a fixture: input, radius, params, state and extra_buffers (names to shapes)."""
    return json.loads((FIXTURES / f'{name}.json').read_text())


def synth_value(key, shape, seed, spread):
    """Value of one key; its last part decides the distribution, `spread` scales the radii."""
    rng, last = _rng(seed, key), key.rsplit('.', 1)[-1]
    if last == 'num_batches_tracked':
        return np.asarray(100, dtype=np.int64)
    if last == 'running_var':
        value = rng.uniform(0.8, 1.2, shape)
    elif last == 'running_mean' or last == 'bias':
        value = rng.normal(0.0, 0.1, shape)
    elif last == 'weight_coord':  # some points lie outside [-1, 1]
        value = rng.normal(0.0, 0.5, shape)
    elif last == 'radius':
        value = spread * rng.uniform(0.5, 2.0, shape)
    elif last == 'weights':
        value = rng.normal(0.0, 0.05, shape)
    elif len(shape) == 1:  # scale of a norm
        value = rng.uniform(0.8, 1.2, shape)
    else:
        value = rng.normal(0.0, int(np.prod(shape[1:])) ** -0.5, shape)
    return value.astype(np.float32)


def synth_state(name, seed=SEED):
    """Weights of a fixture in the reference layout, key to array."""
    layout = spec(name)
    state = {key: synth_value(key, tuple(shape), seed, layout['radius']) for key, shape in layout['state'].items()}
    stored = load_file(FIXTURES / f'{name}.seed{seed}.safetensors')
    state.update({key[6:]: value for key, value in stored.items() if key.startswith('state:')})
    return state


def reference_state(name, seed=SEED, prefix=''):
    """synth_state as tensors, with the buffers that carry nothing."""
    state = {prefix + key: torch.from_numpy(np.array(value)) for key, value in synth_state(name, seed).items()}
    state.update({prefix + key: torch.zeros(shape) for key, shape in spec(name)['extra_buffers'].items()})
    return state


def expected(name, seed=SEED):
    """Expected outputs of a fixture: logits, features_mean, kernel:MODULE."""
    stored = load_file(FIXTURES / f'{name}.seed{seed}.safetensors')
    return {key: value for key, value in stored.items() if not key.startswith('state:')}


def synth_input(name, seed=SEED):
    """Network input of a fixture."""
    return torch.from_numpy(_rng(seed, 'input').normal(0.0, 1.0, tuple(spec(name)['input'])).astype(np.float32))


def relative_error(actual, wanted):
    """Largest absolute difference over the largest absolute value wanted."""
    actual, wanted = (torch.as_tensor(value).detach().double() for value in (actual, wanted))
    assert actual.shape == wanted.shape, f'shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}'
    assert torch.isfinite(actual).all() and torch.isfinite(wanted).all()
    if not wanted.numel():
        return 0.0
    return ((actual - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def is_batch_norm(module):
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))


def randomize_norms(model, seed=0):
    """Gives all batch norms statistics and weights that are not the initial ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if is_batch_norm(module):
                n = module.num_features
                module.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
                module.weight.copy_(0.5 + torch.rand(n, generator=generator))
                module.bias.copy_(0.1 * torch.randn(n, generator=generator))
    return model


def write_images(folder, count):
    """CLASS/*.png of 32 x 32 pixels: `count` images of each class of CIFAR-10, each class of its own colour."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CIFAR10):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 60, (32, 32, 3)) + 19 * np.array([label, 9 - label, label % 3])
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f'{i}.png')
