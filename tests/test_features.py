"""MFCC against numbers of torchaudio, and against torchaudio itself where it is installed."""

import math

import pytest
import timm
import torch

from timm_smpconv import tasks
from timm_smpconv.features import MFCC
from timm_smpconv.tasks import TASKS, network_input

# of torchaudio 2.11: transforms.MFCC(16000, n_mfcc=20, log_mels=True, melkwargs=dict(n_fft=200, hop_length=100,
# n_mels=64)), in float64, for the wave below; its own float32 result differs by 2e-4 from these
EXPECTED = {
    0: [-110.5241] + [0.0] * 19,
    32: [-16.1169, 7.7738, -4.856, -7.2379, -15.1772, -3.1242, 4.9057, -4.4861, -4.0314, 1.1305]
    + [-4.889, -5.2146, 1.8751, 0.5688, -1.8457, 0.4742, -0.069, -1.1857, 0.1227, 0.2187],
    77: [-75.843, -2.3163, -34.5477, 6.1551, 11.3806, -0.4638, 0.0256, -9.7485, 2.457, 12.6405]
    + [-9.0461, -7.2673, 9.9265, 0.325, -5.1937, 1.9492, -0.3955, -0.0273, 2.5493, -2.9642],
    160: [-21.369, -11.8262, -10.2775, 5.4494, -7.1774, -4.6967, 2.1315, -5.0828, -2.9412, 1.4425]
    + [-3.6278, -1.6547, 1.4208, -2.4821, -0.6414, 1.4074, -1.6653, -0.0844, 1.2947, -1.1625],
}


def _wave():
    """Silence, then a rising tone over a steady one."""
    seconds = torch.arange(16000, dtype=torch.float64) / 16000
    wave = 0.3 * (2 * math.pi * (200 * seconds + 1500 * seconds**2)).sin() + 0.1 * (2 * math.pi * 3000 * seconds).sin()
    return (wave * (seconds > 0.2)).unsqueeze(0)


def test_numbers_of_torchaudio():
    features = MFCC()(_wave().float())
    assert features.shape == (1, 20, 161) and features.dtype == torch.float32
    for frame, expected in EXPECTED.items():
        torch.testing.assert_close(features[0, :, frame], torch.tensor(expected), rtol=0, atol=1e-3)


def test_against_torchaudio():
    try:
        transforms = pytest.importorskip('torchaudio').transforms
    except RuntimeError as e:
        pytest.skip(f'torchaudio is of another build than torch: {e}')
    arguments = dict(n_fft=160, hop_length=80, n_mels=40)
    x = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    expected = transforms.MFCC(8000, n_mfcc=13, log_mels=True, melkwargs=arguments)(x)
    torch.testing.assert_close(MFCC(8000, n_mfcc=13, **arguments)(x), expected, rtol=0, atol=1e-3)
    expected = transforms.MFCC(16000, n_mfcc=20, log_mels=True, melkwargs=dict(n_fft=200, hop_length=100, n_mels=64))(x)
    torch.testing.assert_close(MFCC()(x), expected, rtol=0, atol=1e-3)


def test_batches_do_not_matter():
    x = torch.randn(4, 1600, generator=torch.Generator().manual_seed(0))
    mfcc = MFCC()
    torch.testing.assert_close(mfcc(x), torch.cat([mfcc(part) for part in x.split(1)]), rtol=1e-5, atol=1e-5)
    assert not mfcc.state_dict()


def test_more_coefficients_than_bands():
    with pytest.raises(ValueError, match='n_mfcc must not exceed n_mels = 10, got 11'):
        MFCC(n_mels=10, n_mfcc=11)


def test_gradients_after_inference():
    """Saliency of a wave, in a process that has measured before."""
    task, cfg = TASKS['smpconv_seq_speech'], timm.get_pretrained_cfg('smpconv_seq_speech').to_dict()
    tasks._mfcc.cache_clear()
    wave = torch.randn(1, 16000)
    with torch.inference_mode():
        network_input(task, wave, cfg)
    wave.requires_grad_()
    network_input(task, wave, cfg).sum().backward()
    assert wave.grad.abs().sum() > 0
