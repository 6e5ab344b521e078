"""Texts made from the table of weights: the model table of the documents, and a card for each model on the Hub."""

import json
from typing import Any, Dict, List, NamedTuple, Optional

import yaml
from timm.models import split_model_name_tag
from torch import nn

from .catalog import describe_models
from .classes import CLASS_NAMES
from .tasks import task_of
from .weights import WEIGHTS, Weights, hub_repo, wilson

__all__ = ['PLACEHOLDER', 'evaluation_table', 'file_table', 'model_card', 'model_table', 'replace_section']

PLACEHOLDER = 'ORG/NAME'  # in a card, until its weights are pushed somewhere


class _Family(NamedTuple):
    """What a card says of all networks whose names begin alike."""

    what: str
    deployment: str
    citation: str


_FAMILIES = {
    'smpconv': _Family(
        'An SMPConv network: convolution kernels are continuous functions of points that move in training.',
        'points become plain dense kernels: same output, faster',
        """\
@inproceedings{kim2023smpconv,
  title = {SMPConv: Self-moving Point Representations for Continuous Convolution},
  author = {Kim, Sanghyeon and Park, Eunbyung},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}""",
    ),
    'pelk': _Family(
        'A PeLK network: the taps of very large kernels share parameters, the more the farther from the centre.',
        'shared parameters become plain dense kernels: same output, faster',
        """\
@inproceedings{chen2024pelk,
  title = {PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution},
  author = {Chen, Honghao and Chu, Xiangxiang and Ren, Yongjian and Zhao, Xin and Huang, Kaiqi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}""",
    ),
}

# by the tag of the weights: data sets as the Hub names them
_DATASETS = {
    'in1k': 'imagenet-1k',
    'c10': 'cifar10',
    'scifar10': 'cifar10',
    'smnist': 'mnist',
    'pmnist': 'mnist',
    'sc': 'google/speech_commands',
    'sc_raw': 'google/speech_commands',
}
_PIPELINE_TAGS = {'sc': 'audio-classification', 'sc_raw': 'audio-classification', 'ct': 'other'}

_COMMANDS = 'voice control where a mistake matters: it knows ten English words, and takes any sound for one of them'
_NOT_FOR = {
    'smnist': 'reading digits in anything that matters, such as forms, cheques, meters or examinations',
    'pmnist': 'anything but the comparison of sequence models: it reads the pixels of a digit in a random order',
    'c10': 'decisions about real photographs: it knows ten classes of 32 x 32 thumbnails and nothing else',
    'scifar10': 'decisions about real photographs: it knows ten classes of 32 x 32 thumbnails and nothing else',
    'sc': _COMMANDS,
    'sc_raw': _COMMANDS,
    'ct': 'identification of writers or reading of documents: it knows twenty letters from one writer',
    'in1k': 'decisions about people, or anything where a mistake does harm: it has the biases of ImageNet',
}


def model_table() -> str:
    """All models and weights as a Markdown table."""
    lines = [
        '| model | data | input | params | GMACs | top-1 (paper) | top-1 (ours) | weights |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for info in sorted(describe_models(), key=lambda info: list(WEIGHTS).index(f'{info.name}.{info.tag}')):
        channels, height, width = info.input_size
        size = f'{channels} x {width}' if height == 1 else f'{channels} x {height} x {width}'
        weights = WEIGHTS[f'{info.name}.{info.tag}']
        ours = '' if weights.accuracy is None else f'{weights.accuracy:.2f}'
        source = (
            '**bundled**, ours' if weights.bundled else "the authors'" if weights.authors_file else 'none published'
        )
        lines.append(
            f'| {info.name} | {info.trained_on} | {size} | {info.params:,} | {info.macs / 1e9:,.2f} | '
            f'{info.paper_accuracy:.2f} | {ours} | {source} |'
        )
    return '\n'.join(lines)


def evaluation_table(brief: bool = False) -> str:
    """The measured accuracies of the bundled weights, beside those of the paper, as a Markdown table.

    Args:
        brief: Say why they differ in a few words.
    """
    lines = [
        '| weights | test data | measured | 95 % interval | command | paper | why they differ |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, weights in WEIGHTS.items():
        if weights.correct is None or weights.tested is None:
            continue
        command = f'`timm-smpconv validate --model {split_model_name_tag(name)[0]} --data data`'
        lines.append(
            f'| {name} | {_test_data(weights)} | {_measured(weights)} | {_interval(weights)} | {command} | '
            f'{weights.paper_accuracy:.2f} % | {weights.why if brief else weights.note} |'
        )
    return '\n'.join(lines)


def file_table() -> str:
    """The files of the bundled weights as a Markdown table."""
    lines = ['| weights | file | bytes | licence | sha256 |', '|---|---|---|---|---|']
    for name, weights in WEIGHTS.items():
        if weights.bundled:
            file = f'timm_smpconv/pretrained/{weights.bundled}'
            lines.append(f'| {name} | `{file}` | {weights.size:,} | {weights.license} | `{weights.sha256}` |')
    return '\n'.join(lines)


def _test_data(weights: Weights) -> str:
    return f'{weights.tested:,} {weights.test_data}'


def _measured(weights: Weights) -> str:
    return f'{weights.accuracy:.2f} % ({weights.correct:,})'


def _interval(weights: Weights) -> str:
    assert weights.correct is not None and weights.tested is not None
    low, high = wilson(weights.correct, weights.tested, weights.effect)
    return f'{100 * low:.2f} to {100 * high:.2f} %'


def model_card(
    name: str,
    model: nn.Module,
    provenance: Optional[str] = None,
    known: bool = True,
    deployed: bool = False,
    model_kwargs: Optional[Dict[str, Any]] = None,
    license: Optional[str] = None,
) -> str:
    """Card of a model for its repository on the Hub, with the metadata block that the Hub reads.

    Args:
        name: `model.tag`.
        model: The network; its weights are not looked at.
        provenance: Where this file of weights comes from; None for what the table says.
        known: The weights are those of the table, so that its accuracy is theirs.
        deployed: The repository holds the deployed weights too.
        model_kwargs: Arguments of the network that differ from the model's own.
        license: Licence of the weights, as the Hub names it; None for that of the table if the weights are those of
            the table, else 'unknown'.

    Returns:
        Markdown.
    """
    architecture, tag = split_model_name_tag(name)
    family = _FAMILIES[architecture.partition('_')[0]]
    weights = WEIGHTS.get(name)
    # else it may be a network fine-tuned on anything
    known = known and weights is not None
    license = license or (known and model.pretrained_cfg.get('license')) or 'unknown'
    shape = ', '.join(str(n) for n in model.pretrained_cfg['input_size'])
    params = sum(p.numel() for p in model.parameters())
    lines = [
        *_metadata(architecture, tag, license, known),
        f'# {name}',
        '',
        f'{family.what} {params:,} parameters, {model.num_classes} classes, input (batch, {shape}).',
        '',
        *_use(model, tag, hub_repo(name) if provenance is None else PLACEHOLDER, family),
        *_classes(model, tag, weights, known),
    ]
    if deployed:
        arguments = ''.join(f', {key}={value!r}' for key, value in (model_kwargs or {}).items())
        lines += [
            '`deployed.safetensors` holds the same network with its kernels rendered, for '
            f"`timm.create_model('{architecture}', inference_mode=True, checkpoint_path=FILE{arguments})`.",
            '',
        ]
    lines += [
        *_results(architecture, weights, known),
        *_origin(architecture, weights, provenance, known),
        *_limits(architecture, tag, weights, known),
        '## Licence and citation',
        '',
        'The licence of the weights is not known.' if license == 'unknown' else f'{license.upper()}.',
        '',
        '```bibtex',
        family.citation,
        '```',
    ]
    return '\n'.join(lines) + '\n'


def _pipeline_tag(tag: str) -> str:
    return _PIPELINE_TAGS.get(tag, 'image-classification')


def _metadata(architecture: str, tag: str, license: str, known: bool) -> List[str]:
    task = _pipeline_tag(tag)
    lines = [
        '---',
        f'license: {_as_yaml(license)}',
        'library_name: timm',
        f'pipeline_tag: {task}',
        'tags:',
    ]
    lines += [f'- {t}' for t in (task, 'timm', 'timm_smpconv', architecture.partition('_')[0])]
    if tag in _DATASETS and known:
        lines += ['datasets:', f'- {_DATASETS[tag]}']
    return [*lines, '---']


def _as_yaml(text: str) -> str:
    """A text as YAML reads it again: quoted where it would be a number, a mapping or `no`."""
    try:
        is_plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_plain = False
    return text if is_plain else json.dumps(text)


def _use(model: nn.Module, tag: str, repo: str, family: _Family) -> List[str]:
    images = _pipeline_tag(tag) == 'image-classification'
    lines = [
        '## Use',
        '',
        '`pip install timm-smpconv`, then:',
        '',
        '```python',
        'import timm',
        'import torch',
        'import timm_smpconv  # registers the architecture',
        '',
        f"model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()",
    ]
    if images:
        lines += [
            '',
            'cfg = timm.data.resolve_data_config(model=model)',
            'transform = timm.data.create_transform(**cfg, is_training=False)',
            '# x = transform(image).unsqueeze(0) for a PIL image',
        ]
    shape = ', '.join(str(n) for n in model.pretrained_cfg['input_size'])
    lines += [
        f'x = torch.randn(1, {shape})',
        f'probabilities = model(x).softmax(1)  # (1, {model.num_classes})',
        f'model.reparameterize()  # {family.deployment}',
        '```',
        '',
    ]
    if not images:
        lines += ['The input is a series, (batch, channels, steps); a height of one may stand before the steps.', '']
    if tag == 'sc':
        lines += [
            'Its channels are those of `timm_smpconv.features.MFCC` of one second at 16 kHz, less `mean` and divided '
            'by `std` of `model.pretrained_cfg`.',
            '',
        ]
    return lines


def _classes(model: nn.Module, tag: str, weights: Optional[Weights], known: bool) -> List[str]:
    own = model.pretrained_cfg.get('label_names')
    classes = own or CLASS_NAMES.get(tag, ())
    if len(classes) != model.num_classes:
        return []
    order = f'in this order: {", ".join(classes)}.'
    if known or own or weights is None:
        return [f'The classes are, {order}', '']
    return [f'If it was trained on {weights.trained_on}, the classes are, {order}', '']


def _results(architecture: str, weights: Optional[Weights], known: bool) -> List[str]:
    if weights is None:
        return ['## Results', '', 'Not measured.', '']
    if known and weights.accuracy is not None:
        ours = (
            f'- Top-1 accuracy measured by this project with this file, on {_test_data(weights)}: '
            f'{_measured(weights)}, 95 % interval {_interval(weights)}. Command: '
            f'`timm-smpconv validate --model {architecture} --data DIR`.'
        )
    else:
        ours = '- The accuracy of this file has not been measured by this project.'
    paper = (
        f'- Top-1 accuracy that the paper reports, for its own weights and on {weights.trained_on}: '
        f'{weights.paper_accuracy:.2f} %.'
    )
    note = [f'- {weights.note}'] if weights.note and known else []
    return ['## Results', '', ours, paper, *note, '']


def _origin(architecture: str, weights: Optional[Weights], provenance: Optional[str], known: bool) -> List[str]:
    lines = ['## Origin', '']
    if provenance is not None:
        lines += [provenance if known else f'{provenance} The file does not record what it was trained on.']
    elif weights is not None and weights.bundled:
        lines += [
            f'Trained by the timm_smpconv project on {weights.trained_on}. File: {weights.size:,} bytes, sha256 '
            f'`{weights.sha256}`.'
        ]
    elif weights is not None and weights.authors_file:
        lines += [
            f'Trained on {weights.trained_on} and published by the authors of the paper at {weights.authors_url}; to '
            f'be converted with `timm-smpconv convert FILE --model {architecture} --license mit --out DIR`.'
        ]
    return [*lines, '']


def _limits(architecture: str, tag: str, weights: Optional[Weights], known: bool) -> List[str]:
    lines = [
        '## Limits',
        '',
        f'Not for {_NOT_FOR.get(tag, "use without a test on data of your own")}.',
        'There is no class for "none of these", and the probabilities are not calibrated.',
    ]
    fed = task_of(architecture)
    if fed and fed.stepwise and not (weights is not None and weights.bundled and known):
        lines += [
            "The authors' own networks for these data want inputs that are normalised in each time step, with "
            'statistics of the training data that their files lack; `timm-smpconv validate --step-statistics` measures '
            'them.'
        ]
    return [*lines, '']


def replace_section(text: str, name: str, content: str) -> str:
    """Replaces what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: The text has no such section.
    """
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f'Expected a section between {begin!r} and {end!r}.')
    return f'{head}{begin}\n{content}\n{end}{tail}'
