"""timm.create_model with one kind of failure for what comes from the Hub or from a folder."""

import json
from pathlib import Path
from typing import Any, Optional, Union

import timm
from torch import nn

from .fetch import from_hub, hub_file
from .weights import WeightsError

__all__ = ['create_model']

_HUB, _FOLDER = ('hf-hub:', 'hf_hub:'), ('local-dir:', 'local_dir:')


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
    """
    if model_name.startswith(_HUB):
        hub_id = model_name[len(_HUB[0]) :]
        folder = _checked(hub_file(hub_id, 'config.json', cache_dir), model_name)
        if pretrained:
            from_hub(hub_id, cache_dir=cache_dir, what=model_name)
        # config and weights lie in one folder of the cache now
        model = timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs)
        model.pretrained_cfg.update(source='hf-hub', hf_hub_id=hub_id, file=None)
        return model
    if model_name.startswith(_FOLDER):
        path = Path(model_name[len(_FOLDER[0]) :])
        if not (path / 'config.json').is_file():
            raise WeightsError(
                f'Cannot load {model_name}: {path} has no config.json. Make it with timm-smpconv convert.'
            )
        _checked(path / 'config.json', model_name)
    return timm.create_model(model_name, pretrained=pretrained, cache_dir=cache_dir, **kwargs)


def _checked(config: Path, model_name: str) -> Path:
    """The folder of a configuration that timm can build a model from."""
    try:
        architecture = json.loads(config.read_text())['architecture']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(
            f'Cannot load {model_name}: its config.json is damaged ({e}): expected a JSON object with an architecture. '
            f'Fetch it again, or make it with timm-smpconv convert.'
        ) from e
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise WeightsError(
            f'Cannot load {model_name}: unknown architecture {architecture!r}. Import the package that registers it, '
            f'or upgrade timm and timm_smpconv.'
        )
    return config.parent
