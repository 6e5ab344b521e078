"""Sound files of many kinds, against samples that are known."""

import io
import wave

import numpy as np
import pytest
import torch

from timm_smpconv.audio import decode_sound, load_second, resample


def tone(pitch, rate, seconds=1.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def wav(samples, rate=16000, width=2):
    """A WAV file of samples (N,) or (N, channels) within [-1, 1]."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    if width == 1:
        data = (samples * 127 + 128).round().astype(np.uint8).tobytes()
    else:
        whole = (samples * (2 ** (8 * width - 1) - 1)).round().astype('<i4')
        data = np.ascontiguousarray(whole[..., None].view(np.uint8)[..., :width]).tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


@pytest.mark.parametrize('width, tolerance', [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
@pytest.mark.parametrize('channels', [1, 2])
def test_wav_of_all_widths(width, tolerance, channels):
    samples = np.stack([tone(440 * (i + 1), 8000) for i in range(channels)], 1)
    sound = decode_sound(wav(samples, 8000, width), 'a.wav')
    assert sound.rate == 8000 and sound.bits == 8 * width and sound.samples.dtype == np.float32
    np.testing.assert_allclose(sound.samples, samples, rtol=0, atol=tolerance)


@pytest.mark.parametrize('width', [2, 3, 4])
def test_samples_are_exact(width):
    """Up to the 24 bits of a float32."""
    largest = 2 ** (8 * width - 1)
    step = 256 if width == 4 else 1
    values = np.array([-largest, -largest + step, -step, 0, step, 12345 * step, largest - step])
    data = np.ascontiguousarray(values.astype('<i4')[:, None].view(np.uint8)[:, :width]).tobytes()
    header = wav(np.zeros(len(values)), width=width)[:44]
    sound = decode_sound(header + data, 'a.wav')
    assert (sound.samples[:, 0].astype(np.float64) * largest).tolist() == values.tolist()
    assert sound.bits == 8 * width


def test_samples_in_larger_blocks():
    """24 bits in the upper three of four bytes each, which Python's own reader takes for three."""
    content = bytearray(wav(tone(440, 16000), width=4))
    content[34:36] = (24).to_bytes(2, 'little')  # of the four bytes the block tells, which stays
    sound = decode_sound(bytes(content), 'a.wav')
    np.testing.assert_allclose(sound.samples[:, 0], tone(440, 16000), rtol=0, atol=1e-6)
    assert sound.bits == 24


def test_header_of_a_stream():
    """Written before its length was known."""
    soundfile = pytest.importorskip('soundfile')
    content = bytearray(wav(tone(440, 16000)))
    content[4:8] = bytes(4)
    wanted, _ = soundfile.read(io.BytesIO(bytes(content)), dtype='float32')
    sound = decode_sound(bytes(content), 'a.wav')
    assert len(wanted) == 16000 and (sound.samples[:, 0] == wanted).all()


@pytest.mark.parametrize('kind', [('WAV', 'FLOAT'), ('WAVEX', 'FLOAT'), ('FLAC', 'PCM_24'), ('OGG', 'VORBIS')])
def test_other_formats(kind):
    soundfile = pytest.importorskip('soundfile')
    samples, buffer = tone(440, 16000), io.BytesIO()
    soundfile.write(buffer, samples, 16000, format=kind[0], subtype=kind[1])
    sound = decode_sound(buffer.getvalue(), 'a')
    assert sound.rate == 16000 and sound.bits == {'PCM_24': 24}.get(kind[1], 0)
    np.testing.assert_allclose(sound.samples[:, 0], samples, rtol=0, atol=0.05 if kind[0] == 'OGG' else 1e-6)


@pytest.mark.parametrize('content', [b'', b'RIFF', b'RIFF\0\0\0\0WAVE', b'text, not sound', wav(np.zeros(9))[:30]])
def test_no_sound(content):
    pytest.importorskip('soundfile')
    with pytest.raises(ValueError, match='a.wav is not a readable WAV or FLAC file'):
        decode_sound(content, 'a.wav')


def test_second_of_any_rate(tmp_path):
    """A tone is the same tone at 16 kHz, from any rate."""
    wanted = torch.from_numpy(tone(440, 16000)).float() * 32768
    for rate in (8000, 16000, 22050, 44100):
        (tmp_path / 'a.wav').write_bytes(wav(tone(440, rate), rate))
        second = load_second(tmp_path / 'a.wav')
        assert second.shape == (16000,)
        assert (second - wanted).abs().max() < 5


def test_loudest_second_and_silence(tmp_path):
    file = tmp_path / 'a.wav'
    quiet, loud = tone(200, 16000, 2.0, 0.01), tone(300, 16000)
    file.write_bytes(wav(np.concatenate([quiet, loud, quiet])))
    np.testing.assert_allclose(load_second(file) / 32768, loud, atol=1e-3)
    file.write_bytes(wav(np.stack([loud[:4000], loud[:4000]], 1)))
    second = load_second(file) / 32768
    np.testing.assert_allclose(second[:4000], loud[:4000], atol=1e-4)
    assert (second[4000:] == 0).all()
    file.write_bytes(wav(np.zeros(0)))
    with pytest.raises(ValueError, match='a.wav has no samples'):
        load_second(file)
    with pytest.raises(FileNotFoundError):
        load_second(tmp_path / 'b.wav')


def test_resample_there_and_back():
    low = torch.from_numpy(np.stack([tone(50, 100), tone(30, 100)])).float()
    low[0] = 0.25
    assert resample(low, 100) is low
    torch.testing.assert_close(resample(resample(low, 257), 100), low, rtol=0, atol=1e-5)


def test_sounds_that_no_microphone_makes(tmp_path):
    """Numbers out of all bounds in a floating-point file, and a header that asks for gigabytes."""
    soundfile = pytest.importorskip('soundfile')
    samples = np.zeros(16000, np.float32)
    samples[:3] = float('inf'), float('nan'), 1e30
    soundfile.write(tmp_path / 'a.wav', samples, 16000, subtype='FLOAT')
    heard = load_second(tmp_path / 'a.wav')
    assert heard.isfinite().all() and heard.abs().max() <= 32768
    content = bytearray(wav(np.zeros(50)))
    content[24:28] = (2 * 10**9).to_bytes(4, 'little')
    (tmp_path / 'b.wav').write_bytes(content)
    with pytest.raises(ValueError, match='samples per second'):
        load_second(tmp_path / 'b.wav')
