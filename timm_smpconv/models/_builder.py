"""Construction of models and their pretrained configurations from the table of weights."""

import functools
from typing import Any, Dict, Optional, Tuple, Type

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from .._text import one_line
from ..checkpoint import CheckpointError, carried_settings, check_architecture, read_checkpoint, state_dict_of
from ..fetch import locate
from ..layers import no_weight_decay
from ..layout import adapt_input_channels
from ..weights import WEIGHTS, bundled_path
from ._base import LargeKernelNet

__all__ = ['build', 'cfg', 'checkpoint_filter_fn', 'imagenet_cfg', 'small_cfg']

_PAPER = dict(
    paper_ids='arXiv:2304.02330',
    paper_name='SMPConv: Self-moving Point Representations for Continuous Convolution',
    origin_url='https://github.com/sangnekim/SMPConv',
)


def cfg(name: str, **kwargs: Any) -> Dict[str, Any]:
    """Pretrained configuration of `model.tag`: its weights from the table, the rest from the arguments."""
    path = bundled_path(name)
    return {
        **({'file': str(path)} if path else {}),
        'license': WEIGHTS[name].license,
        'description': f'Trained on {WEIGHTS[name].trained_on}.',
        'classifier': 'head.fc',
        **_PAPER,
        **kwargs,
    }


def small_cfg(name: str, **kwargs: Any) -> Dict[str, Any]:
    """`cfg` of a network for small images or sequences, whose feature maps are as large as its input."""
    return cfg(
        name,
        **{
            'num_classes': 10,
            'pool_size': kwargs['input_size'][1:],
            'crop_pct': 1.0,
            'interpolation': 'bilinear',
            **kwargs,
        },
    )


def imagenet_cfg(name: str, input_size: Tuple[int, int, int] = (3, 224, 224), **kwargs: Any) -> Dict[str, Any]:
    """`cfg` of an ImageNet network with an output stride of 32."""
    return cfg(
        name,
        **{
            'num_classes': 1000,
            'input_size': input_size,
            'pool_size': (input_size[1] // 32, input_size[2] // 32),
            'crop_pct': 0.875 if input_size[1] == 224 else 1.0,
            'interpolation': 'bicubic',
            'mean': IMAGENET_DEFAULT_MEAN,
            'std': IMAGENET_DEFAULT_STD,
            **kwargs,
        },
    )


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: LargeKernelNet) -> Dict[str, torch.Tensor]:
    """Accepts this package's layout and the reference layout, for any number of input channels."""
    return adapt_input_channels(model.convert_checkpoint(state_dict), model.in_chans, model.first_layer)


def build(
    model_cls: Type[LargeKernelNet],
    variant: str,
    pretrained: bool,
    num_stages: int,
    **kwargs: Any,
) -> torch.nn.Module:
    """Builds a registered model through timm.

    Args:
        model_cls: Network class.
        variant: Registered name.
        pretrained: Load the weights that the pretrained configuration names.
        num_stages: Number of feature maps that features_only returns by default.
        **kwargs: Arguments of timm's builder and of the network.

    Raises:
        WeightsError: There are no weights to load.
    """
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    resolved = resolve_pretrained_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay).to_dict()
    if 'file' not in overlay and (overlay.get('url') or overlay.get('hf_hub_id')):
        resolved['file'] = None  # the bundled weights, which timm would prefer
    weights: Optional[Dict[str, torch.Tensor]] = None
    if pretrained:
        weights, carried = _read_weights(variant, resolved, kwargs.get('cache_dir'))
        resolved.update({key: value for key, value in carried.items() if key not in overlay})
    # checkpoint_filter_fn adapts first layers: timm knows how to for Conv2d weights of three channels only
    loading = {**resolved, 'first_conv': None}
    if weights is not None:  # which timm would copy with the configuration: `load` has it
        loading.update(source='', file='', state_dict={'': None})
    deployed = pretrained and kwargs.get('inference_mode', False)

    def construct(**args: Any) -> LargeKernelNet:
        if not deployed:
            return model_cls(**args)
        # `load` deploys it, with the weights that it gets; in full precision, so that these are rounded once
        dtype = torch.promote_types(args.get('dtype') or torch.get_default_dtype(), torch.float32)
        return model_cls(**{**args, 'inference_mode': False, 'dtype': dtype})

    def load(state_dict: Dict[str, Any], model: LargeKernelNet) -> Dict[str, torch.Tensor]:
        try:
            state_dict = checkpoint_filter_fn(state_dict if weights is None else weights, model)
        except (IndexError, KeyError, RuntimeError, ValueError) as e:
            raise CheckpointError(f'The weights do not fit {variant}: {one_line(e)}') from e
        shape = getattr(state_dict.get('head.fc.weight'), 'shape', ())
        if 'num_classes' in kwargs and 'file' in overlay and 'num_classes' not in overlay and shape:
            # by which timm decides whether to keep the classifier; unasked, it has to be of the model's own classes
            model.pretrained_cfg['num_classes'] = shape[0]
        if deployed:
            state_dict = _deploy(state_dict, model)
            model.to(kwargs.get('dtype') or torch.get_default_dtype())
        if kwargs.get('pretrained_strict', True):
            _check_complete(state_dict, model)
        return state_dict

    model = build_model_with_cfg(
        construct,
        variant,
        pretrained,
        pretrained_cfg=loading,
        pretrained_filter_fn=load,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        # passed by timm for a fixed input size, which smpconv_seq_pmnist has made arguments of
        kwargs_filter=('img_size',) if resolved.get('fixed_input_size') else None,
        **kwargs,
    )
    model.pretrained_cfg.update({key: resolved.get(key) for key in ('first_conv', 'source', 'file')})
    if 'state_dict' not in resolved:
        for part in (model, getattr(model, 'model', model)):  # a wrapper that keeps the whole network, and that
            part.pretrained_cfg.pop('state_dict', None)
    if not isinstance(model, model_cls):  # feature maps; timm's optimizers ask for this
        model.no_weight_decay = functools.partial(no_weight_decay, model)
    return model


def _read_weights(
    variant: str, cfg: Dict[str, Any], cache_dir: Optional[str]
) -> Tuple[Optional[Dict[str, torch.Tensor]], Dict[str, Any]]:
    """What a pretrained configuration asks for, and the mean and std of its inputs where it says others.

    Args:
        variant: Registered name.
        cfg: Resolved pretrained configuration.
        cache_dir: Cache of the Hub in place of the usual one.

    Returns:
        State dict, None if timm loads it itself; mean and std, as far as the file says them.
    """
    key = f'{variant}.{cfg.get("tag") or ""}'.rstrip('.')
    file = locate(key, cfg, cache_dir)
    if file is None:
        return None, {}
    # timm reads less: the authors' ImageNet files have numbers of numpy in them
    checkpoint = read_checkpoint(file)
    check_architecture(checkpoint, variant, str(file))
    state_dict = state_dict_of(checkpoint, str(file))
    # the statistics of bundled weights, and of those with a config.json, are the configuration's
    if file == bundled_path(key) or cfg.get('source') in ('hf-hub', 'local-dir'):
        return state_dict, {}
    carried = carried_settings(file, None, checkpoint, beside=str(file) == str(cfg.get('file')))
    return state_dict, {name: carried[name] for name in ('mean', 'std') if name in carried}


def _check_complete(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Checks that weights are of this form of a network, but for its classifier: timm does not if that is replaced.

    Raises:
        RuntimeError: Keys are missing or left over.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict and not key.startswith('head.fc.')]
    unknown = [key for key in state_dict if key not in own and not key.startswith('head.fc.')]
    if missing or unknown:
        named = '; '.join(
            f'{len(keys)} {what}: {", ".join(keys[:3])}' + (' ...' if len(keys) > 3 else '')
            for what, keys in (('missing', missing), ('unknown', unknown))
            if keys
        )
        raise RuntimeError(
            f'The weights do not fit {type(model).__name__} with these arguments ({named}): deployed weights need '
            f'inference_mode=True, those of another network its arguments.'
        )


def _deploy(state_dict: Dict[str, torch.Tensor], model: LargeKernelNet) -> Dict[str, torch.Tensor]:
    """Brings a network into its deployed form, with weights of either form; returns them as that stores them.

    Raises:
        RuntimeError: Weights of a network in training form do not fit.
    """
    rendered = not any(key.endswith('.kernel.weights') for key in state_dict)
    # passed on as it is: timm drops one for other classes once this has returned
    classifier = {key: value for key, value in state_dict.items() if key.startswith('head.fc.')}
    if not rendered:
        own = {key: value for key, value in model.state_dict().items() if key.startswith('head.fc.')}
        model.load_state_dict({**{k: v for k, v in state_dict.items() if k not in classifier}, **own})
    model.eval().reparameterize().train()
    return state_dict if rendered else {**model.state_dict(), **classifier}
