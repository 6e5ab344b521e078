"""Data sets: from archives or downloads into what training and validation read, and from there into tensors.

Nothing is unpacked by name: what is wanted is read out of an archive, checked, and written under names made here. A
data set appears in its folder when it is complete.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from ._files import save_tensors
from ._text import one_line
from .audio import RATE, decode_sound
from .classes import CHARACTERS, CIFAR10, SPEECH_WORDS
from .download import DownloadError, download
from .store import file_sha256

__all__ = [
    'DATA_SETS',
    'Prepared',
    'Samples',
    'load_character_trajectories',
    'load_mnist',
    'load_speech',
    'prepare',
    'speaker_number',
]

_logger = logging.getLogger(__name__)

_TRAJECTORY = 182  # steps

_MNIST_MD5 = {
    'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
    'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
    't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
    't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637',
}
_CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
_CIFAR10_HASH = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
_SPEECH_URL = 'http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
_SPEECH_HASH = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'
_TRAJECTORIES_URL = 'https://www.timeseriesclassification.com/aeon-toolkit/CharacterTrajectories.zip'

# samples of the originals
_CIFAR10_COUNTS = dict(train=50000, test=10000)
_SPEECH_TESTS = 4074
_TRAJECTORY_COUNTS = dict(train=1422, test=1436)

_RECORDING = re.compile(r'(?:.*/)?([a-z]+)/([^/]+)_nohash_(\d+)\.(wav|flac)')
_CIFAR10_IMAGE = re.compile(r'(?:.*/)?(train|test)/([a-z]+)/([^/\\:]+)\.(png|jpg|jpeg)')
_BROKEN_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)


@dataclasses.dataclass(frozen=True)
class Samples:
    """A part of a data set.

    Attributes:
        inputs: What the files hold, (N, ...).
        labels: Class indices, (N,).
        speakers: Who spoke, as numbers that spread evenly, (N,); None where there are no speakers.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    speakers: Optional[torch.Tensor] = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Union[slice, torch.Tensor]) -> 'Samples':
        return Samples(self.inputs[index], self.labels[index], None if self.speakers is None else self.speakers[index])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set in its folder.

    Attributes:
        path: The folder.
        new: It was made by this call; otherwise it was there before.
        counts: Samples of each part, if new.
    """

    path: Path
    new: bool
    counts: Dict[str, int]


def prepare(
    name: str,
    folder: Union[str, Path],
    archives: Sequence[Union[str, Path]] = (),
    progress: bool = True,
) -> Prepared:
    """Puts a data set into the form that training and validation read; does nothing if it is there.

    Args:
        name: One of DATA_SETS.
        folder: Data folder, in which the data set gets a folder of its own.
        archives: Files to read, or folders that hold them; without any, the originals are downloaded.
        progress: Show progress bars.

    Returns:
        Where it is.

    Raises:
        ValueError: An unknown data set, or files that are not what they should be.
        OSError: A file cannot be read, written or downloaded.
    """
    if name not in DATA_SETS:
        raise ValueError(f'Unknown data set {name!r}: expected one of {", ".join(DATA_SETS)}.')
    make, subfolder, required = DATA_SETS[name]
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is not a folder: give the folder that shall hold the data.')
    target = folder / subfolder
    if target.exists():
        return _found(target, required)
    files: List[Path] = []
    for archive in map(Path, archives):
        if not archive.exists():
            raise FileNotFoundError(f'No archive at {archive}.')
        if archive.is_dir():
            inside = sorted(file for file in archive.iterdir() if file.is_file())
            if make is _make_speech:
                _check_order(archive, inside)
            files += inside
        else:
            files.append(archive)
    if archives and not files:
        raise ValueError(f'{archives[0]} has no files in it: give the archive itself, or the folder that it lies in.')

    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f'.{name}.lock'):  # other calls wait, and find what this one has made
        if target.exists():
            return _found(target, required)
        part = target.with_name(target.name + '.part')
        if part.exists():  # of a call that was killed
            shutil.rmtree(part)
        part.mkdir(parents=True)
        try:
            counts = make(part, files, folder / 'downloads', progress)
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Prepared(target, True, counts)


def _found(target: Path, required: Sequence[str]) -> Prepared:
    missing = [file for file in required if not (target / file).exists()]
    if missing:
        raise ValueError(f'{target} lacks {", ".join(missing)}: delete this folder or choose another data folder.')
    return Prepared(target, False, {})


# reading archives


def _download(url: str, folder: Path, is_right: Callable[[Path], bool], progress: bool) -> Path:
    """The file at an address, from an earlier call if that has left the right one."""
    path = folder / url.rpartition('/')[2]
    if path.exists() and is_right(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    advice = 'try again later, or get the file elsewhere and pass it with --archive'
    try:
        download(url, part, path.name, progress)
    except DownloadError as e:
        raise OSError(f'Cannot download {url}: {e} Or {advice}.') from e
    if not is_right(part):
        part.unlink()
        raise OSError(f'Cannot download {url}: what came is not the file that was expected. Do {advice}.')
    os.replace(part, path)
    return path


def _has_sha256(sha256: str) -> Callable[[Path], bool]:
    return lambda path: file_sha256(path) == sha256


def _tar_files(files: List[Path], official: str) -> List[Path]:
    """The official archive if it is among the files of a folder, or all tar archives: others may lie beside them."""
    tars = [file for file in files if '.tar' in file.suffixes or file.suffix == '.tgz']
    return [file for file in tars if file.name == official] or tars or files


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN_ARCHIVE as e:
        raise ValueError(f'{path} is not a complete archive of a known kind ({e}).') from e


class _Member(tarfile.TarInfo):
    """A file in an archive; where a damaged header, or none, is no end of the archive, as it is for tarfile."""

    @classmethod
    def frombuf(cls, *args: Any) -> 'tarfile.TarInfo':
        try:
            return super().frombuf(*args)
        except tarfile.EOFHeaderError:  # the mark of the end
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f'it is damaged or cut off: {e}') from e


def _members(path: Path, progress: bool) -> Iterator[Tuple[str, Callable[[], bytes]]]:
    """Names of the regular files of a tar archive with functions that read them, in one pass with a progress bar."""
    size = path.stat().st_size

    def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        with _readable(path):
            return tar.extractfile(member).read()

    with _readable(path), path.open('rb') as raw:
        with tqdm.wrapattr(raw, 'read', total=size, desc=path.name, disable=not progress, leave=False) as stream:
            with tarfile.open(fileobj=stream, mode='r|*', tarinfo=_Member) as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, functools.partial(read, tar, member)


# MNIST


def _make_mnist(target: Path, files: List[Path], downloads: Path, progress: bool) -> Dict[str, int]:
    if not files:
        files = [_download_mnist(name, md5, downloads, progress) for name, md5 in MNIST.resources]
    found = {file.name.removesuffix('.gz'): file for file in files}
    missing = [name for name in _MNIST_MD5 if name not in found]
    if missing:
        raise ValueError(f'MNIST is made of {", ".join(_MNIST_MD5)}, as they are or as .gz: {missing[0]} is missing.')
    (target / 'raw').mkdir()
    for name, md5 in _MNIST_MD5.items():
        file = found[name]
        content = file.read_bytes()
        if file.suffix == '.gz':
            with _readable(file):
                content = gzip.decompress(content)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f'{file} is not the {name} of MNIST: its MD5 sum should be {md5}.')
        (target / 'raw' / name).write_bytes(content)
    return {
        part: (target / 'raw' / f'{prefix}-labels-idx1-ubyte').stat().st_size - 8
        for part, prefix in (('train', 'train'), ('test', 't10k'))
    }


def _download_mnist(name: str, md5: str, downloads: Path, progress: bool) -> Path:
    *others, last = MNIST.mirrors
    for mirror in others:
        with contextlib.suppress(OSError):
            return _download(mirror + name, downloads, lambda path: check_integrity(path, md5), progress)
    return _download(last + name, downloads, lambda path: check_integrity(path, md5), progress)


def load_mnist(root: Union[str, Path], train: bool) -> Samples:
    """Reads MNIST from its IDX files, in ROOT/MNIST/raw as torchvision keeps them.

    Args:
        root: Data folder.
        train: The 60,000 training images, or the 10,000 test images.

    Returns:
        Images (N, 1, 28, 28), uint8, and labels.

    Raises:
        FileNotFoundError: The files are not there.
        ValueError: They are damaged.
    """
    raw = Path(root) / 'MNIST' / 'raw'
    part = 'train' if train else 't10k'
    repair = f'delete {raw}, and make it again with: timm-smpconv data mnist {root}'
    names = (f'{part}-images-idx3-ubyte', f'{part}-labels-idx1-ubyte')
    if not all((raw / name).is_file() for name in names):
        raise FileNotFoundError(
            f'No MNIST under {root}: expected the unpacked IDX files (train-images-idx3-ubyte ...) in {raw}. Make them '
            f'with: timm-smpconv data mnist {root}'
        )
    try:
        images, labels = read_image_file(str(raw / names[0])), read_label_file(str(raw / names[1]))
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as e:
        raise ValueError(f'{names[0]} or {names[1]} in {raw} is damaged: {repair}') from e
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or (len(labels) and labels.max() > 9):
        raise ValueError(
            f'The files {" and ".join(names)} in {raw} do not belong together (images {tuple(images.shape)}, labels '
            f'{tuple(labels.shape)}): {repair}'
        )
    return Samples(images.unsqueeze(1), labels)


# CIFAR-10


def _make_cifar10(target: Path, files: List[Path], downloads: Path, progress: bool) -> Dict[str, int]:
    files = _tar_files(files, PurePosixPath(_CIFAR10_URL).name)
    if not files:
        files = [_download(_CIFAR10_URL, downloads, _has_sha256(_CIFAR10_HASH), progress)]
    for part in _CIFAR10_COUNTS:
        for name in CIFAR10:
            (target / part / name).mkdir(parents=True)
    counts = dict.fromkeys(_CIFAR10_COUNTS, 0)
    for file in files:
        for name, read in _members(file, progress):
            base = PurePosixPath(name).name
            match = _CIFAR10_IMAGE.fullmatch(name)
            if match and match[2] in CIFAR10:
                content = read()
                _check_image(content, f'{name} in {file}')
                (target / match[1] / match[2] / f'{match[3]}.{match[4]}').write_bytes(content)
                counts[match[1]] += 1
            elif re.fullmatch(r'(data_batch_\d|test_batch)\.bin', base):
                part = 'test' if base == 'test_batch.bin' else 'train'
                counts[part] += _write_records(read(), target / part, counts[part], name)
            elif base in ('data_batch_1', 'test_batch'):
                raise ValueError(
                    f'{file} is the pickled version of CIFAR-10, which could run any code: use the binary version, '
                    f'{_CIFAR10_URL}.'
                )
    if counts != _CIFAR10_COUNTS:
        raise ValueError(
            f'Expected {_CIFAR10_COUNTS["train"]} training and {_CIFAR10_COUNTS["test"]} test images in '
            f'cifar-10-binary.tar.gz or in an archive of train/CLASS/* and test/CLASS/* (classes '
            f'{", ".join(CIFAR10)}), found {counts["train"]} and {counts["test"]}.'
        )
    return counts


def _check_image(content: bytes, what: str) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            if size == (32, 32):
                image.load()
    except Exception as e:  # Pillow fails in any way on damaged images
        raise ValueError(f'{what} is no readable image ({one_line(e)}).') from e
    if size != (32, 32):
        raise ValueError(f'{what} is {size[0]} x {size[1]}, expected 32 x 32.')


def _write_records(content: bytes, folder: Path, start: int, name: str) -> int:
    """Writes the images of one file of the binary version: records of a label and 3 x 32 x 32 bytes."""
    if len(content) % 3073:
        raise ValueError(f'{name} has {len(content)} bytes, expected a multiple of 3073.')
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    if records[:, 0].max(initial=0) >= len(CIFAR10):
        raise ValueError(f'{name} has a label above {len(CIFAR10) - 1}.')
    for i, record in enumerate(records):
        image = Image.fromarray(np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)))
        image.save(folder / CIFAR10[record[0]] / f'{start + i:05}.png', compress_level=1)
    return len(records)


# Speech Commands


def _make_speech(target: Path, files: List[Path], downloads: Path, progress: bool) -> Dict[str, int]:
    files = _tar_files(files, PurePosixPath(_SPEECH_URL).name)
    if not files:
        files = [_download(_SPEECH_URL, downloads, _has_sha256(_SPEECH_HASH), progress)]
    if len(files) > 2:
        raise ValueError(f'Expected the official archive, or one of training and one of test data, got {len(files)}.')
    if len(files) == 2 and 'test' in files[0].name.lower() and 'train' in files[1].name.lower():  # a shell sorts *
        raise ValueError(
            f'Expected the training data first, got {files[0].name} and then {files[1].name}: give them in the other '
            f'order.'
        )
    tests: Optional[Set[str]] = None
    read = []
    for file in files:
        recordings, listed = _read_recordings(file, progress)
        read.append(recordings)
        tests = listed if tests is None else tests
    if len(files) == 1:
        if tests is None:
            raise ValueError(
                f'{files[0]} has no testing_list.txt: give the official archive of Speech Commands v0.02, or two '
                f'archives, of training and of test data.'
            )
        chosen = {key for key in read[0] if f'{key[0]}/{key[1]}_nohash_{key[2]}.wav' in tests}
        parts = dict(
            train={key: read[0][key] for key in read[0] if key not in chosen},
            test={key: read[0][key] for key in chosen},
        )
        if len(chosen) != _SPEECH_TESTS:
            raise ValueError(
                f'{files[0]} has {len(chosen)} test recordings of the ten words, expected {_SPEECH_TESTS}.'
            )
    else:
        parts = dict(zip(('train', 'test'), read))
    shared = {key[1] for key in parts['train']} & {key[1] for key in parts['test']}
    if shared:
        raise ValueError(f'{len(shared)} speakers are in both training and test data, {min(shared)} for one.')
    for part, recordings in parts.items():
        missing = [word for word in SPEECH_WORDS if word not in {key[0] for key in recordings}]
        if missing:
            raise ValueError(f'The {part} data has no recording of {", ".join(missing)}: expected WORD/*_nohash_*.')
        keys = sorted(recordings)
        save_tensors(
            target / f'{part}.safetensors',
            dict(
                waves=torch.from_numpy(np.stack([recordings[key] for key in keys])),
                labels=torch.tensor([SPEECH_WORDS.index(key[0]) for key in keys]),
                speakers=torch.tensor([speaker_number(key[1]) for key in keys]),
            ),
            dict(
                words=SPEECH_WORDS,
                sample_rate=RATE,
                source='Speech Commands v0.02 (Warden 2018, CC BY 4.0), from ' + ', '.join(f.name for f in files),
            ),
        )
    return {part: len(recordings) for part, recordings in parts.items()}


def _check_order(folder: Path, files: List[Path]) -> None:
    """Refuses two archives whose names do not say which one is the training data, as numbers would."""
    official = PurePosixPath(_SPEECH_URL).name
    archives = _tar_files(files, official)
    if len(archives) == 2 and len({re.sub(r'\d+', '', archive.name) for archive in archives}) == 2:
        raise ValueError(
            f'{folder} holds {archives[0].name} and {archives[1].name}, and does not say which of them is the training '
            f'data: expected both archives by name, training data first, or a folder with {official}.'
        )


def _read_recordings(file: Path, progress: bool) -> Tuple[Dict[Tuple[str, str, int], np.ndarray], Optional[Set[str]]]:
    """Recordings of the ten words by word, speaker and number, and the names in testing_list.txt."""
    recordings: Dict[Tuple[str, str, int], np.ndarray] = {}
    listed = None
    for name, read in _members(file, progress):
        if PurePosixPath(name).name == 'testing_list.txt':
            listed = set(read().decode(errors='replace').split())
        match = _RECORDING.fullmatch(name)
        if match and match[1] in SPEECH_WORDS:
            samples = _decode(read(), f'{name} in {file}')[:RATE]
            recordings[match[1], match[2], int(match[3])] = np.pad(samples, (0, RATE - len(samples)))
    return recordings, listed


def _decode(content: bytes, name: str) -> np.ndarray:
    """Samples of a sound file of 16 kHz, one channel and 16 bits, as int16."""
    sound = decode_sound(content, name)
    kind = sound.rate, sound.samples.shape[1], sound.bits
    if kind != (RATE, 1, 16):
        raise ValueError(f'{name}: expected {RATE} Hz, 1 channel and 16 bits, got {kind[0]}, {kind[1]} and {kind[2]}.')
    return (sound.samples[:, 0] * 32768).astype(np.int16)


def speaker_number(speaker: str) -> int:
    """What stands for a speaker in `Samples`: a hash of the name."""
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:7], 'big')


def load_speech(root: Union[str, Path], train: bool) -> Samples:
    """Reads the ten words of Speech Commands, as `prepare` writes them.

    Args:
        root: Data folder.
        train: Training or test data.

    Returns:
        Waves (N, 16000), int16, labels in the order of SPEECH_WORDS, and speakers.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is of another kind.
    """
    tensors = _load(root, 'speech_commands', train, dict(waves=(RATE,), labels=(), speakers=()))
    return Samples(tensors['waves'], tensors['labels'], tensors['speakers'])


def _load(
    root: Union[str, Path], name: str, train: bool, shapes: Dict[str, Tuple[int, ...]]
) -> Dict[str, torch.Tensor]:
    path = Path(root) / name / f'{"train" if train else "test"}.safetensors'
    if not path.is_file():
        raise FileNotFoundError(f'No {path}. Make it with: timm-smpconv data {name} {root}')
    try:
        tensors = load_file(path)
    except SafetensorError as e:
        raise ValueError(f'{path} is not a readable safetensors file ({one_line(e)}).') from e
    if {key: tuple(value.shape[1:]) for key, value in tensors.items()} != shapes:
        raise ValueError(f'{path} is not what "timm-smpconv data {name}" writes: delete its folder and make it again.')
    return tensors


# Character trajectories


def _read_zipped(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except RuntimeError as e:  # encrypted, or packed in a way of its own
        raise ValueError(f'{name} in {archive.filename} cannot be read ({one_line(e)}).') from e


def _make_trajectories(target: Path, files: List[Path], downloads: Path, progress: bool) -> Dict[str, int]:
    if not files:
        files = [_download(_TRAJECTORIES_URL, downloads, zipfile.is_zipfile, progress)]
    texts: Dict[str, str] = {}
    for file in files:
        if file.suffix == '.zip':
            with _readable(file), zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith('.ts'):
                        texts[PurePosixPath(name).name] = _read_zipped(archive, name).decode(errors='replace')
        elif file.suffix == '.ts':
            texts[file.name] = file.read_text(errors='replace')
    counts = {}
    for part, expected in _TRAJECTORY_COUNTS.items():
        name = f'CharacterTrajectories_{part.upper()}.ts'
        if name not in texts:
            raise ValueError(f'Character trajectories come as {name} or in a .zip that holds it: it is missing.')
        inputs, labels = _parse_ts(texts[name], name)
        if len(labels) != expected:
            raise ValueError(f'{name} has {len(labels)} trajectories, expected {expected}.')
        counts[part] = len(labels)
        save_tensors(
            target / f'{part}.safetensors',
            dict(inputs=inputs, labels=labels),
            dict(characters=CHARACTERS, source=name),
        )
    return counts


def _parse_ts(text: str, name: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """Trajectories, (N, 3, 182), and labels of a .ts file: lines of three series and a class from 1 to 20."""
    inputs, labels = [], []
    data = False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not data or not line:
            data = data or line.lower() == '@data'
            continue
        *channels, label = line.split(':')
        try:
            series = np.array([[float(value) for value in channel.split(',')] for channel in channels], np.float32)
            index = int(label) - 1
        except ValueError as e:  # also: channels of different lengths
            raise ValueError(
                f'{name}, line {number}: expected series of numbers of one length and a class ({e}).'
            ) from e
        if series.ndim != 2 or len(series) != 3 or series.shape[1] > _TRAJECTORY or not np.isfinite(series).all():
            raise ValueError(
                f'{name}, line {number}: expected 3 series of at most {_TRAJECTORY} finite numbers, got shape '
                f'{series.shape}.'
            )
        if not 0 <= index < len(CHARACTERS):
            raise ValueError(f'{name}, line {number}: expected a class from 1 to {len(CHARACTERS)}, got {label!r}.')
        inputs.append(np.pad(series, ((0, 0), (0, _TRAJECTORY - series.shape[1])), mode='edge'))
        labels.append(index)
    if not inputs:
        raise ValueError(f'{name} has no lines behind @data.')
    return torch.from_numpy(np.stack(inputs)), torch.tensor(labels)


def load_character_trajectories(root: Union[str, Path], train: bool) -> Samples:
    """Reads the character trajectories, as `prepare` writes them.

    Args:
        root: Data folder.
        train: Training or test data.

    Returns:
        Trajectories (N, 3, 182), float32, and labels in the order of CHARACTERS.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is of another kind.
    """
    tensors = _load(root, 'character_trajectories', train, dict(inputs=(3, _TRAJECTORY), labels=()))
    return Samples(tensors['inputs'], tensors['labels'])


_PARTS = ('train.safetensors', 'test.safetensors')
# by name: function that makes it, its folder, what the folder must hold
DATA_SETS: Dict[str, Tuple[Callable[[Path, List[Path], Path, bool], Dict[str, int]], str, Tuple[str, ...]]] = {
    'mnist': (_make_mnist, 'MNIST', tuple(f'raw/{name}' for name in _MNIST_MD5)),
    'cifar10': (_make_cifar10, 'cifar10', tuple(f'{part}/{name}' for part in ('train', 'test') for name in CIFAR10)),
    'speech_commands': (_make_speech, 'speech_commands', _PARTS),
    'character_trajectories': (_make_trajectories, 'character_trajectories', _PARTS),
}
