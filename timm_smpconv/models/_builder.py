"""Construction of models and their pretrained configurations from the table of weights."""

from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Type

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg

from ..weights import WEIGHTS, bundled_path
from ._base import LargeKernelNet

__all__ = ['build', 'cfg', 'imagenet_cfg']

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


def build(
    model_cls: Type[LargeKernelNet],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Dict[str, Any], LargeKernelNet], Dict[str, torch.Tensor]],
    num_stages: int,
    **kwargs: Any,
) -> torch.nn.Module:
    """Builds a registered model through timm.

    Args:
        model_cls: Network class.
        variant: Registered name.
        pretrained: Load the weights that the pretrained configuration names.
        filter_fn: The family's checkpoint_filter_fn.
        num_stages: Number of feature maps that features_only returns by default.
        **kwargs: Arguments of timm's builder and of the network.

    Raises:
        WeightsError: There are no weights to load.
    """
    overlay = kwargs.pop('pretrained_cfg_overlay', None)
    resolved = resolve_pretrained_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay).to_dict()
    if overlay and 'file' not in overlay and (overlay.get('url') or overlay.get('hf_hub_id')):
        resolved['file'] = None  # the bundled weights, which timm would prefer
    weights: Optional[Path] = None
    if pretrained:
        from ..checkpoint import carried_settings, read_checkpoint  # which, like fetch, know the models
        from ..fetch import locate

        key = f'{variant}.{resolved.get("tag") or ""}'.rstrip('.')
        weights = locate(key, resolved, kwargs.get('cache_dir'))
        # those that were installed by hand may be of inputs that are normalised in another way
        if weights and not (key in WEIGHTS and weights == bundled_path(key)):
            carried = carried_settings(weights)
            resolved.update({k: carried[k] for k in ('mean', 'std') if k in carried and k not in (overlay or {})})
    loading = {**resolved, 'source': '', 'file': str(weights)} if weights else resolved
    if pretrained and not (weights or resolved.get('state_dict')) and Path(resolved.get('file') or '').is_file():
        # timm reads less: the authors' ImageNet files have numbers of numpy in them
        loading = {**resolved, 'state_dict': read_checkpoint(Path(resolved['file']))}
    model_args: Dict[str, Any] = {}

    def construct(**args: Any) -> LargeKernelNet:
        model_args.update(args)
        return model_cls(**args)

    def load(state_dict: Dict[str, Any], model: LargeKernelNet) -> Dict[str, torch.Tensor]:
        state_dict = filter_fn(state_dict, model)
        if model_args.get('inference_mode') and any(key.endswith('.kernel.weights') for key in state_dict):
            return _deploy(state_dict, model_cls, model_args)
        return state_dict

    model = build_model_with_cfg(
        construct,
        variant,
        pretrained,
        # the filter function adapts first layers: timm knows how to for Conv2d weights of three channels only
        pretrained_cfg={**loading, 'first_conv': None},
        pretrained_filter_fn=load,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        kwargs_filter=('img_size',),  # passed by timm for a fixed input size; networks take kernel_size
        **kwargs,
    )
    model.pretrained_cfg.update({key: resolved.get(key) for key in ('first_conv', 'source', 'file')})
    if 'state_dict' not in resolved:
        model.pretrained_cfg.pop('state_dict', None)
    return model


def _deploy(
    state_dict: Dict[str, torch.Tensor], model_cls: Type[LargeKernelNet], model_args: Dict[str, Any]
) -> Dict[str, torch.Tensor]:
    """Weights of a network in training form, as the deployed form stores them.

    Raises:
        RuntimeError: They do not fit the network.
    """
    # half precision would move the points by whole taps: timm casts the rendered kernels
    dtype = torch.promote_types(model_args.get('dtype') or torch.get_default_dtype(), torch.float32)
    model = model_cls(**{**model_args, 'inference_mode': False, 'num_classes': 0, 'dtype': dtype})
    # passed on as it is: timm drops one for other classes once this has returned
    classifier = {key: value for key, value in state_dict.items() if key.startswith('head.fc.')}
    model.load_state_dict({key: value for key, value in state_dict.items() if key not in classifier})
    return {**model.eval().reparameterize().state_dict(), **classifier}
