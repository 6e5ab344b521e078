"""Preparation of data sets from made-up archives in the formats of the originals."""

import builtins
import gzip
import hashlib
import io
import multiprocessing
import os
import shutil
import time
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import speech_members, wav, write_mnist, write_speech, write_tar
from PIL import Image
from safetensors.torch import save_file
from servers import Drive, serve
from torchvision.datasets import MNIST

from timm_smpconv import data
from timm_smpconv._files import atomic_path, read_metadata, save_tensors, write_text
from timm_smpconv.classes import CIFAR10, SPEECH_WORDS
from timm_smpconv.data import load_character_trajectories, load_mnist, load_speech, prepare, speaker_number


def make(name, folder, *archives):
    return prepare(name, folder, archives, progress=False)


def nothing_left(folder):
    return not list(folder.rglob('*.part'))


# all


def test_unknown_or_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="Unknown data set 'imagenet': expected one of mnist"):
        make('imagenet', tmp_path)
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='is not a folder'):
        make('mnist', tmp_path / 'file')
    with pytest.raises(FileNotFoundError, match=r'No archive at .*absent\.tar'):
        make('speech_commands', tmp_path, tmp_path / 'absent.tar')
    (tmp_path / 'speech_commands').mkdir()
    with pytest.raises(ValueError, match=r'lacks train\.safetensors.* delete this folder'):
        make('speech_commands', tmp_path)


@pytest.fixture
def server(monkeypatch):
    """Where everything is downloaded from."""
    for key in ('no_proxy', 'NO_PROXY'):
        monkeypatch.setenv(key, '127.0.0.1')
    with serve(Drive()) as drive:
        monkeypatch.setattr(MNIST, 'mirrors', ['http://127.0.0.1:9/nobody/', f'{drive.url}/'])
        for name in ('_CIFAR10_URL', '_SPEECH_URL', '_TRAJECTORIES_URL'):
            monkeypatch.setattr(data, name, f'{drive.url}/{getattr(data, name).rpartition("/")[2]}')
        yield drive


@pytest.mark.parametrize('name', list(data.DATA_SETS))
@pytest.mark.parametrize('mode', ['refused', 'quota', 'ok'])
def test_no_download(name, mode, tmp_path, server):
    """Refused, a page in place of the file, and a wrong file: nothing stays that the next call would take for it."""
    server.mode, server.data = mode, b'another file'
    with pytest.raises(OSError, match='Cannot download .* --archive'):
        make(name, tmp_path)
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.suffix != '.lock']
    assert not (tmp_path / name).exists()


def test_download(tmp_path, few_trajectories, server):
    """Gone on with when the connection breaks, kept when it is right, replaced when it is not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('CharacterTrajectories_TRAIN.ts', _ts('1,2:3,4:5,6:1', '1:2:3:20'))
        archive.writestr('CharacterTrajectories_TEST.ts', _ts('1:2:3:2'))
    server.data, server.mode, server.part = buffer.getvalue(), 'broken', 100
    name = 'character_trajectories'
    downloads = tmp_path / 'downloads'
    downloads.mkdir()
    (downloads / 'CharacterTrajectories.zip').write_text('<html>')  # left by something else
    assert make(name, tmp_path).new and nothing_left(tmp_path) and len(server.requests) > 3
    assert [path.name for path in downloads.iterdir()] == ['CharacterTrajectories.zip']
    server.mode = 'refused'
    shutil.rmtree(tmp_path / name)
    assert make(name, tmp_path).new


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='this system has no fork')
def test_two_calls_at_once(tmp_path, idx):
    """One makes the data set, the other waits for it."""
    context = multiprocessing.get_context('fork')
    queue = context.Queue()

    def slowly(folder, files, downloads, progress):
        time.sleep(0.5)
        return made(folder, files, downloads, progress)

    def call():
        try:
            queue.put(make('mnist', tmp_path / 'data', idx).new)
        except Exception as e:
            queue.put(repr(e))

    made, *rest = data.DATA_SETS['mnist']
    with mock.patch.dict(data.DATA_SETS, mnist=(slowly, *rest)):
        processes = [context.Process(target=call) for _ in range(3)]
        for process in processes:
            process.start()
        results = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
    assert sorted(results, key=str) == [False, False, True] and nothing_left(tmp_path)
    assert len(load_mnist(tmp_path / 'data', train=True)) == 25


def test_folder_without_archives(tmp_path, server):
    """An empty folder is not taken for no folder, which would download."""
    (tmp_path / 'raw' / 'deeper').mkdir(parents=True)
    for name in data.DATA_SETS:
        with pytest.raises(ValueError, match='raw has no files in it'):
            make(name, tmp_path, tmp_path / 'raw')
    assert not server.requests


def test_atomic_path(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'file'
    with pytest.raises(KeyError):
        with atomic_path(path) as part:
            part.write_text('half')
            raise KeyError
    assert list(path.parent.iterdir()) == []
    with atomic_path(path) as part:
        part.write_text('whole')
    assert [p.name for p in path.parent.iterdir()] == ['file']
    other = tmp_path / 'other'
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # readable by whom any file is
    monkeypatch.setattr(os, 'umask', None)  # which threads share
    write_text(path, 'again')
    save_tensors(path, dict(a=torch.zeros(1)))
    assert path.stat().st_mode == other.stat().st_mode


# MNIST


@pytest.fixture
def idx(tmp_path, monkeypatch):
    raw = write_mnist(tmp_path / 'original') / 'MNIST' / 'raw'
    sums = {f.name: hashlib.md5(f.read_bytes(), usedforsecurity=False).hexdigest() for f in sorted(raw.iterdir())}
    monkeypatch.setattr(data, '_MNIST_MD5', sums)
    return raw


@pytest.mark.parametrize('packed', [True, False])
def test_mnist(tmp_path, idx, packed):
    given = tmp_path / 'given'
    given.mkdir()
    for file in idx.iterdir():
        if packed:
            (given / f'{file.name}.gz').write_bytes(gzip.compress(file.read_bytes()))
        else:
            shutil.copy(file, given)
    archives = [given] if packed else given.iterdir()
    result = make('mnist', tmp_path / 'data', *archives)
    assert result.new and result.counts == dict(train=25, test=10) and result.path == tmp_path / 'data' / 'MNIST'
    assert load_mnist(tmp_path / 'data', True).inputs.shape == (25, 1, 28, 28)
    assert len(load_mnist(tmp_path / 'data', False)) == 10
    assert not make('mnist', tmp_path / 'data', tmp_path).new and nothing_left(tmp_path)


def test_wrong_mnist(tmp_path, idx):
    with pytest.raises(ValueError, match='-ubyte is missing'):
        make('mnist', tmp_path / 'data', idx / 'train-images-idx3-ubyte')
    (idx / 'train-labels-idx1-ubyte').write_bytes(b'other')
    with pytest.raises(ValueError, match='is not the train-labels-idx1-ubyte of MNIST'):
        make('mnist', tmp_path / 'data', idx)
    (idx / 'train-labels-idx1-ubyte').rename(idx / 'train-labels-idx1-ubyte.gz')
    with pytest.raises(ValueError, match='not a complete archive'):
        make('mnist', tmp_path / 'data', idx)
    assert nothing_left(tmp_path) and not (tmp_path / 'data' / 'MNIST').exists()
    with pytest.raises(FileNotFoundError, match='MNIST/raw.*timm-smpconv data mnist'):
        load_mnist(tmp_path, train=True)


# CIFAR-10


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(data, '_CIFAR10_COUNTS', dict(train=20, test=10))


def _records(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return np.concatenate([(np.arange(count, dtype=np.uint8) % 10)[:, None], pixels], 1)


def test_binary_cifar10(tmp_path, few_images):
    records = [_records(10, 0), _records(10, 1), _records(10, 2)]
    names = ('data_batch_1.bin', 'data_batch_2.bin', 'test_batch.bin')
    members = {'batches.meta.txt': b'airplane\n', **{n: r.tobytes() for n, r in zip(names, records)}}
    archive = write_tar(tmp_path / 'cifar-10-binary.tar.gz', members, 'cifar-10-batches-bin/')
    result = make('cifar10', tmp_path, archive)
    assert result.counts == dict(train=20, test=10)
    assert not make('cifar10', tmp_path, archive).new
    for label, name in enumerate(CIFAR10):
        first, second = sorted((result.path / 'train' / name).iterdir())
        for path, record in ((first, records[0][label]), (second, records[1][label])):
            image = np.asarray(Image.open(path))
            assert image.shape == (32, 32, 3) and (image.transpose(2, 0, 1).ravel() == record[1:]).all()
        assert len(list((result.path / 'test' / name).iterdir())) == 1


def _image(size=(32, 32)):
    buffer = io.BytesIO()
    Image.new('RGB', size, (9, 99, 199)).save(buffer, 'JPEG')
    return buffer.getvalue()


def test_cifar10_of_folders(tmp_path, few_images):
    members = {f'train/{name}/{i:04}.jpg': _image() for name in CIFAR10 for i in range(2)}
    members.update({f'test/{name}/0000.jpg': _image() for name in CIFAR10})
    members['../../outside.jpg'] = members['/train/outside/0.jpg'] = members['train/cat/../../x.jpg'] = _image()
    members['train/cat/..\\..\\x.jpg'] = members['train/cat/C:x.jpg'] = _image()  # paths on Windows
    (tmp_path / 'given').mkdir()
    write_tar(tmp_path / 'given' / 'cifar10.tar.xz', members)
    (tmp_path / 'given' / 'LICENSE').write_text('of a folder with an archive')
    result = make('cifar10', tmp_path / 'data', tmp_path / 'given')
    assert result.counts == dict(train=20, test=10)
    assert len(list((tmp_path / 'data').rglob('*.jpg'))) == 30 and not list(tmp_path.glob('*.jpg'))


def test_wrong_cifar10(tmp_path, few_images):
    few = write_tar(tmp_path / 'few.tar', {'test_batch.bin': _records(10, 0).tobytes()})
    odd = write_tar(tmp_path / 'odd.tar', {'test_batch.bin': b'123'})
    label = write_tar(tmp_path / 'label.tar', {'test_batch.bin': bytes([10]) + bytes(3072)})
    pickled = write_tar(tmp_path / 'pickled.tar', {'cifar-10-batches-py/data_batch_1': b'0'})
    large = write_tar(tmp_path / 'large.tar', {'train/cat/1.jpg': _image((33, 32))})
    cut = tmp_path / 'cut.tar.gz'
    cut.write_bytes(
        write_tar(tmp_path / 'all.tar.gz', {'test_batch.bin': _records(10, 0).tobytes()}).read_bytes()[:9000]
    )
    text = tmp_path / 'text.tar'
    text.write_text('no archive')
    for archive, message in (
        (few, 'found 0 and 10'),
        (odd, 'multiple of 3073'),
        (label, 'a label above 9'),
        (pickled, 'pickled version .*cifar-10-binary'),
        (large, 'is 33 x 32, expected 32 x 32'),
        (cut, 'not a complete archive'),
        (text, 'not a complete archive'),
    ):
        with pytest.raises(ValueError, match=message):
            make('cifar10', tmp_path / 'data', archive)
    assert nothing_left(tmp_path) and not (tmp_path / 'data' / 'cifar10').exists()


# Speech Commands


def test_speech_in_two_parts(tmp_path):
    soundfile = pytest.importorskip('soundfile')
    train = speech_members(['0a', '0b'])
    short = speech_members(['0c'], length=9000)
    samples = (1000 * np.sin(np.arange(20000))).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format='FLAC', subtype='PCM_16')
    del short['go/0c_nohash_0.wav']
    short.update({'go/0c_nohash_0.flac': buffer.getvalue(), 'LICENSE': b'', 'cat/0c_nohash_0.wav': b'another word'})
    archives = write_tar(tmp_path / '1.tar', train, './'), write_tar(tmp_path / '2.tar.gz', short)
    result = make('speech_commands', tmp_path, *archives)
    assert result.counts == dict(train=20, test=10)
    part = load_speech(tmp_path, True)
    assert part.inputs.shape == (20, 16000) and part.inputs.dtype == torch.int16
    assert len(part.speakers.unique()) == 2 and part.labels.bincount().tolist() == [2] * 10
    for wave, label in zip(part.inputs, part.labels):
        assert wave[0] // 100 == label
    part = load_speech(tmp_path, False)
    for wave, label in zip(part.inputs, part.labels):
        word = SPEECH_WORDS[label]
        expected = samples[:16000] if word == 'go' else np.pad(np.arange(9000) % 100 + 100 * int(label), (0, 7000))
        assert (wave.numpy() == expected).all(), word
    metadata = read_metadata(result.path / 'test.safetensors')
    assert tuple(metadata['words']) == SPEECH_WORDS and '2.tar.gz' in metadata['source']


def test_official_speech(tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_SPEECH_TESTS', 10)
    members = speech_members(['0a', '0b', '0c'])
    listed = ''.join(f'{word}/0b_nohash_0.wav\n' for word in (*SPEECH_WORDS, 'cat'))
    members = {'testing_list.txt': listed.encode(), '_background_noise_/white.wav': b'', **members}
    write_tar(tmp_path / 'speech_commands_v0.02.tar.gz', members, './')
    for other in ('cifar-10-binary.tar.gz', 'speech.tar'):
        (tmp_path / other).write_text('not to be read')
    assert make('speech_commands', tmp_path, tmp_path).counts == dict(train=20, test=10)
    shared = set(load_speech(tmp_path, True).speakers.tolist()) & set(load_speech(tmp_path, False).speakers.tolist())
    assert not shared


def test_wrong_speech(tmp_path):
    good = write_tar(tmp_path / 'good.tar', speech_members(['0a']))
    members = speech_members(['0b'])
    fast = write_tar(tmp_path / 'fast.tar', {**members, 'go/0b_nohash_0.wav': wav([1, 2], rate=8000)})
    stereo = write_tar(tmp_path / 'stereo.tar', {**members, 'go/0b_nohash_0.wav': wav([1, 2], channels=2)})
    broken = write_tar(tmp_path / 'broken.tar', {**members, 'go/0b_nohash_0.wav': b'RIFFxxxx'})
    missing = write_tar(tmp_path / 'missing.tar', {k: v for k, v in members.items() if not k.startswith('stop')})
    for archives, message in (
        ([good], 'has no testing_list.txt'),
        ([good, good], '1 speakers are in both'),
        ([good, fast], 'expected 16000 Hz, 1 channel and 16 bits, got 8000'),
        ([good, stereo], 'got 16000, 2 and 16'),
        ([good, broken], 'go/0b_nohash_0.wav .* is not a readable'),
        ([good, missing], 'The test data has no recording of stop'),
        ([good] * 3, 'or one of training and one of test data, got 3'),
    ):
        with pytest.raises(ValueError, match=message):
            make('speech_commands', tmp_path / 'data', *archives)
    assert nothing_left(tmp_path) and not (tmp_path / 'data' / 'speech_commands').exists()


def test_two_archives_in_a_folder(tmp_path):
    """Their names say nothing of which is for training, unless they are numbered; the order of the arguments does."""
    given = tmp_path / 'given'
    given.mkdir()
    train = write_tar(given / 'train.tar', speech_members(['0a', '0b']))
    test = write_tar(given / 'test.tar', speech_members(['0c']))
    with pytest.raises(ValueError, match=r'given holds test\.tar and train\.tar.*both .* by name, training data first'):
        make('speech_commands', tmp_path / 'data', given)
    assert nothing_left(tmp_path) and not (tmp_path / 'data' / 'speech_commands').exists()
    (tmp_path / 'other').mkdir()
    shutil.copy(test, tmp_path / 'other')
    for i, archives in enumerate(((train, test), (train, tmp_path / 'other'))):
        folder = tmp_path / f'data{i}'
        assert make('speech_commands', folder, *archives).counts == dict(train=20, test=10)
        assert load_speech(folder, False).speakers.unique().tolist() == [speaker_number('0c')]
    with pytest.raises(ValueError, match=r'training data first, got test\.tar and then train\.tar'):
        make('speech_commands', tmp_path / 'globbed', test, train)  # as a shell sorts them
    for archive, name in ((train, 'part1.tar'), (test, 'part2.tar')):
        archive.rename(given / name)
    assert make('speech_commands', tmp_path / 'numbered', given).counts == dict(train=20, test=10)


def test_flac_without_soundfile(tmp_path, monkeypatch):
    def absent(name, *args, **kwargs):
        if name == 'soundfile':
            raise ImportError
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', absent)
    archive = write_tar(tmp_path / 'flac.tar', {'go/0a_nohash_0.flac': b'fLaC'})
    with pytest.raises(ValueError, match=r'pip install soundfile'):
        make('speech_commands', tmp_path, archive, archive)


def test_wrong_prepared_speech(tmp_path):
    with pytest.raises(FileNotFoundError, match='Make it with: timm-smpconv data speech_commands'):
        load_speech(tmp_path, True)
    path = write_speech(tmp_path) / 'speech_commands' / 'train.safetensors'
    save_file({'waves': torch.zeros(2, 8000)}, path)
    with pytest.raises(ValueError, match='make it again'):
        load_speech(tmp_path, True)
    path.write_bytes(b'123')
    with pytest.raises(ValueError, match='not a readable safetensors'):
        load_speech(tmp_path, True)


# character trajectories

TS = """#The data
@problemName CharacterTrajectories
@classLabel true 1 2 3
@data
{lines}
"""


def _ts(*lines):
    return TS.format(lines='\n'.join(lines)).encode()


@pytest.fixture
def few_trajectories(monkeypatch):
    monkeypatch.setattr(data, '_TRAJECTORY_COUNTS', dict(train=2, test=1))


def test_trajectories(tmp_path, few_trajectories):
    long = ','.join(['1'] * 182)
    train, test = _ts('0.5,1,-2e-1:3,4,5:6,7,8:1', f'{long}:{long}:{long}:20'), _ts('1:2:3:2')
    with zipfile.ZipFile(tmp_path / 'CharacterTrajectories.zip', 'w') as archive:
        archive.writestr('CharacterTrajectories_TRAIN.ts', train)
        archive.writestr('CharacterTrajectories_TEST.ts', test)
        archive.writestr('CharacterTrajectories.txt', 'about')
    result = make('character_trajectories', tmp_path, tmp_path / 'CharacterTrajectories.zip')
    assert result.counts == dict(train=2, test=1)
    part = load_character_trajectories(tmp_path, True)
    assert part.inputs.shape == (2, 3, 182) and part.labels.tolist() == [0, 19]
    assert part.inputs[0, :, :4].tolist() == [
        [0.5, 1, pytest.approx(-0.2), pytest.approx(-0.2)],
        [3, 4, 5, 5],
        [6, 7, 8, 8],
    ]
    assert load_character_trajectories(tmp_path, False).inputs[0, 2].unique().tolist() == [3]

    for name, content in (('TRAIN', train), ('TEST', test)):
        (tmp_path / f'CharacterTrajectories_{name}.ts').write_bytes(content)
    files = tmp_path / 'CharacterTrajectories_TRAIN.ts', tmp_path / 'CharacterTrajectories_TEST.ts'
    assert make('character_trajectories', tmp_path / 'again', *files).new


@pytest.mark.parametrize(
    'line,message',
    [
        ('1,2:3:4,5:1', 'line 5: expected series of numbers of one length'),
        ('1:2:x:1', 'line 5: expected series of numbers'),
        ('1:2:nan:1', 'finite numbers'),
        ('1:2:3:a', 'and a class'),
        ('1:2:3:21', 'a class from 1 to 20'),
        ('1:2:1', 'expected 3 series'),
        (':'.join([','.join(['0'] * 183)] * 3 + ['1']), 'at most 182'),
        ('1:2:3:4', 'has 1 trajectories, expected 2'),
        ('', 'no lines behind @data'),
    ],
)
def test_wrong_trajectories(tmp_path, few_trajectories, line, message):
    (tmp_path / 'CharacterTrajectories_TRAIN.ts').write_bytes(_ts(line))
    with pytest.raises(ValueError, match=message):
        make('character_trajectories', tmp_path / 'data', tmp_path / 'CharacterTrajectories_TRAIN.ts')
    assert nothing_left(tmp_path)


def test_missing_trajectories(tmp_path):
    (tmp_path / 'bad.zip').write_text('no archive')
    with pytest.raises(ValueError, match='not a complete archive'):
        make('character_trajectories', tmp_path, tmp_path / 'bad.zip')
    (tmp_path / 'other.ts').touch()
    with pytest.raises(ValueError, match='CharacterTrajectories_TRAIN.ts or in a .zip that holds it: it is missing'):
        make('character_trajectories', tmp_path, tmp_path / 'other.ts')


def test_damaged_mnist(tmp_path):
    """Files that are there and wrong are not said to be missing."""
    for i, (name, change) in enumerate(
        {
            'train-images-idx3-ubyte': lambda raw: raw[:100],
            'train-labels-idx1-ubyte': lambda raw: b'',
            't10k-labels-idx1-ubyte': lambda raw: raw[:4] + (5).to_bytes(4, 'big') + raw[8:13],
            't10k-images-idx3-ubyte': lambda raw: (0x801).to_bytes(4, 'big') + (16).to_bytes(4, 'big') + raw[8:24],
        }.items()
    ):
        folder = write_mnist(tmp_path / str(i))
        path = folder / 'MNIST' / 'raw' / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError, match=f'{name}.*(damaged|belong).*make it again'):
            load_mnist(folder, name.startswith('train'))


def test_archive_that_was_cut_off_between_two_files(tmp_path):
    """Python's tarfile takes it for a shorter one."""
    train = write_tar(tmp_path / 'train.tar', speech_members(['0a', '0b']))
    test = write_tar(tmp_path / 'test.tar', speech_members(['1a']))
    whole = train.read_bytes()
    member = 512 + 32256  # of one recording, in blocks
    for end in (15 * member, 15 * member + 100):
        train.write_bytes(whole[:end])
        with pytest.raises(ValueError, match='not a complete archive'):
            prepare('speech_commands', tmp_path / 'data', [train, test])
    train.write_bytes(whole[: 2 * member + 5] + b'!' + whole[2 * member + 6 :])  # a damaged header
    with pytest.raises(ValueError, match='not a complete archive'):
        prepare('speech_commands', tmp_path / 'data', [train, test])
    train.write_bytes(whole)
    assert prepare('speech_commands', tmp_path / 'data', [train, test]).counts == dict(train=20, test=10)
