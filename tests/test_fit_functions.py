"""recipes/fit_functions.py: the paper's fitting experiment."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / 'recipes' / 'fit_functions.py'


@pytest.fixture(scope='module')
def script():
    """What it defines."""
    return runpy.run_path(str(SCRIPT))


def test_functions(script):
    """Sampled as kernels are: x from left to right, y from bottom to top."""
    steps = torch.linspace(-1, 1, 51)
    for name, function in script['FUNCTIONS'].items():
        values = script['sample'](name)
        assert values.shape == (51, 51) and values.abs().max() > 0.9
        for row, column in ((0, 0), (3, 40), (50, 17)):
            expected = function(steps[column], steps[50 - row])
            torch.testing.assert_close(values[row, column], expected, rtol=1e-4, atol=1e-5)


def test_what_is_learned(script):
    """From the same start, what moves fits better; of fixed points the coordinates stay."""
    target = script['sample']('waves')
    errors = {learned: script['fit'](target, learned, 0, 150, 60)[0] for learned in script['LEARNED']}
    assert errors['weights, radii and coordinates'] < 0.9 * min(errors['weights'], errors['weights and radii'])
    error, kernel = script['fit'](target, 'weights', 0, 150, 60)
    assert error == errors['weights'] == pytest.approx(float((kernel - target).square().mean().sqrt()))
    assert script['fit'](target, 'weights', 1, 150, 60)[0] != error


def test_run(script, tmp_path, capsys, monkeypatch):
    """Table, file and picture; what was run is not run again, and other settings are refused."""
    args = ['--output', str(tmp_path / 'out'), '--seeds', '0', '1', '--steps', '2', '--points', '5']
    script['main']([*args, '--picture', str(tmp_path / 'fit.png')])
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'out' / 'fit_functions.csv').open()))
    assert len(rows) == 2 * 3 * 2
    errors = [float(row['error']) for row in rows if (row['function'], row['learned']) == ('rings', 'weights')]
    mean, std = torch.tensor(errors).mean(), torch.tensor(errors).std()
    line = next(line for line in out.splitlines() if line.startswith('| rings | weights |'))
    assert [float(cell) for cell in line.split('|')[3:6]] == pytest.approx([float(mean), float(std), 2], abs=1e-4)
    with Image.open(tmp_path / 'fit.png') as image:
        assert image.format == 'PNG' and image.width > 1.5 * image.height

    monkeypatch.setitem(script['main'].__globals__, 'fit', None)  # nothing can be fitted any more
    script['main'](args)
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit):
        script['main']([*args[:-1], '6'])
    assert 'another folder' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script['main']([*args, '--steps', '0'])
