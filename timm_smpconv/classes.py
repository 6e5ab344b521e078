"""Names of the classes of all data sets, in the order of the networks' outputs."""

from typing import Dict, Tuple

__all__ = ['CHARACTERS', 'CIFAR10', 'CLASS_NAMES', 'DIGITS', 'SPEECH_WORDS']

DIGITS = tuple('0123456789')
CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
# the order in which the data code that the reference grew from numbers them
SPEECH_WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
# the letters that are written in one stroke; the files call them 1 to 20
CHARACTERS = tuple('abcdeghlmnopqrsuvwyz')

# by the tag of the weights; ImageNet's names come from timm
CLASS_NAMES: Dict[str, Tuple[str, ...]] = {
    'smnist': DIGITS,
    'pmnist': DIGITS,
    'c10': CIFAR10,
    'scifar10': CIFAR10,
    'ct': CHARACTERS,
    'sc': SPEECH_WORDS,
    'sc_raw': SPEECH_WORDS,
}
