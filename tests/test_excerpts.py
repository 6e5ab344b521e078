"""The bundled weights on excerpts of real test data: they get as many right as when they were shipped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from timm_smpconv.cli import main
from timm_smpconv.data import speaker_number
from timm_smpconv.validate import validate
from timm_smpconv.weights import WEIGHTS, bundled_path, training_speakers

EXCERPTS = Path(__file__).resolve().parent / 'excerpts'
EXPECTED = json.loads((EXCERPTS / 'expected.json').read_text())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The excerpts in the form that `timm-smpconv data` makes."""
    folder = tmp_path_factory.mktemp('data')
    shutil.copytree(EXCERPTS / 'cifar10', folder / 'cifar10')
    (folder / 'speech_commands').mkdir()
    shutil.copy(EXCERPTS / 'speech_commands.safetensors', folder / 'speech_commands' / 'test.safetensors')
    digits = {key: value.numpy() for key, value in load_file(EXCERPTS / 'mnist.safetensors').items()}
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for prefix in ('train', 't10k'):  # torchvision wants both; the first is not read
        header = np.array([0x803, len(digits['images']), 28, 28], '>i4').tobytes()
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(header + digits['images'].tobytes())
        header = np.array([0x801, len(digits['labels'])], '>i4').tobytes()
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(header + digits['labels'].tobytes())
    return folder


def test_all_bundled_weights_are_tested():
    assert set(EXPECTED) == {name for name, weights in WEIGHTS.items() if weights.bundled}


@pytest.mark.parametrize('key', EXPECTED)
def test_hits(key, data):
    result = validate(key, data, progress=False)
    wanted = EXPECTED[key]
    assert result.total == wanted['total']
    # a sample on the edge between two classes may fall to either side with other versions of torch
    assert abs(result.hits - wanted['hits']) <= 1, result.hits
    # the excerpt is no harder than the table allows: at least what is likely at the measured accuracy
    expected = WEIGHTS[key].accuracy / 100
    deviation = (expected * (1 - expected) / result.total) ** 0.5
    assert result.hits / result.total > expected - 4 * deviation - 1 / result.total


def test_speakers_of_the_training_data_are_left_out(data, tmp_path, capsys):
    """The official test split has them too: the accuracy of the table is of the others."""
    key = 'smpconv_seq_speech.sc'
    heard = training_speakers(key)
    assert len(set(heard)) == 130 and training_speakers('smpconv_seq_mnist.smnist') == []
    tensors = load_file(data / 'speech_commands' / 'test.safetensors')
    for i in range(20):
        tensors['speakers'][i] = speaker_number(heard[i])
    (tmp_path / 'speech_commands').mkdir()
    save_file(tensors, tmp_path / 'speech_commands' / 'test.safetensors')
    result = validate('smpconv_seq_speech', tmp_path, progress=False)
    assert (result.total, result.left_out) == (EXPECTED[key]['total'] - 20, 20)
    assert result.labels.tolist() == tensors['labels'][20:].tolist()
    given = validate('smpconv_seq_speech', tmp_path, bundled_path(key), progress=False)
    assert (given.total, given.left_out) == (result.total, 20)
    main(['validate', '--model', key, '--data', str(tmp_path)])
    assert '20 others were left out' in capsys.readouterr().out
