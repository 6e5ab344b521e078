"""A thousand damaged files: a clear error each or the right result, nothing half done, no memory filled."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_smpconv
from timm_smpconv import WeightsError, store
from timm_smpconv.convert import convert
from timm_smpconv.publish import check_folder

SMALL = dict(depth=1, dim=4, num_points=3)
MODEL = 'smpconv_seq_speech'
MEMORY = 400 << 10  # KiB by which the process may grow


def mutate(data, rng):
    """One to three damages: bytes that flip, ranges that vanish, repeat, move or are overwritten, a cut end."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        start = rng.randrange(len(data))
        # most damages near the ends, where headers and directories are
        if rng.random() < 0.6:
            start = min(int(rng.expovariate(1 / 100)), len(data) - 1)
            start = start if rng.random() < 0.5 else len(data) - 1 - start
        length = min(int(rng.expovariate(1 / 20)) + 1, len(data) - start)
        kind = rng.randrange(7)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start : start + length] = rng.randbytes(length)
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = data[start : start + length]
        elif kind == 4:
            del data[start:]
        elif kind == 5:
            data[start:start] = rng.choice([b'9', b'0', b'-', b'"', b'{', b'[', b'null', b'\xff' * 8, b'1e9', b'\x80'])
        else:
            data[start : start + length] = bytes(length)
    return bytes(data)


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A checkpoint in each format, and the folder that comes of it."""
    folder = tmp_path_factory.mktemp('originals')
    torch.manual_seed(0)
    state = timm.create_model(MODEL, **SMALL).state_dict()
    checkpoint = dict(state_dict=state, epoch=1, arch=MODEL, optimizer=dict(state={0: torch.zeros(2)}))
    torch.save(checkpoint, folder / 'zip.pth')
    torch.save(checkpoint, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    save_file(state, folder / 'plain.safetensors')
    convert(folder / 'zip.pth', MODEL, folder / 'out', model_kwargs=SMALL)
    return folder


def memory(field):
    """KiB that the process uses now (VmRSS), or has used at most (VmHWM)."""
    return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def forget_peak():
    """Starts the measurement of the most memory anew; what the process uses now."""
    if not Path('/proc/self/clear_refs').exists():
        return None  # Linux alone can do this: elsewhere memory is not watched
    Path('/proc/self/clear_refs').write_text('5')
    return memory('VmRSS')


def grown(before):
    return 0 if before is None else memory('VmHWM') - before


def one_line_each(message):
    assert message and all(c.isprintable() or c == '\n' for c in message) and len(message) < 3000, message


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name,count', [('zip.pth', 220), ('legacy.pth', 180), ('plain.safetensors', 200)])
def test_checkpoints(name, count, originals, tmp_path):
    rng = random.Random(name)
    data = (originals / name).read_bytes()
    path, out = tmp_path / name, tmp_path / 'out'
    before = forget_peak()
    refused = 0
    for i in range(count):
        path.write_bytes(mutate(data, rng))
        try:
            convert(path, MODEL, out, model_kwargs=SMALL)
        except WeightsError as e:
            refused += 1
            one_line_each(str(e))
            assert name in str(e), i
            assert sorted(p.name for p in tmp_path.iterdir()) == [name], i
        else:  # the damage met a number, or what nobody reads
            state = load_file(out / 'model.safetensors')
            assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point()), i
            shutil.rmtree(out)
    assert refused > count // 3
    assert grown(before) < MEMORY


@pytest.mark.parametrize(
    'name,count', [('config.json', 160), ('model.safetensors', 80), ('test/rand_tensors.safetensors', 40)]
)
def test_folders(name, count, originals, tmp_path):
    """Folders as they come from the Hub: create_model and check_folder say what is wrong."""
    rng = random.Random(name)
    folder = tmp_path / 'folder'
    shutil.copytree(originals / 'out', folder)
    data = (folder / name).read_bytes()
    before = forget_peak()
    for i in range(count):
        (folder / name).write_bytes(mutate(data, rng))
        try:
            timm_smpconv.create_model(f'local-dir:{folder}', pretrained=True)
        except WeightsError as e:
            one_line_each(str(e))
            assert str(folder) in str(e), i
            assert not all(check.ok for check in check_folder(folder)), i
        else:
            for check in check_folder(folder):
                one_line_each(check.detail)
    assert grown(before) < MEMORY


@pytest.mark.parametrize('name', ['entry', 'weights'])
def test_store(name, tmp_path, monkeypatch):
    """Damaged entries and files of the store are never used."""
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', str(tmp_path))
    torch.manual_seed(0)
    key = f'{MODEL}.sc'
    save_file(timm.create_model(MODEL, **SMALL).state_dict(), tmp_path / 'a.safetensors')
    path = store.install(key, tmp_path / 'a.safetensors', 'test', '')
    damaged = path if name == 'weights' else path.parent / 'weights.json'
    data, rng = damaged.read_bytes(), random.Random(name)
    good = path.read_bytes()
    sha256 = json.loads((path.parent / 'weights.json').read_text())['sha256']
    for i in range(60):
        changed = mutate(data, rng)
        damaged.write_bytes(changed)
        found = store.find(key)
        if found is not None:
            assert found.parent == path.parent and store.file_sha256(found) == sha256 and found.read_bytes() == good, i
        elif name == 'weights':
            assert changed != data and not path.exists()
