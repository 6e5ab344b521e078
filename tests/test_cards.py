"""Documents and cards say what the table of weights says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

from timm_smpconv.cards import model_card, replace_section
from timm_smpconv.catalog import describe_models
from timm_smpconv.weights import WEIGHTS, hub_repo

ROOT = Path(__file__).resolve().parents[1]
PUBLISHABLE = [name for name, weights in WEIGHTS.items() if weights.bundled or weights.authors_file]


@pytest.fixture(scope='module')
def documents():
    spec = importlib.util.spec_from_file_location('make', ROOT / 'hub' / 'make.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.documents()


def test_documents_are_up_to_date(documents):
    """Outdated? Run hub/make.py. Configurations are timm's: versions differ in what they write beside the facts."""
    for path, text in documents.items():
        if path.suffix == '.md':
            assert path.read_text() == text, path
            continue
        stored, made = json.loads(path.read_text()), json.loads(text)
        for key in ('architecture', 'num_classes', 'num_features'):
            assert stored[key] == made[key], path
        assert stored.get('label_names') == made.get('label_names') and 'label_names' not in stored['pretrained_cfg']
        assert ('label_names' in stored) == bool(WEIGHTS[path.parent.name].bundled), path
        for key in ('tag', 'input_size', 'mean', 'std', 'num_classes', 'license', 'interpolation', 'crop_pct'):
            assert stored['pretrained_cfg'][key] == made['pretrained_cfg'][key], (path, key)


def test_hub_holds_what_is_publishable():
    assert sorted(path.parent.name for path in (ROOT / 'hub').glob('*/README.md')) == sorted(PUBLISHABLE)
    assert all(list(folder.iterdir()) for folder in (ROOT / 'hub').iterdir() if folder.is_dir())


@pytest.mark.parametrize('key', PUBLISHABLE)
def test_card(key, tmp_path):
    """The metadata block is what the Hub reads; the numbers are the table's, and labelled; the code runs."""
    weights = WEIGHTS[key]
    text = (ROOT / 'hub' / key / 'README.md').read_text()
    card = ModelCard(text)
    assert card.data.license == weights.license and card.data.library_name == 'timm'
    assert {'timm', 'timm_smpconv'} <= set(card.data.tags)
    assert card.data.datasets is not None or key.endswith('.ct')
    assert f'{weights.paper_accuracy:.2f} %' in text and 'paper reports' in text
    if weights.bundled:
        assert f'{weights.accuracy:.2f} %' in text and weights.sha256 in text and f'{weights.correct:,}' in text
    else:
        assert weights.authors_url in text and 'has not been measured' in text
    code = re.search(r'```python\n(.*?)```', text, re.DOTALL).group(1)
    assert f'hf-hub:{hub_repo(key)}' in code
    name = key.partition('.')[0]
    if timm.get_pretrained_cfg(name).num_classes != 1000:  # those are large
        code = code.replace(f"'hf-hub:{hub_repo(key)}', pretrained=True", repr(name))
        if name == 'smpconv_seq_speech_raw':
            code = code.replace(repr(name), f'{name!r}, kernel_size=100')
        scope = {}
        exec(code, scope)
        assert scope['probabilities'].shape == (1, scope['model'].num_classes)


def test_card_of_other_weights():
    """A fine-tuned model has no accuracy of ours, and says where it is from."""
    model = timm.create_model('smpconv_seq_mnist', num_classes=3)
    text = model_card('smpconv_seq_mnist.smnist', model, 'Converted from `a.pth`.', known=False)
    assert 'Converted from `a.pth`.' in text and '99.50' not in text and 'not been measured' in text
    assert 'does not record what it was trained on' in text and ModelCard(text).data.datasets is None
    text = model_card('smpconv_cifar.c10', timm.create_model('smpconv_cifar'), 'Converted.', known=False)
    assert 'If it was trained on CIFAR-10, the classes are' in text
    text = model_card('smpconv_cifar.c10', timm.create_model('smpconv_cifar'), 'Converted.', known=True)
    assert 'The classes are' in text and ModelCard(text).data.datasets == ['cifar10']


def test_list_is_the_table():
    infos = {f'{info.name}.{info.tag}': info for info in describe_models()}
    assert set(infos) == set(WEIGHTS)
    for key, weights in WEIGHTS.items():
        info = infos[key]
        assert (info.accuracy, info.paper_accuracy) == (weights.accuracy, weights.paper_accuracy)
        assert (info.trained_on, info.source, info.license, info.url) == (
            weights.trained_on, weights.source, weights.license, weights.authors_url,
        )  # fmt: skip


@pytest.mark.parametrize('key', WEIGHTS)
def test_table_is_complete(key):
    """Bundled weights have all that is needed to recognise and to judge them."""
    weights = WEIGHTS[key]
    assert 0 < weights.paper_accuracy < 100
    if weights.bundled:
        assert weights.size and re.fullmatch('[0-9a-f]{64}', weights.sha256) and weights.logits
        assert 0 < weights.correct <= weights.tested and weights.test_data and weights.note and weights.why
    else:
        assert weights.correct is None and weights.logits is None
    assert timm.get_pretrained_cfg(key).license == weights.license


def test_replace_section():
    text = 'a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n'
    assert replace_section(text, 'x', 'new') == 'a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n'
    with pytest.raises(ValueError, match='y: begin'):
        replace_section(text, 'y', 'new')
