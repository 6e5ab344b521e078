"""recipes/ablations.py: the paper's settings, and runs of them."""

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from synth import write_images

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'


@pytest.fixture
def script(monkeypatch):
    """What it defines."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return runpy.run_path(str(RECIPES / 'ablations.py'))


def test_settings(script):
    """Each differs from the model in what its table varies; the numbers of parameters are those of Table 9."""
    reference = timm.create_model('smpconv_cifar')
    thousands = {}
    for setting in script['SETTINGS']:
        model = timm.create_model('smpconv_cifar', **setting.kwargs)
        kernel, own = model.stages[3].conv2.large.kernel, reference.stages[3].conv2.large.kernel
        found = dict(
            learn_coords=kernel.coords.requires_grad,
            learn_radius=kernel.radius_offset.requires_grad,
            coord_std=kernel.coord_std,
            radius=kernel.init_radius,
            num_points=kernel.weights.shape[2],
        )
        assert found == setting.kwargs
        assert (
            (setting.paper == 93.0) == (setting.folder == 'paper') == (not setting.change or found == script['PAPER'])
        )
        if setting.folder == 'paper':
            assert (kernel.coord_std, kernel.init_radius) == (own.coord_std, own.init_radius)
        if setting.table == 9:
            thousands[setting.kwargs['num_points']] = sum(p.numel() for p in model.parameters())
    assert {n: round(count / 1000) for n, count in thousands.items()} == {4: 250, 8: 330, 16: 490, 32: 809, 64: 1447}
    assert [sum(s.table == table for s in script['SETTINGS']) for table in (6, 7, 8, 9)] == [4, 4, 4, 5]
    assert len({setting.folder for setting in script['SETTINGS']}) == 14


def test_runs(script, tmp_path, capsys, monkeypatch):
    """A table is made, with a mean over seeds; what was run is not run again."""
    write_images(tmp_path / 'data' / 'train', 4)
    recipe = dict(
        model='smpconv_cifar',
        opt='adam',
        phases=[dict(epochs=1, lr=0.01, batch_size=10, warmup=1, model_kwargs=dict(dims=[4, 4], kernel_size=9))],
    )
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    args = ['--data', tmp_path / 'data', '--output', tmp_path / 'out', '--config', tmp_path / 'recipe.yaml']
    args = [*map(str, args), '--tables', '6', '--seeds', '0', '1', '--hold-out', '1', '--device', 'cpu']
    script['main'](args)
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'out' / 'ablations.csv').open()))
    assert [row['setting'] for row in rows] == ['fixed points', 'learned radii', 'learned coordinates', 'both learned']
    logs = [list(csv.DictReader((tmp_path / 'out' / f'paper-seed{n}' / 'log.csv').open()))[-1] for n in (0, 1)]
    shares = [100 * float(log['val_accuracy']) for log in logs]
    assert rows[-1] == dict(
        table='6',
        setting='both learned',
        paper='93.00',
        held_out=f'{np.mean(shares):.2f}',
        std=f'{np.std(shares, ddof=1):.2f}',
        seeds='2',
    )
    assert '| ' + ' | '.join(rows[-1].values()) + ' |' in out.splitlines()
    key = 'stem.conv.large.kernel.coords'
    for folder, still in (('learn_coords=False-learn_radius=False-seed0', True), ('paper-seed0', False)):
        saved = torch.load(tmp_path / 'out' / folder / 'checkpoint.pt')  # the average lags behind what moves
        assert torch.equal(saved['state_dict'][key], saved['state_dict_ema'][key]) == still

    monkeypatch.setattr(script['Trainer'], 'save', None)  # nothing can be trained any more
    script['main'](args)
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit):
        script['main']([*args, '--hold-out', '0'])


def test_default_recipe(script):
    """The paper's optimizer, weight decay and dropout, on the points of a setting."""
    setting = next(s for s in script['SETTINGS'] if s.label == 'radius 0.3')
    recipe = script['make_recipe'](setting, 7, 12)
    (phase,) = recipe.phases
    assert (recipe.opt, recipe.seed, phase.epochs, phase.weight_decay) == ('adam', 7, 12, 1e-5)
    model = timm.create_model(recipe.model, **phase.model_kwargs)
    assert model.stages[0].drop.p == 0.1 and model.stages[0].conv1.large.kernel.init_radius == 0.3
