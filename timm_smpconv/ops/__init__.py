from .chooser import choose_backend as choose_backend
from .functional import (
    available_backends as available_backends,
    causal_conv1d as causal_conv1d,
    conv1d as conv1d,
    conv2d as conv2d,
    depthwise_causal_conv1d as depthwise_causal_conv1d,
    depthwise_conv1d as depthwise_conv1d,
    depthwise_conv2d as depthwise_conv2d,
    to_fast_format as to_fast_format,
    use_backend as use_backend,
)
