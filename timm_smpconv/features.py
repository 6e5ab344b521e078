"""Speech features in plain torch."""

import math

import torch
from torch import nn

__all__ = ['MFCC']


class MFCC(nn.Module):
    """Mel-frequency cepstral coefficients of waves, as torchaudio defines them with log_mels=True.

    Power spectrogram of centred frames with reflected ends and a periodic Hann window, mel filters on the HTK scale
    without normalisation, log(mel + 1e-6), orthonormal DCT-II. The defaults are those of the speech networks: one
    second at 16 kHz gives 161 frames of 20 coefficients.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 200,
        hop_length: int = 100,
        n_mels: int = 64,
        n_mfcc: int = 20,
    ):
        """
        Args:
            sample_rate: Samples per second.
            n_fft: Samples of a frame, and length of its Fourier transform.
            hop_length: Samples from one frame to the next.
            n_mels: Mel bands, from 0 to half the sample rate.
            n_mfcc: Coefficients to keep.

        Raises:
            ValueError: More coefficients than bands.
        """
        super().__init__()
        if n_mfcc > n_mels:
            raise ValueError(f'n_mfcc must not exceed n_mels = {n_mels}, got {n_mfcc}.')
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.register_buffer('window', torch.hann_window(n_fft, dtype=torch.float64).float(), persistent=False)
        self.register_buffer('filters', _mel_filters(sample_rate, n_fft, n_mels).float(), persistent=False)
        self.register_buffer('dct', _dct(n_mfcc, n_mels).float(), persistent=False)

    def log_mel(self, waves: torch.Tensor) -> torch.Tensor:
        """Log mel spectrogram, (B, n_mels, frames), of waves (B, samples)."""
        spectrum = torch.stft(
            waves, self.n_fft, self.hop_length, window=self.window, center=True, pad_mode='reflect', return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return (self.filters @ power + 1e-6).log()

    def cepstrum(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Coefficients, (B, n_mfcc, frames), of a log mel spectrogram (B, n_mels, frames)."""
        return self.dct @ log_mel

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """Waves (B, samples) in [-1, 1] to coefficients (B, n_mfcc, 1 + samples // hop_length)."""
        return self.cepstrum(self.log_mel(waves))


def _mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> torch.Tensor:
    """Triangles between points that are equally spaced in mel = 2595 log10(1 + f / 700), (n_mels, n_fft // 2 + 1)."""
    highest = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    mels = torch.linspace(0.0, highest, n_mels + 2, dtype=torch.float64)
    points = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, sample_rate // 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = points.unsqueeze(1) - frequencies
    widths = points.diff().unsqueeze(1)
    return torch.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]).clamp(min=0.0)


def _dct(n_mfcc: int, n_mels: int) -> torch.Tensor:
    """Orthonormal DCT-II, (n_mfcc, n_mels)."""
    positions = torch.arange(n_mels, dtype=torch.float64) + 0.5
    orders = torch.arange(n_mfcc, dtype=torch.float64).unsqueeze(1)
    matrix = (math.pi / n_mels * orders * positions).cos() * math.sqrt(2.0 / n_mels)
    matrix[0] /= math.sqrt(2.0)
    return matrix
