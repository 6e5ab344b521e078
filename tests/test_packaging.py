"""The package as a guest of Python and timm."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_smpconv
from timm_smpconv.catalog import model_names

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
