"""timm's own test suite, from its source distribution of the installed version, over the models of this package."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[1]


def unpack_tests(archive, folder):
    """Writes NAME/tests/*.py of NAME.tar.gz, and nothing else, into a folder; returns its NAME."""
    name = archive.name.removesuffix('.tar.gz')
    (folder / name / 'tests').mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:  # not by extractall, whose filters some Python 3.10 and 3.11 lack
            if member.isfile() and re.fullmatch(rf'{re.escape(name)}/tests/\w+\.py', member.name):
                (folder / member.name).write_bytes(tar.extractfile(member).read())
    return folder / name


@pytest.fixture(scope='module')
def timm_tests(tmp_path_factory):
    """Folder that holds timm's tests/ alone, so that the installed timm is what they test."""
    folder = tmp_path_factory.mktemp('timm')
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', 'timm']
    result = subprocess.run(
        [*command, '-d', str(folder), f'timm=={timm.__version__}'], capture_output=True, text=True, timeout=300
    )
    if result.returncode:
        if os.environ.get('CI'):
            pytest.fail(f'cannot download timm {timm.__version__}: {result.stderr[-2000:]}')
        pytest.skip('needs the package index for the source distribution of timm')
    (archive,) = folder.glob('timm-*.tar.gz')
    return unpack_tests(archive, folder)


@pytest.mark.timeout(1200)
def test_upstream_model_tests(timm_tests):
    # without hub access, weights that are not bundled cannot load: models without weights are not listed as pretrained
    env = {**os.environ, 'TORCH_BACKEND': 'timm_smpconv', 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            'tests/test_models.py',
            '-k',
            'smpconv or pelk',
            '-q',
            '-p',
            'no:cacheprovider',
        ],
        cwd=timm_tests,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = int(re.search(r'(\d+) passed', result.stdout)[1])
    from timm_smpconv.weights import WEIGHTS

    assert passed >= 7 * len(WEIGHTS), result.stdout[-500:]
    assert 'failed' not in result.stdout.splitlines()[-1]
