"""recipes/train_cifar.py: augmentation, a teacher, phases, and going on after an interruption."""

import csv
import dataclasses
import runpy
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from synth import write_images

SCRIPT = Path(__file__).resolve().parents[1] / 'recipes' / 'train_cifar.py'


@pytest.fixture(scope='module')
def script():
    """What it defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cifar')
    write_images(folder / 'train', 6)
    return folder


def test_crops(script):
    """Each result is one of the windows of the image with its mirror image around it, or the mirror image of one."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode='reflect').byte()
    seen = set()
    for one, wanted in zip(script['crop_and_flip'](images), padded):
        fitting = [
            (y, x, flip)
            for flip in (False, True)
            for y in range(9)
            for x in range(9)
            if torch.equal(one.flip(2) if flip else one, wanted[:, y : y + 32, x : x + 32])
        ]
        assert len(fitting) == 1
        seen.add(fitting[0])
    assert len(seen) > 40 and {flip for _, _, flip in seen} == {False, True}


def test_cutmix(script):
    """Targets have the share of the pixels that are another image's; a share of the images stays whole."""
    torch.manual_seed(0)
    x = torch.arange(200.0).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    mixed, target = script['cutmix'](x, torch.eye(200), 0.5)
    own = torch.arange(200)
    share = (mixed == own.reshape(-1, 1, 1, 1)).float().mean((1, 2, 3))
    torch.testing.assert_close(target[own, own], share)
    torch.testing.assert_close(target[own, own - 1], 1 - share)
    assert ((mixed == own.reshape(-1, 1, 1, 1)) | (mixed == (own - 1).remainder(200).reshape(-1, 1, 1, 1))).all()
    assert 70 < (share == 1).sum() < 130 and share.min() < 0.3


def test_teacher_phases_and_resume(script, data, tmp_path, monkeypatch):
    """A ResNet is trained and teaches; a run that is killed within its second phase ends like an unbroken one."""

    def run(name, recipe, output, hold_out=1):
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(recipe))
        args = ['--config', tmp_path / f'{name}.yaml', '--data', data, '--output', tmp_path / output]
        script['main']([*map(str, args), '--hold-out', str(hold_out), '--device', 'cpu'])
        return load_file(tmp_path / output / 'model.safetensors')

    phase = dict(epochs=6, lr=0.05, weight_decay=5e-4, batch_size=25, warmup=2, model_ema_decay=0.5)
    run('teacher', dict(model='resnet18', opt='sgd', smoothing=0.1, phases=[phase]), 'teacher')
    phase = dict(phase, lr=5e-3, weight_decay=0.1)
    kwargs = dict(depth=1, dim=8, radius=0.05)
    student = dict(
        model='smpconv_seq_cifar',
        teacher=f'resnet18:{tmp_path / "teacher" / "model.safetensors"}',
        task_loss_weight=0.3,
        kd_temperature=2.0,
        opt_kwargs=dict(fallback_no_weight_decay=True, capturable=True),
        phases=[
            dict(phase, epochs=2, size=[32, 8], cutmix=0.5, model_kwargs=dict(kwargs, kernel_size=256)),
            dict(phase, model_kwargs=dict(kwargs, kernel_size=1024)),
        ],
    )
    whole = run('student', student, 'whole')
    log = list(csv.DictReader((tmp_path / 'whole' / 'log.csv').open()))
    assert [(row['phase'], row['epoch']) for row in log] == [('0', '0'), ('0', '1'), *(('1', str(i)) for i in range(6))]
    assert float(log[-1]['train_loss']) < float(log[2]['train_loss'])
    model = timm.create_model('smpconv_seq_cifar', checkpoint_path=str(tmp_path / 'whole/model.safetensors'), **kwargs)
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())

    save, trainer = script['Trainer'].save, script['Trainer']

    def save_and_die(self, phase, epoch, *args):
        save(self, phase, epoch, *args)
        if phase == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, 'save', save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run('student', student, 'broken')
    monkeypatch.setattr(trainer, 'save', save)
    again = run('student', student, 'broken')
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    with pytest.raises(ValueError, match='another recipe'):
        run('student', dict(student, seed=1), 'broken')
    with pytest.raises(ValueError, match='other images held out'):
        run('student', student, 'broken', hold_out=2)
    (tmp_path / 'broken' / 'model.safetensors').write_bytes(b'')  # not yet written when the process was killed
    file = tmp_path / 'teacher' / 'model.safetensors'
    tensors = load_file(file)
    save_file({**tensors, 'fc.bias': tensors['fc.bias'] + 1}, file)
    with pytest.raises(ValueError, match='another teacher'):
        run('student', student, 'broken')


def test_checkpoint_is_written_last(script, data, tmp_path, monkeypatch):
    """A run that is killed while it saves has weights and a log that belong together once it is run again."""
    recipe = script['Recipe'](
        'smpconv_seq_cifar', [script['Phase'](1, 1e-3, batch_size=25, model_kwargs=dict(depth=1, dim=4))]
    )
    parts = script['load_images'](data / 'train', 1)
    script['Trainer'](recipe, tmp_path / 'whole', *parts, torch.device('cpu')).run()

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(script['Trainer'].save.__globals__, 'write_rows', die)
    with pytest.raises(KeyboardInterrupt):
        script['Trainer'](recipe, tmp_path / 'broken', *parts, torch.device('cpu')).run()
    monkeypatch.undo()
    script['Trainer'](recipe, tmp_path / 'broken', *parts, torch.device('cpu')).run()
    whole, broken = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'broken'))
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())
    assert len((tmp_path / 'broken' / 'log.csv').read_text().splitlines()) == 2


@pytest.mark.parametrize('graph', [False, True])
def test_optimizer_of_another_device(graph, script, data, tmp_path):
    """A step that is recorded reads its rate from a tensor, one that is launched from a number, whatever was saved."""
    phase = script['Phase'](1, 1e-3)
    recipe = script['Recipe']('smpconv_seq_cifar', [phase], opt='adamw', opt_kwargs=dict(capturable=True))
    trainer = script['Trainer'](recipe, tmp_path, *script['load_images'](data / 'train', 1), torch.device('cpu'))
    states = {}
    for trainer.graph in (not graph, graph):
        optimizer = trainer.make_optimizer(torch.nn.Linear(2, 2), phase)
        for parameter in optimizer.param_groups[0]['params']:
            optimizer.state[parameter]['step'] = torch.tensor(3.0)
        states[trainer.graph] = optimizer.state_dict()
    optimizer.load_state_dict(states[not graph])
    trainer.adapt(optimizer)
    for group in optimizer.param_groups:
        assert group['capturable'] == graph and torch.is_tensor(group['lr']) == graph
        assert float(group['lr']) == pytest.approx(1e-3)


def test_asked_once(script, data, tmp_path):
    """Of images that are not changed, a teacher that is asked once says what one says that is asked in each step."""
    recipe = script['Recipe'](
        'smpconv_seq_cifar', [script['Phase'](1, 1e-3)], teacher='smpconv_cifar', kd_temperature=2.0
    )
    train, held = script['load_images'](data / 'train', 1)
    assert len(train[1]) == 50 and held[1].tolist() == list(range(10))
    phase = script['Phase'](1, 1e-3, model_kwargs=dict(depth=1, dim=8, kernel_size=64))

    def student():
        torch.manual_seed(0)
        model = script['create'](recipe, phase, None).train()
        model.head.fc.weight.data *= 100  # almost zero, logits would make nearly the same loss of any answers
        return model

    losses = []
    for once in (False, True):
        recipe = dataclasses.replace(recipe, ask_once=once, task_loss_weight=0.3)
        trainer = script['Trainer'](recipe, tmp_path, train, held, torch.device('cpu'))
        x, target = trainer.normalize(train[0][:20]), F.one_hot(train[1][:20], 10).float()
        for answers in ([trainer.answers[:20]], [trainer.answers[:20].roll(1, 1)]) if once else ([],):
            model = student()
            step = trainer.make_step(model, trainer.make_optimizer(model, phase), phase)
            losses.append(step(x, target, *answers).item())
    lesson = trainer.teacher(x).div(2).softmax(1)
    # a run can go on where another processor renders the teacher's kernels
    undeployed = timm.create_model('smpconv_cifar', pretrained=True).state_dict()
    assert trainer.data.endswith(script['_digest'](list(undeployed.values())))
    logits = student()(x)
    wanted = 0.3 * F.cross_entropy(logits, target) + 0.7 * 4 * F.cross_entropy(logits / 2, lesson)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) == pytest.approx(wanted.item(), rel=2e-2)
    assert losses[2] != pytest.approx(losses[1], rel=4e-2)  # of other answers


def test_nothing_held_out(script, data, tmp_path):
    """All images are trained on, and no accuracy is claimed."""
    (train, held) = script['load_images'](data / 'train', 0)
    assert len(train[1]) == 60 and held[0].shape == (0, 3, 32, 32)
    phases = [script['Phase'](1, 1e-3, batch_size=n, model_kwargs=dict(depth=1, dim=4)) for n in (30, 61)]
    for phase in phases:
        recipe = script['Recipe']('smpconv_seq_cifar', [phase])
        trainer = script['Trainer'](recipe, tmp_path / str(phase.batch_size), train, held, torch.device('cpu'))
        if phase.batch_size > 60:
            with pytest.raises(ValueError, match='lower batch_size'):
                trainer.run()
        else:
            trainer.run()
            assert [row['val_accuracy'] for row in trainer.rows] == ['']


def test_recipes_that_cannot_work(script):
    phase = script['Phase']
    with pytest.raises(ValueError, match='divide'):
        phase(1, 1e-3, size=(32, 12))
    for name, wrong in (
        ('epochs', 0),
        ('epochs', 1.5),
        ('batch_size', 0),
        ('lr', float('nan')),
        ('min_lr', 1.0),
        ('cutmix', 2),
        ('warmup', -2),
        ('weight_decay', float('inf')),
        ('model_ema_decay', 2),
        ('size', (8, 8, 8)),
    ):
        with pytest.raises(ValueError, match=f'{name} must be .*got'):
            phase(**{'epochs': 1, 'lr': 1e-3, name: wrong})
    with pytest.raises(ValueError, match='kd_temperature must be positive, got 0'):
        script['Recipe']('smpconv_seq_cifar', [phase(1, 1e-3)], teacher='smpconv_cifar', kd_temperature=0)
    for kwargs in (dict(phases=[phase(1, 1e-3)]), dict(phases=[phase(1, 1e-3, cutmix=0.5)], teacher='smpconv_cifar')):
        with pytest.raises(ValueError, match='ask_once'):
            script['Recipe']('smpconv_seq_cifar', ask_once=True, **kwargs)
    with pytest.raises(ValueError, match='resnet18:FILE'):
        script['create_teacher']('resnet18')
    with pytest.raises(ValueError, match=r'task_loss_weight must lie in \[0, 1\), got 1'):
        script['Recipe']('smpconv_seq_cifar', [phase(1, 1e-3)], teacher='smpconv_cifar', task_loss_weight=1)
    with pytest.raises(ValueError, match='give one of them'):
        script['Recipe']('smpconv_seq_cifar', [phase(1, 1e-3)], pretrained=True, initial_checkpoint='x.safetensors')
    with pytest.raises(ValueError, match='phases is empty'):
        script['Recipe']('smpconv_seq_cifar', [])
    for wrong in (dict(initial_checkpoint='none.safetensors'), dict(teacher='resnet18:none.safetensors')):
        with pytest.raises(FileNotFoundError, match='no weights at none.safetensors'):
            script['Recipe']('smpconv_seq_cifar', [phase(1, 1e-3)], **wrong).check_files()


def test_images_that_do_not_fit(script, data, tmp_path):
    load = script['load_images']
    with pytest.raises(ValueError, match='hold_out must not be negative, got -1'):
        load(data / 'train', -1)
    shutil.copytree(data / 'train', tmp_path / 'train')
    image = tmp_path / 'train' / 'cat' / '0.png'
    Image.new('RGB', (64, 32)).save(image)
    with pytest.raises(ValueError, match='0.png is 64 x 32, expected 32 x 32'):
        load(tmp_path / 'train', 0)
    shutil.rmtree(image.parent)
    with pytest.raises(ValueError, match="expected those of CIFAR-10: .*'cat'"):
        load(tmp_path / 'train', 0)


def test_reading_a_recipe(script, tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('model: smpconv_cifar\nphases:\n- {epochs: 1, lr: 1e-3}\n')
    assert script['Recipe'].read(path).phases[0].lr == 0.001  # text by YAML 1.1
    for text, message in (
        ('phases: [{epochs: 1, rate: 1.0}]', 'no recipe of this script: .*rate'),
        ('phases: [{epochs: 1, lr: 1.0}]', 'no recipe of this script: .*model'),
        ('- a', 'must hold the fields'),
        ('a: [', 'is not YAML'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            script['Recipe'].read(path)


def test_shipped_recipes(script):
    """Those for the script can be read, and name themselves in their heads."""
    folder = SCRIPT.parent / 'shipped'
    files = [path for path in folder.rglob('*.yaml') if 'train_cifar.py --config' in path.read_text()]
    assert len(files) >= 4
    for path in files:
        recipe = script['Recipe'].read(path)
        assert recipe.phases and f'--config recipes/shipped/{path.relative_to(folder)}' in path.read_text()
