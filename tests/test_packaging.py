"""The package as a guest of Python and timm."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_smpconv
from timm_smpconv.catalog import model_names
from timm_smpconv.classes import CIFAR10
from timm_smpconv.layers import LargeConv2d, SMPConv2d
from timm_smpconv.predict import load_model, predict_files
from timm_smpconv.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]


def test_import_is_quiet():
    """No output, no warnings of our own, and no log records that a user would see."""
    code = (
        'import timm, torchvision, warnings\n'
        'warnings.simplefilter("error")\n'
        'import timm_smpconv\n'
        'warnings.simplefilter("ignore")\n'  # what torch leaves behind at exit is not ours
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_import_is_idempotent():
    """A second execution registers the same models again, without warnings."""
    code = (
        'import sys, warnings, timm, timm_smpconv\n'
        'warnings.simplefilter("error")\n'
        'before = timm.list_models("smpconv*"), timm.list_models("smpconv*", pretrained=True)\n'
        'import importlib; importlib.reload(timm_smpconv)\n'
        'assert before == (timm.list_models("smpconv*"), timm.list_models("smpconv*", pretrained=True))\n'
        'assert timm.create_model("smpconv_seq_speech").num_classes == 10\n'
        'warnings.simplefilter("ignore")\n'  # what torch leaves behind at exit is not ours
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_import_leaves_the_command_line_out():
    """The libraries that only the commands need are not loaded with the package."""
    code = 'import sys, timm_smpconv; assert not {"timm_smpconv.cli", "timm_smpconv.train"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, '-m', 'timm_smpconv', '--version'], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, f'timm-smpconv {timm_smpconv.__version__}\n')


def test_all_models_are_ours_and_registered():
    families = [name.partition('_')[0] for name in model_names()]
    assert (families.count('smpconv'), families.count('pelk')) == (11, 4) and len(families) == 15
    assert all(timm.is_model(name) for name in model_names())


def test_models_with_weights_are_those_of_the_package():
    """What timm lists as pretrained loads without a network."""
    listed = set(timm.list_pretrained('smpconv*') + timm.list_pretrained('pelk*'))
    assert listed == {name for name, weights in WEIGHTS.items() if weights.bundled}


def test_package_is_typed():
    assert (Path(timm_smpconv.__file__).parent / 'py.typed').is_file()


def test_version_is_that_of_the_distribution():
    try:
        version = importlib.metadata.version('timm-smpconv')
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('not installed')
    assert version == timm_smpconv.__version__


def _project():
    tomllib = pytest.importorskip('tomllib')  # Python >= 3.11
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def test_dependencies():
    """What is imported is declared, and the other way round."""
    names = {re.split('[><=]', dependency)[0] for dependency in _project()['dependencies']}
    imported = set()
    for path in (ROOT / 'timm_smpconv').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition('.')[0])
    extras = {'soundfile', 'triton'}  # asked for where they are needed
    others = imported - set(sys.stdlib_module_names) - {'timm_smpconv'} - extras
    assert names == {{'PIL': 'Pillow', 'yaml': 'pyyaml'}.get(name, name) for name in others}


def test_everything_in_the_folder_of_weights_is_packaged():
    tomllib = pytest.importorskip('tomllib')
    patterns = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['package-data']
    folder = ROOT / 'timm_smpconv'
    packaged = {path for pattern in patterns['timm_smpconv'] for path in folder.glob(pattern)}
    assert set((folder / 'pretrained').iterdir()) <= packaged


def test_modules_belong_to_installed_packages():
    """Every folder with modules is listed for the wheel."""
    tomllib = pytest.importorskip('tomllib')
    listed = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / 'timm_smpconv').rglob('*.py')}
    assert {'.'.join(folder.parts) for folder in folders} == set(listed)


def test_command_is_declared():
    assert _project()['scripts'] == {'timm-smpconv': 'timm_smpconv.cli:main'}


def test_map_in_the_readme_is_true():
    """Every path of the map exists, and every module and folder of the repository is on it."""
    text = (ROOT / 'README.md').read_text().split('## Map of the code')[1].split('## Licence')[0]
    paths = re.findall(r'^\| `([^`]+)` \|', text, re.MULTILINE)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = [path for path in (ROOT / 'timm_smpconv').rglob('[!_]*.py') if path.name != 'version.py']
    assert [str(m) for m in modules if not any(str(m.relative_to(ROOT)).startswith(path) for path in paths)] == []


def _slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize(
    'path', [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob('[!.]*/*.md')) + sorted(ROOT.glob('*.md'))]
)
def test_links(path):
    """Files and headings that a page points to exist."""
    text = (ROOT / path).read_text()
    for target in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```', '', text, flags=re.DOTALL)):
        if '://' in target:
            continue
        file, _, anchor = target.partition('#')
        linked = ((ROOT / path).parent / file).resolve() if file else ROOT / path
        assert linked.exists(), target
        if anchor:
            assert anchor in {_slug(line.lstrip('# ')) for line in linked.read_text().splitlines() if line[:1] == '#'}


def _python_block(words):
    """The Python block of the README that has these words in it."""
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if words in block]
    return block


def test_models_in_the_readme(tmp_path, monkeypatch):
    """The block runs, up to the export for ONNX (test_models.py); the ImageNet networks are smaller."""
    create_model = timm.create_model

    def create_smaller(name, **kwargs):
        smaller = {} if '_seq_' in name else dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
        return create_model(name, **smaller, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_smaller)
    monkeypatch.chdir(tmp_path)  # where it writes deployed.pth
    names = {}
    exec(_python_block('import timm_smpconv').partition('# ONNX')[0], names)
    assert names['digits'].pretrained_cfg['file'] and len(names['backbone'](names['x'])) == 3
    deployed = names['deployed'].eval()
    torch.testing.assert_close(deployed(names['x']), names['expected'], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_image_in_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {'timm': timm}
    exec(_python_block('Image.open('), names)
    assert names['probabilities'].shape == (1, 10)
    assert CIFAR10[names['probabilities'].argmax()] == 'cat'


def test_layers_in_the_readme():
    """The block runs, with the shapes that its comments say."""
    names = {}
    exec(_python_block('PeripheralConv2d(64'), names)
    assert names['y'].shape == (2, 64, 56, 56) and names['weight'].shape == (64, 1, 31, 31)
    grid = names['peripheral'].kernel
    assert (grid.weights.shape, grid.small.shape) == ((64, 1, 13, 13), (64, 1, 5, 5))
    assert names['causal'](torch.randn(2, 1, 784)).shape == (2, 30, 784)


@torch.inference_mode()
def test_moving_points_in_another_network_in_the_readme():
    names = {}
    exec(_python_block('SMPConv2d(channels'), names)
    kinds = [type(m) for m in names['deployed'].modules()]
    assert kinds.count(LargeConv2d) == 18 and SMPConv2d not in kinds


def test_another_network_in_the_readme():
    names = {}
    exec(_python_block('convert_large_convs'), names)
    assert sum(isinstance(m, LargeConv2d) for m in names['model'].modules()) == 18  # its blocks: 3, 3, 9 and 3


@torch.inference_mode()
def test_photographs_in_the_readme():
    """All ten right: each file has the name of its class."""
    files = sorted((ROOT / 'examples' / 'photos').iterdir())
    found = [result.predictions[0].label for result in predict_files(load_model('smpconv_cifar'), files)]
    assert found == [path.stem for path in files] and len(files) == 10
