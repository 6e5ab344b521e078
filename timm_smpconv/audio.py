"""Sound files of any kind to the one second at 16 kHz that the speech networks hear."""

import dataclasses
import io
import wave
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch

from ._text import one_line

__all__ = ['RATE', 'Sound', 'decode_sound', 'load_second', 'resample']

RATE = 16000  # samples per second, and of a recording
_MAX_RATE = 10_000_000  # of any file; more is a damaged header, and would be a second of that many samples


@dataclasses.dataclass(frozen=True)
class Sound:
    """What a sound file holds.

    Attributes:
        samples: (N, channels), float32 within [-1, 1]; exact for files of up to 24 bits.
        rate: Samples per second.
        bits: Bits of a sample as stored, 0 where that has no meaning.
    """

    samples: np.ndarray
    rate: int
    bits: int


def decode_sound(content: bytes, name: str) -> Sound:
    """Decodes a sound file: WAV by Python itself, other formats (FLAC, Ogg ...) by the package soundfile.

    Args:
        content: The file.
        name: Its name, for messages.

    Raises:
        ValueError: It cannot be read, or soundfile is needed and not installed.
    """
    problem = ''
    try:
        if content[:4] == b'RIFF':
            try:
                return _decode_wav(content)
            except (wave.Error, EOFError) as e:  # floating point, another codec, or a header that is odd or damaged
                problem = f' ({one_line(e)})'
        soundfile = _soundfile(name, problem)
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            bits = {'PCM_S8': 8, 'PCM_U8': 8, 'PCM_16': 16, 'PCM_24': 24, 'PCM_32': 32}.get(file.subtype, 0)
            return Sound(file.read(file.frames, dtype='float32', always_2d=True), file.samplerate, bits)
    except RuntimeError as e:  # of soundfile
        reason = getattr(e, 'error_string', e)  # without the address of the object
        raise ValueError(f'{name} is not a readable WAV or FLAC file ({reason}).') from e


def _decode_wav(content: bytes) -> Sound:
    with wave.open(io.BytesIO(content)) as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        data = np.frombuffer(file.readframes(file.getnframes() + 1), np.uint8)  # all, also of larger blocks
        rate = file.getframerate()
    bits = 8 * width
    header = content.find(b'fmt ') + 8
    block = int.from_bytes(content[header + 12 : header + 14], 'little')  # bytes of a sample of all channels
    if width == 3 and block == 4 * channels:  # 24 bits in the upper bytes of 32
        width = 4
    if not rate or not channels or width not in (1, 2, 3, 4):
        raise wave.Error(f'{rate} Hz, {channels} channels, {8 * width} bits')
    data = data[: len(data) // (width * channels) * width * channels]  # a file that was cut off ends anywhere
    if width == 1:  # the only unsigned one
        values = (data.astype(np.float32) - 128) / 128
    else:
        if width == 3:  # as the upper bytes of 32 bits
            padded = np.zeros((len(data) // 3, 4), np.uint8)
            padded[:, 1:] = data.reshape(-1, 3)
            data, width = padded.reshape(-1), 4
        values = data.view(f'<i{width}').astype(np.float32)
        values *= 0.5 ** (8 * width - 1)  # a power of two: rounds nothing
    return Sound(values.reshape(-1, channels), rate, bits)


def _soundfile(name: str, problem: str) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as e:  # OSError: without the library that it wraps
        raise ValueError(
            f'{name} is no plain WAV file{problem}: FLAC and other formats need pip install soundfile.'
        ) from e
    return soundfile


def load_second(path: Union[str, Path]) -> torch.Tensor:
    """Reads the second of a sound file with the most energy, as the recordings of Speech Commands are stored.

    Args:
        path: Sound file of any rate and number of channels.

    Returns:
        Samples at 16 kHz, (16000,), where 32768 is full scale; what is missing at the end is silence.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It cannot be decoded, or is empty.
    """
    path = Path(path)
    sound = decode_sound(path.read_bytes(), path.name)
    # floating-point files can hold anything; in place, as hours of sound take gigabytes
    samples = np.nan_to_num(sound.samples, copy=False, posinf=0.0, neginf=0.0)
    samples = np.clip(samples, -1.0, 1.0, out=samples).mean(1)
    if not len(samples):
        raise ValueError(f'{path.name} has no samples.')
    if sound.rate > _MAX_RATE:
        raise ValueError(f'{path.name} has {sound.rate} samples per second, expected at most {_MAX_RATE}.')
    if len(samples) > sound.rate:
        energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
        first = int(np.argmax(energy[sound.rate :] - energy[: -sound.rate]))
        samples = samples[first : first + sound.rate]
    samples = np.pad(samples, (0, sound.rate - len(samples)))
    return resample(torch.from_numpy(samples), RATE) * 32768


def resample(waves: torch.Tensor, steps: int) -> torch.Tensor:
    """Brings sounds to another number of samples for the same time.

    Below the lower of the two limits (half the number of samples) nothing changes, above it nothing is left.

    Args:
        waves: Sounds, (..., N).
        steps: New number of samples.

    Returns:
        Sounds, (..., steps).
    """
    if waves.shape[-1] == steps:
        return waves
    spectrum = torch.fft.rfft(waves)[..., : steps // 2 + 1]
    return torch.fft.irfft(spectrum, n=steps) * (steps / waves.shape[-1])
