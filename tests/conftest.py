import copy
import itertools
import os
import shutil
import tempfile

# before huggingface_hub is imported: no test asks the real Hub, or meets the settings, cache and login of the user
for variable in os.environ.copy():
    if variable.startswith(('TIMM_SMPCONV_', 'HF_', 'HUGGING')):
        del os.environ[variable]
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_HOME'] = HUB_HOME = tempfile.mkdtemp(prefix='timm_smpconv_hub')

if 'PYTEST_XDIST_WORKER_COUNT' in os.environ:  # before torch is imported: tests that run side by side share the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(cores // int(os.environ['PYTEST_XDIST_WORKER_COUNT']), 1)))

# and torch takes large tensors in huge pages where it can (Linux): half of the time of the largest went into small ones
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

import torch

# before timm, and with it this package and its has_tensor_cores, imports Triton: where no GPU can run the kernels for
# GPUs, a CPU does, in the interpreter
if not (torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0)):
    os.environ.setdefault('TRITON_INTERPRET', '1')

import pytest
import timm
from hypothesis import settings
from synth import is_batch_norm, randomize_norms

import timm_smpconv  # noqa: F401  (registers the models)

settings.register_profile('smpconv', deadline=None, max_examples=40, derandomize=True)
settings.load_profile('smpconv')

ALL_MODELS = timm.list_models(['pelk*', 'smpconv*'])

# what takes seconds to build or render is smaller in contract tests; the parity tests use the full sizes. With the
# initial layer scale, a millionth, the blocks of PeLK would be lost in the rounding.
SMALLER = {
    'pelk_base': dict(depths=(1, 1, 2, 1), dims=(64, 128, 256, 512), ls_init_value=0.5),
    'pelk_base_101': dict(depths=(1, 1, 1, 1), dims=(32, 64, 128, 256), ls_init_value=0.5),
    'pelk_small': dict(depths=(1, 2, 3, 1), dims=(48, 96, 192, 384), ls_init_value=0.5),
    'pelk_tiny': dict(depths=(1, 1, 3, 1), ls_init_value=0.5),
    'smpconv_base': dict(depths=(1, 1, 2, 1), dims=(64, 128, 256, 512)),
    'smpconv_tiny': dict(depths=(1, 1, 3, 1)),
    'smpconv_seq_speech_raw': dict(kernel_size=200, radius=0.02),
}


def pytest_unconfigure():
    shutil.rmtree(HUB_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest test comes first: last, it would leave the other processes with nothing to do."""
    items.sort(key=lambda item: item.path.name != 'test_timm_suite.py')


def pytest_generate_tests(metafunc):
    """A test with an argument `name` runs for every registered model."""
    marked = {
        arg for m in metafunc.definition.iter_markers('parametrize') for arg in m.args[0].replace(' ', '').split(',')
    }
    if 'name' in metafunc.fixturenames and 'name' not in marked:
        metafunc.parametrize('name', ALL_MODELS)


def build(name, **kwargs):
    """A registered model, smaller where its full size costs seconds."""
    return timm.create_model(name, **{**SMALLER.get(name, {}), **kwargs})


def has_batch_norms(name):
    return not name.startswith('pelk')


def input_size(name):
    """Input size of one sample that contract tests use."""
    size = timm.get_pretrained_cfg(name).input_size
    if name in SMALLER and size[1] == 1:
        return (size[0], 1, 260)
    return (size[0], 64, 64) if size[1] == 224 else size


def make_input(name, batch=2, seed=0, **kwargs):
    return torch.randn(batch, *input_size(name), generator=torch.Generator().manual_seed(seed), **kwargs)


def measure_norms(model, x):
    """Gives all batch norms the statistics of a batch, in place: what fresh blocks add is then no longer tiny."""
    norms = [module for module in model.modules() if is_batch_norm(module)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


_STORES = itertools.count()


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory, monkeypatch):
    """Each test has an empty store of weights, and the user's own is neither read nor written."""
    store = tmp_path_factory.getbasetemp() / f'store{next(_STORES)}'
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', str(store))
    yield
    shutil.rmtree(store, ignore_errors=True)  # not every test has one


@pytest.fixture(scope='session')
def _cached_models():
    return {}


@pytest.fixture
def model(name, _cached_models):
    """A model in eval mode with norm statistics that are not the initial ones; the test may change it."""
    if name not in _cached_models:
        torch.manual_seed(0)
        _cached_models[name] = randomize_norms(build(name)).eval()
    return copy.deepcopy(_cached_models[name])


@pytest.fixture
def x(name):
    return make_input(name)
