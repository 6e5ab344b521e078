"""The table of weights: what exists for each model, where it comes from, how good it is and how to recognise it.

README.md, MODEL_CARD.md, the cards under hub/ and `timm-smpconv list` are made from it.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

__all__ = [
    'WEIGHTS',
    'Weights',
    'WeightsError',
    'bundled_path',
    'fixed_input',
    'design_effect',
    'hub_repo',
    'training_speakers',
    'wilson',
]

_FOLDER = Path(__file__).resolve().parent / 'pretrained'


class WeightsError(RuntimeError):
    """Weights cannot be had, or are not what they should be: the message names model, source, cause and remedy."""


@dataclass(frozen=True)
class Weights:
    """One set of weights, `model.tag`.

    Attributes:
        trained_on: Data that the weights were or would be trained on.
        paper_accuracy: Top-1 test accuracy that the paper reports, in percent.
        license: Licence of the weights.
        bundled: File name of weights that come with this package, trained by this project.
        authors_file: Google Drive id of the checkpoint published by the authors (MIT licence).
        size: Bytes of the file of weights (model.safetensors), where known.
        sha256: Its hash, where known. Neither is known for the authors' weights before they have been fetched.
        correct: Test inputs that the bundled weights classify right, measured by `timm-smpconv validate`.
        tested: Test inputs of that measurement.
        test_data: What the test inputs are, for a sentence.
        effect: Design effect of the test inputs, which widens the interval; 1 if none is known.
        why: Why the measured accuracy is not the paper's, in brief.
        note: The same at length: how the weights were trained.
        logits: Output of the bundled weights for `fixed_input`.
        speakers: File name of a list of the speakers that the bundled weights were trained on, where they are of the
            test split.
    """

    trained_on: str
    paper_accuracy: float
    license: str = 'mit'
    bundled: Optional[str] = None
    authors_file: Optional[str] = None
    size: Optional[int] = None
    sha256: Optional[str] = None
    correct: Optional[int] = None
    tested: Optional[int] = None
    effect: float = 1.0
    test_data: str = ''
    why: str = ''
    note: str = ''
    logits: Optional[Tuple[float, ...]] = None
    speakers: Optional[str] = None

    @property
    def accuracy(self) -> Optional[float]:
        """Top-1 test accuracy of the bundled weights, measured by this project, in percent."""
        return None if self.correct is None or not self.tested else 100 * self.correct / self.tested

    @property
    def source(self) -> str:
        """Where the weights are, in a few words."""
        if self.bundled:
            return 'bundled'
        return 'published by the authors' if self.authors_file else 'none published'

    @property
    def authors_url(self) -> Optional[str]:
        """Page of the checkpoint published by the authors, for a browser."""
        return self.authors_file and f'https://drive.google.com/file/d/{self.authors_file}/view'


WEIGHTS: Dict[str, Weights] = {
    'smpconv_tiny.in1k': Weights('ImageNet-1k', 82.5, authors_file='1xT9Y4cAj4I6rmNJ28-Mh4_APcsEqeJ1V'),
    'smpconv_base.in1k': Weights('ImageNet-1k', 83.8, authors_file='16gd2KFnK1fgdEpOulnCYo2KaPl547zT9'),
    'smpconv_mobile31.in1k': Weights('ImageNet-1k', 73.5),
    'smpconv_mobile51.in1k': Weights('ImageNet-1k', 73.7),
    'pelk_tiny.in1k': Weights('ImageNet-1k', 82.6),
    'pelk_small.in1k': Weights('ImageNet-1k', 83.9),
    'pelk_base.in1k': Weights('ImageNet-1k', 84.2),
    'pelk_base_101.in1k': Weights('ImageNet-1k', 85.8),
    'smpconv_cifar.c10': Weights(
        'CIFAR-10',
        93.00,
        bundled='smpconv_cifar.c10.safetensors',
        authors_file='1aKwORBf-lplfdwB8WEcBRRAL7IA4ejth',
        size=2024096,
        sha256='d5db74c3af8e70ed43765492745324bc563149af6b27311e8cfe8bf2ce84bbbf',
        correct=9047,
        tested=10000,
        test_data='test images of CIFAR-10, as JPEG of quality 75',
        why='63 epochs at full resolution and 47 at half instead of 210, on JPEG instead of lossless images.',
        note='Trained for 29 epochs at half resolution and seven and a third at full resolution, some ten hours on '
        'one and two CPU cores; then on a GPU 14 at full resolution in six minutes and, with a ResNet-18 as the '
        'teacher, 18 at half and 42 at full resolution in five; the paper trains for 210 epochs, on the lossless '
        'images.',
        logits=(2.453, 0.1123, -0.711, -1.1495, -0.765, -1.0896, 1.0874, -1.1624, 1.4329, -0.5485),
    ),
    'smpconv_seq_mnist.smnist': Weights(
        'MNIST, pixel by pixel',
        99.75,
        bundled='smpconv_seq_mnist.smnist.safetensors',
        authors_file='164qRzZs1kvuoOr34FLukGIQAI7PAYWUf',
        size=1551280,
        sha256='0168393c939894a432d5f809c86edc4397fdd417548728e804eacf1a0b5a481b',
        correct=9950,
        tested=10000,
        test_data='test images of MNIST',
        why='6 epochs instead of 200.',
        note='Trained for 6 epochs, an hour and a half on two CPU cores, where the paper trains for 200.',
        logits=(-3.1343, -3.2333, -0.446, 0.3056, -4.6989, 0.3376, -5.7499, 0.479, -1.8645, -1.522),
    ),
    'smpconv_seq_pmnist.pmnist': Weights(
        'MNIST, permuted pixels',
        99.10,
        bundled='smpconv_seq_pmnist.pmnist.safetensors',
        authors_file='1no63cSqPgSJIkW8-iSvrAA1pFlurOKsh',
        size=1557640,
        sha256='49af08e16159f432f9ac05632e4da2df42b8f394e455bbc46fe8e440feac893e',
        correct=9868,
        tested=10000,
        test_data='test images of MNIST, pixels permuted',
        why='50 epochs instead of 200.',
        note='Trained for 12 epochs, three and a half hours on one CPU core, ten on a GPU in four minutes, and 28 on '
        'two CPU cores in two hours; the paper trains for 200.',
        logits=(0.9086, -4.3713, 3.0999, 1.2775, -1.9174, -0.4654, -0.2183, -4.1582, 5.3042, 0.0407),
    ),
    'smpconv_seq_cifar.scifar10': Weights(
        'CIFAR-10, pixel by pixel',
        84.86,
        bundled='smpconv_seq_cifar.scifar10.safetensors',
        authors_file='1ilu1Oo74B4bC8cjkoIavPqJmEK34PhYg',
        size=1562416,
        sha256='8f4bba1ca8d9bfaed1a75faa44465d31451aba85bb270457ef27c7ba80e55f2f',
        correct=8414,
        tested=10000,
        test_data='test images of CIFAR-10, as JPEG of quality 75',
        why='97 epochs of the whole sequence and 54 of a fourth of it instead of 200, on JPEG instead of lossless '
        'images.',
        note='Trained for 34 epochs at a fourth of the columns and eight and a half at full resolution, some seven '
        'hours on one CPU core; then on a GPU 32 at full resolution in ten minutes and, with a ResNet-18 as the '
        'teacher, 20 at a fourth of the columns and 30 at full resolution in three; then with smpconv_cifar.c10 as '
        'the teacher 27 on two CPU cores in two hours and three quarters; the paper trains for 200 epochs, on the '
        'lossless images.',
        logits=(0.7759, -0.9423, 3.3595, -0.8183, -0.7205, 0.2002, 0.4358, -1.1266, -0.5796, -0.5824),
    ),
    'smpconv_seq_chartraj.ct': Weights(
        'Character trajectories', 99.53, authors_file='1Jxy00LiTdjTXa-kYH7cJYX2s1A2yJSPK'
    ),
    'smpconv_seq_speech.sc': Weights(
        'Speech Commands, MFCC',
        97.71,
        bundled='smpconv_seq_speech.sc.safetensors',
        authors_file='1AKmeyBDkv0v5qk8GF4vkecY6PgR2JpGP',
        size=1635888,
        sha256='65e45fdc2dd484c5dd5921440f3ff5af5461e7aa52e7f530908c2d957f252b64',
        correct=1510,
        tested=1616,
        effect=1.635,
        test_data='recordings of the ten words by speakers that were not trained on, two fifths of the official test '
        'split',
        why='2,458 training recordings instead of 24,500: not comparable.',
        note='Trained on 2,458 recordings, the other three fifths of that split, where the paper has 70 % of 34,975: '
        'not comparable. Three seeds: 93.42 % on average, standard deviation 0.59.',
        logits=(-0.894, -1.2862, 0.7639, -0.3262, 3.0244, -0.4561, -0.6736, -0.5333, 0.6543, -0.5387),
        speakers='speech_commands.speakers.txt',
    ),
    'smpconv_seq_speech_raw.sc_raw': Weights(
        'Speech Commands, raw audio',
        94.95,
        bundled='smpconv_seq_speech_raw.sc_raw.safetensors',
        authors_file='15OWR-ZZIVu12pTtdCU1Dyv87yxwIhRlu',
        size=1551280,
        sha256='573675b5e60eb85cbabf1c7d22020bb810b6075ea430c5d3bde3c84e0c9dd32b',
        correct=1405,
        tested=1616,
        effect=3.2934,
        test_data='recordings of the ten words by speakers that were not trained on, two fifths of the official test '
        'split',
        why='2,458 training recordings instead of 24,500: not comparable.',
        note='Trained on 2,458 recordings, the other three fifths of that split: 58 epochs at a fourth of the '
        'sample rate and one at the full rate, four hours on one and two CPU cores; 22 at the full rate with '
        'more augmentation on a GPU in eight minutes, and six with less on two CPU cores; then with '
        'smpconv_seq_speech.sc as the teacher, 43 at half the rate and seven at the full rate on two CPU '
        'cores in three and a half hours; the paper has 70 % of 34,975 recordings and 160 epochs: not '
        'comparable.',
        logits=(-0.095, -0.9455, -3.7997, -0.2165, -0.4017, -0.8958, -1.0296, 2.5553, -0.2873, 0.4208),
        speakers='speech_commands.speakers.txt',
    ),
}


def bundled_path(name: str) -> Optional[Path]:
    """File of the weights `model.tag` if they come with this package."""
    bundled = WEIGHTS[name].bundled if name in WEIGHTS else None
    return _FOLDER / bundled if bundled else None


def training_speakers(name: str) -> List[str]:
    """Speakers of the test split that the bundled weights `model.tag` were trained on."""
    speakers = WEIGHTS[name].speakers
    return (_FOLDER / speakers).read_text(encoding='utf-8').split() if speakers else []


def hub_repo(name: str) -> str:
    """Repository of the weights `model.tag` on the Hugging Face Hub.

    The organisation is `timm-smpconv`, or that of the environment variable `TIMM_SMPCONV_HUB_ORG`.
    """
    return f'{os.environ.get("TIMM_SMPCONV_HUB_ORG") or "timm-smpconv"}/{name}'


def fixed_input(input_size: Tuple[int, ...]) -> torch.Tensor:
    """The input for which the table lists logits: a wave, the same on every machine.

    Args:
        input_size: Channels, height, width.

    Returns:
        Network input of one sample, (1, channels, height, width), within [-1, 1].
    """
    steps = torch.arange(math.prod(input_size), dtype=torch.float64)
    return (0.37 * steps + 1e-4 * steps.remainder(1009) ** 2).sin().float().reshape(1, *input_size)


def design_effect(right: torch.Tensor, groups: torch.Tensor) -> float:
    """How many times larger the variance of a proportion is since samples of a group resemble each other.

    The variance of a ratio of sums over groups drawn at random (Cochran, Sampling Techniques, 1977), relative to that
    of independent samples.

    Args:
        right: What is counted, (N,), bool.
        groups: Group of each sample, (N,).

    Returns:
        At least 1.
    """
    _, index = groups.unique(return_inverse=True)
    count = int(index.max()) + 1
    share = right.double().mean()
    if count < 2 or not 0 < share < 1:
        return 1.0
    excess = torch.zeros(count, dtype=torch.double).index_add_(0, index, right.double() - share)
    variance = count / (count - 1) * excess.square().sum()
    return max(float(variance / (len(right) * share * (1 - share))), 1.0)


def wilson(hits: int, total: int, effect: float = 1.0) -> Tuple[float, float]:
    """95 % interval of a proportion, as fractions: unlike the normal one it stays sensible near 100 %.

    Args:
        hits: Samples that count.
        total: All samples.
        effect: Their design effect, see `design_effect`.
    """
    z = 1.959964
    p = hits / total
    total = total / effect
    middle = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
