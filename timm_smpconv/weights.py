"""The table of weights: what exists for each model, where it comes from and how good it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

__all__ = ['WEIGHTS', 'Weights', 'bundled_path']

_FOLDER = Path(__file__).resolve().parent / 'pretrained'


@dataclass(frozen=True)
class Weights:
    """One set of weights, `model.tag`.

    Attributes:
        trained_on: Data that the weights were or would be trained on.
        paper_accuracy: Top-1 test accuracy that the paper reports, in percent.
        bundled: File name of weights that come with this package.
        accuracy: Top-1 test accuracy of the bundled weights, in percent, measured by `timm-smpconv validate`.
        license: Licence of the weights.
        authors_file: Google Drive id of the checkpoint published by the authors (MIT licence).
    """

    trained_on: str
    paper_accuracy: float
    bundled: Optional[str] = None
    accuracy: Optional[float] = None
    license: str = 'mit'
    authors_file: Optional[str] = None

    @property
    def source(self) -> str:
        """Where the weights are, in a few words."""
        if self.bundled:
            return 'bundled'
        return 'published by the authors' if self.authors_file else 'none published'


WEIGHTS: Dict[str, Weights] = {
    'smpconv_tiny.in1k': Weights('ImageNet-1k', 82.5, authors_file='1xT9Y4cAj4I6rmNJ28-Mh4_APcsEqeJ1V'),
    'smpconv_base.in1k': Weights('ImageNet-1k', 83.8, authors_file='16gd2KFnK1fgdEpOulnCYo2KaPl547zT9'),
    'smpconv_mobile31.in1k': Weights('ImageNet-1k', 73.5),
    'smpconv_mobile51.in1k': Weights('ImageNet-1k', 73.7),
    'smpconv_cifar.c10': Weights('CIFAR-10', 93.00, authors_file='1aKwORBf-lplfdwB8WEcBRRAL7IA4ejth'),
    'smpconv_seq_mnist.smnist': Weights(
        'MNIST, pixel by pixel',
        99.75,
        bundled='smpconv_seq_mnist.smnist.safetensors',
        accuracy=99.50,
        authors_file='164qRzZs1kvuoOr34FLukGIQAI7PAYWUf',
    ),
    'smpconv_seq_pmnist.pmnist': Weights(
        'MNIST, permuted pixels', 99.10, authors_file='1no63cSqPgSJIkW8-iSvrAA1pFlurOKsh'
    ),
    'smpconv_seq_cifar.scifar10': Weights(
        'CIFAR-10, pixel by pixel', 84.86, authors_file='1ilu1Oo74B4bC8cjkoIavPqJmEK34PhYg'
    ),
    'smpconv_seq_chartraj.ct': Weights(
        'Character trajectories', 99.53, authors_file='1Jxy00LiTdjTXa-kYH7cJYX2s1A2yJSPK'
    ),
    'smpconv_seq_speech.sc': Weights('Speech Commands, MFCC', 97.71, authors_file='1AKmeyBDkv0v5qk8GF4vkecY6PgR2JpGP'),
    'smpconv_seq_speech_raw.sc_raw': Weights(
        'Speech Commands, raw audio', 94.95, authors_file='15OWR-ZZIVu12pTtdCU1Dyv87yxwIhRlu'
    ),
}


def bundled_path(name: str) -> Optional[Path]:
    """File of the weights `model.tag` if they come with this package."""
    bundled = WEIGHTS[name].bundled
    return _FOLDER / bundled if bundled else None
