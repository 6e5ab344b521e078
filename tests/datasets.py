"""Made-up data sets in the formats of the originals, and archives of them."""

import io
import tarfile
import wave

import numpy as np
import torch

from timm_smpconv._files import save_tensors
from timm_smpconv.classes import SPEECH_WORDS


def write_mnist(folder, train=25, test=10):
    """IDX files in FOLDER/MNIST/raw."""
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (('train', train), ('t10k', test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], '>i4').tobytes()
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(np.array([0x801, count], '>i4').tobytes() + labels.tobytes())
    return folder


def write_speech(folder, train=30, test=10):
    """What `prepare` makes of Speech Commands, with words that differ in pitch."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(16000) / 16000
    for part, count in (('train', train), ('test', test)):
        labels = torch.arange(count) % 10
        tones = (2 * torch.pi * (300 + 200 * labels.unsqueeze(1)) * seconds).sin()
        waves = 3000 * tones + 300 * torch.randn(count, 16000, generator=generator)
        path = folder / 'speech_commands' / f'{part}.safetensors'
        save_tensors(path, dict(waves=waves.short(), labels=labels, speakers=7 * torch.arange(count)), {})
    return folder


def write_trajectories(folder, train=40, test=20):
    """What `prepare` makes of the character trajectories."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (('train', train), ('test', test)):
        path = folder / 'character_trajectories' / f'{part}.safetensors'
        inputs = 5 + 2 * torch.randn(count, 3, 182, generator=generator)
        save_tensors(path, dict(inputs=inputs, labels=torch.arange(count) % 20), {})
    return folder


def wav(samples, rate=16000, channels=1):
    """Bytes of a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, '<i2').tobytes())
    return buffer.getvalue()


def speech_members(speakers, length=16000):
    """Files of one recording of each word by each speaker."""
    return {
        f'{word}/{speaker}_nohash_0.wav': wav(np.arange(length) % 100 + 100 * i + j)
        for i, word in enumerate(SPEECH_WORDS)
        for j, speaker in enumerate(speakers)
    }


def write_tar(path, members, prefix=''):
    """A tar archive, compressed as its name says, of files by name."""
    kinds = {'.gz': 'w:gz', '.xz': 'w:xz'}
    with tarfile.open(path, kinds.get(path.suffix, 'w')) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
