"""Continuous and very large convolution kernels for timm: importing this package registers its models."""

from . import layers as layers, models as models, ops as ops
from .factory import create_model as create_model
from .version import __version__ as __version__
from .weights import WeightsError as WeightsError
