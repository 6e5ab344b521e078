"""timm.create_model with one kind of failure for what comes from the Hub or from a folder."""

import json
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

import timm
from timm.models import parse_model_name, split_model_name_tag
from torch import nn

from ._text import one_line
from .catalog import check_known, model_names
from .fetch import from_hub, hub_file
from .weights import WeightsError

__all__ = ['architecture_of', 'check_config', 'create_model', 'read_config']

_LARGEST = 1 << 20  # taps, channels or pixels in a configuration: more would fill the memory


def create_model(
    model_name: str,
    pretrained: bool = False,
    cache_dir: Optional[Union[str, Path]] = None,
    **kwargs: Any,
) -> nn.Module:
    """Creates a model like `timm.create_model`, and fails in one way.

    timm reads the config.json of `hf-hub:` and `local-dir:` names before any model of this package is asked, with the
    waits and exceptions of its own. Here all that can go wrong with a source is a WeightsError that names model,
    source, cause and remedy, within seconds.

    Args:
        model_name: As for timm.create_model.
        pretrained: Load weights.
        cache_dir: Cache of the Hub in place of the usual one.
        **kwargs: Further arguments of timm.create_model.

    Raises:
        WeightsError: The source has no usable configuration or weights.
        ValueError: The name has an unknown prefix, or nothing after it.
    """
    source, model_id = parse_model_name(model_name)
    if not source:
        return timm.create_model(model_name, pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    folder = _config_file(model_name, cache_dir).parent
    if source == 'hf-hub' and pretrained:
        from_hub(model_id, cache_dir=cache_dir, what=model_name)
    check_config(folder / 'config.json', model_name)
    try:
        # on the Hub too: config and weights lie in one folder of the cache now
        model = timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs)
    except WeightsError:
        raise
    except Exception as e:  # configurations and weights of unknown contents fail in any way
        raise WeightsError(
            f'Cannot load {model_name}: {type(e).__name__}: {one_line(e, 300)} Its config.json and '
            f'weights do not belong together, or not to the arguments {kwargs}. Make them with timm-smpconv convert.'
        ) from e
    if source == 'hf-hub':
        model.pretrained_cfg.update(source='hf-hub', hf_hub_id=model_id, file=None)
    return model


def architecture_of(name: str) -> str:
    """The model of this package that a name stands for.

    Args:
        name: `model`, `model.tag`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    Raises:
        ValueError: It is of no model of this package.
        WeightsError: The source has no usable configuration.
    """
    if parse_model_name(name)[0]:
        architecture = read_config(name)['architecture']
        if architecture not in model_names():
            raise ValueError(f'{name} is a {architecture}: expected one of {", ".join(model_names())}.')
        return architecture
    check_known(name)
    return split_model_name_tag(name)[0]


def read_config(name: str) -> Dict[str, Any]:
    """The config.json of `hf-hub:ORG/NAME` or `local-dir:FOLDER`, checked.

    Raises:
        WeightsError: The source has no usable configuration.
    """
    return check_config(_config_file(name), name)


def _config_file(name: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    source, model_id = parse_model_name(name)
    if source == 'hf-hub':
        return hub_file(model_id, 'config.json', cache_dir)
    file = Path(model_id) / 'config.json'
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise WeightsError(
            f'Cannot load {name}: {file.parent} has no config.json. Make it with timm-smpconv convert.'
        ) from e
    except OSError as e:
        raise WeightsError(f'Cannot load {name}: {e.strerror or e}.') from e
    return file


def check_config(path: Path, what: str) -> Dict[str, Any]:
    """Reads a config.json of unknown origin.

    Args:
        path: File.
        what: Name of the model for messages.

    Returns:
        Its contents: an object with a registered architecture, and numbers of a sensible size.

    Raises:
        WeightsError: It is something else.
    """
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture = config['architecture']
        pretrained_cfg = config.get('pretrained_cfg', config)
        numbers = [*_numbers(config.get('model_args', {})), *_numbers(pretrained_cfg.get('input_size', []))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(
            f'Cannot load {what}: its config.json is damaged ({type(e).__name__}: {e}): expected a JSON object with an '
            f'architecture. Fetch it again, or make it with timm-smpconv convert.'
        ) from e
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise WeightsError(
            f'Cannot load {what}: unknown architecture {architecture!r}. Import the package that registers it, or '
            f'upgrade timm and timm_smpconv.'
        )
    largest = max(numbers, key=abs, default=0)
    if not abs(largest) <= _LARGEST:
        raise WeightsError(
            f'Cannot load {what}: its config.json is damaged: {largest} among the arguments of the model, expected no '
            f'more than {_LARGEST}. Fetch it again, or make it with timm-smpconv convert.'
        )
    return config


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
