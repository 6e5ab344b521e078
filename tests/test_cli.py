"""The command line, in process."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_smpconv
from timm_smpconv.catalog import model_names
from timm_smpconv.cli import main
from timm_smpconv.predict import class_names, load_image, load_model, predict_files
from timm_smpconv.weights import WEIGHTS, bundled_path

DIGITS = Path(__file__).resolve().parents[1] / 'examples' / 'digits'
RECIPES = Path(__file__).resolve().parents[1] / 'recipes'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Random weights of the default model."""
    torch.manual_seed(0)
    model = timm.create_model('smpconv_seq_mnist')
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def model(checkpoint):
    return load_model('smpconv_seq_mnist', checkpoint)


@pytest.fixture
def digit(tmp_path):
    path = tmp_path / 'digit.png'
    pixels = np.random.RandomState(0).randint(0, 256, (40, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return status, out, err


def test_version(capsys):
    assert run(capsys, '--version') == (0, f'timm-smpconv {timm_smpconv.__version__}\n', '')


@pytest.mark.parametrize('args', [[], ['fly'], ['predict'], ['validate'], ['predict', 'x.png', '--topk', 'many']])
def test_wrong_arguments(capsys, args):
    status, out, err = run(capsys, *args)
    assert status == 2 and not out and 'usage:' in err


# list


def test_list(capsys):
    status, out, err = run(capsys, 'list')
    assert status == 0 and not err
    rows = {line.split()[0]: line for line in out.split('\n\n')[0].splitlines()[1:]}
    assert sorted(rows) == model_names() == sorted(key.partition('.')[0] for key in WEIGHTS)
    assert '26,705,248' in rows['smpconv_tiny'] and '5.71' in rows['smpconv_tiny']


def test_list_json(capsys):
    status, out, _ = run(capsys, 'list', '--json')
    entries = {entry['name']: entry for entry in json.loads(out)}
    assert status == 0 and sorted(entries) == model_names()
    expected = dict(smpconv_tiny=5.71, smpconv_base=16.61, smpconv_mobile31=1.33, smpconv_mobile51=2.44)
    for name, macs in expected.items():
        assert entries[name]['macs'] / 1e9 == pytest.approx(macs, abs=0.005), name
    for name, entry in entries.items():
        weights = WEIGHTS[f'{name}.{entry["tag"]}']
        assert entry['source'] == weights.source and entry['paper_accuracy'] == weights.paper_accuracy


def test_list_leaves_other_packages_out():
    @timm.models.register_model
    def smpconv_of_somebody_else(pretrained=False, **kwargs):
        raise NotImplementedError

    try:
        assert 'smpconv_of_somebody_else' in timm.list_models('smpconv*')
        assert 'smpconv_of_somebody_else' not in model_names()
    finally:
        registry = timm.models._registry
        registry._model_entrypoints.pop('smpconv_of_somebody_else')
        registry._model_to_module.pop('smpconv_of_somebody_else')
        for names in registry._module_to_models.values():
            names.discard('smpconv_of_somebody_else')


# predict: kinds of files


def _pixels(shape, dtype=np.uint8, high=256):
    return np.random.RandomState(1).randint(0, high, shape).astype(dtype)


def _images():
    grey = Image.fromarray(_pixels((37, 29)))
    rgb = Image.fromarray(_pixels((37, 29, 3)))
    rgba = Image.fromarray(_pixels((37, 29, 4)))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield '1.png', grey.convert('1'), {}
    yield '1.tif', grey.convert('1'), {}
    yield 'L.png', grey, {}
    yield 'L_transparent.png', grey, dict(transparency=3)
    yield 'LA.png', rgba.convert('LA'), {}
    yield 'P.png', rgb.quantize(16), {}
    yield 'P_transparent.png', rgb.quantize(16), dict(transparency=0)
    yield 'P_alpha.png', rgb.quantize(4), dict(transparency=bytes([0, 80, 160, 255]))
    yield 'RGB.png', rgb, {}
    yield 'RGB_transparent.png', rgb, dict(transparency=(1, 2, 3))
    yield 'RGBA.png', rgba, {}
    yield 'RGBA.webp', rgba, {}
    yield 'RGB.bmp', rgb, {}
    yield 'RGB.ppm', rgb, {}
    yield 'L.jpg', grey, {}
    yield 'RGB.jpg', rgb, {}
    yield 'rotated.jpg', rgb, dict(exif=exif.tobytes())
    yield 'CMYK.jpg', rgb.convert('CMYK'), {}
    yield 'CMYK.tif', rgb.convert('CMYK'), {}
    yield 'YCbCr.tif', rgb.convert('YCbCr'), {}
    yield 'LAB.tif', Image.merge('LAB', rgb.split()), {}
    yield 'I;16.png', Image.fromarray(_pixels((37, 29), np.uint16, 65536)), {}
    yield 'I;16.tif', Image.fromarray(_pixels((37, 29), np.uint16, 65536)), {}
    yield 'I.tif', Image.fromarray(_pixels((37, 29), np.int32, 1 << 20)), {}
    yield 'F.tif', Image.fromarray(_pixels((37, 29), np.float32)), {}
    yield 'animation.gif', grey, dict(save_all=True, append_images=[rgb.convert('L')])
    yield 'animation.png', rgb, dict(save_all=True, append_images=[rgb.rotate(180)])
    yield 'one_pixel.png', grey.resize((1, 1)), {}
    yield 'wide.png', Image.new('L', (20000, 1), 200), {}
    yield 'high.png', Image.new('L', (2, 9000), 200), {}


IMAGES = list(_images())


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name,image,options', IMAGES, ids=[image[0] for image in IMAGES])
def test_load_image(tmp_path, name, image, options, channels):
    path = tmp_path / name
    image.save(path, **options)
    loaded = load_image(path, channels)
    assert loaded.mode == ('L' if channels == 1 else 'RGB')
    assert loaded.size == (image.size[::-1] if name == 'rotated.jpg' else image.size)


def test_predict_takes_all_kinds_of_files(capsys, tmp_path, checkpoint):
    files = []
    for name, image, options in IMAGES:
        files.append(str(tmp_path / name))
        image.save(files[-1], **options)
    status, out, err = run(capsys, 'predict', *files, '--checkpoint-path', checkpoint, '--json')
    entries = json.loads(out)
    assert status == 0 and not err and [entry['file'] for entry in entries] == files
    for entry in entries:
        assert [len(entry), len(entry['predictions'])] == [2, 3]
        probabilities = [p['probability'] for p in entry['predictions']]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1.0001
        assert all(p['label'] == str(p['index']) for p in entry['predictions'])


@pytest.mark.parametrize('dtype,white', [(np.uint8, 255), (np.uint16, 65535), (np.int32, 65535), (np.float32, 1)])
def test_scale_of_grey_values(tmp_path, dtype, white):
    path = tmp_path / 'grey.tif'
    Image.fromarray((np.array([[0, 0.5, 1]]) * white).astype(dtype)).save(path)
    assert np.asarray(load_image(path, 1)).astype(int)[0] == pytest.approx([0, 127, 255], abs=1)


def test_transparent_ground_and_invert(tmp_path):
    path = tmp_path / 'clear.png'
    Image.new('RGBA', (2, 2), (90, 90, 90, 0)).save(path)
    assert load_image(path, 1, background=0).getpixel((0, 0)) == 0
    assert load_image(path, 3, background=255).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(path, 1, background=255, invert=True).getpixel((0, 0)) == 0


def test_first_frame(tmp_path):
    path = tmp_path / 'two.gif'
    Image.new('L', (5, 5), 10).save(path, save_all=True, append_images=[Image.new('L', (5, 5), 200)])
    assert load_image(path, 1).getpixel((2, 2)) == 10


def test_inverted_file_gives_the_same(capsys, tmp_path, checkpoint):
    light = Image.fromarray(_pixels((28, 28)))
    light.save(tmp_path / 'light.png')
    Image.eval(light, lambda v: 255 - v).save(tmp_path / 'dark.png')
    _, out, _ = run(capsys, 'predict', tmp_path / 'light.png', '--checkpoint-path', checkpoint)
    _, inverted, _ = run(capsys, 'predict', tmp_path / 'dark.png', '--checkpoint-path', checkpoint, '--invert')
    assert out.split(': ')[1] == inverted.split(': ')[1]


def test_preprocessing_is_that_of_the_weights(model):
    """A file of 28 x 28 reaches the network as the normalised test image."""
    path = next(DIGITS.glob('digit_7_a.*'))
    (result,) = predict_files(model, [path], topk=10)
    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).float().reshape(1, 1, 28, 28) / 255
    with torch.no_grad():
        expected = model((pixels - 0.1307) / 0.3081).softmax(1)[0]
    for prediction in result.predictions:
        assert prediction.probability == pytest.approx(expected[prediction.index].item(), rel=1e-4)


def test_batches_do_not_matter(model, tmp_path, digit):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'')
    files = [*sorted(DIGITS.iterdir()), bad, digit, bad, *sorted(DIGITS.iterdir())]
    one, many = ([*predict_files(model, files, batch_size=size)] for size in (1, 7))
    assert [r.file for r in one] == [r.file for r in many] == [str(f) for f in files]
    for a, b in zip(one, many):
        assert a.error == b.error
        assert [p.index for p in a.predictions] == [p.index for p in b.predictions]
        assert [p.probability for p in a.predictions] == pytest.approx([p.probability for p in b.predictions], rel=1e-4)


# predict: failures


def test_bad_files_are_reported_and_the_rest_classified(capsys, tmp_path, digit, checkpoint, monkeypatch):
    good = io.BytesIO()
    Image.fromarray(_pixels((200, 200))).save(good, 'PNG')
    contents = {'text.png': b'no image', 'empty.jpg': b'', 'cut.png': good.getvalue()[:5000]}
    bad = [tmp_path / 'absent.png', tmp_path]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        bad.append(tmp_path / name)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    bad.append(tmp_path / 'bomb.png')
    bad[-1].write_bytes(good.getvalue())

    arguments = ['predict', bad[0], digit, *bad[1:], '--checkpoint-path', checkpoint]
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert out.startswith(f'{digit}: ') and out.count('\n') == 1
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad):
        assert re.fullmatch(rf'timm-smpconv: cannot read {re.escape(str(path))}: .{{5,}}', line), line
    assert 'No such file' in lines[0] and 'directory' in lines[1] and 'exceeds limit' in lines[-1]

    status, out, err = run(capsys, *arguments, '--json')
    entries = json.loads(out)
    assert status == 1 and len(err.splitlines()) == len(bad)
    assert [set(entry) for entry in entries] == [{'file', 'error'}, {'file', 'predictions'}] + [{'file', 'error'}] * 5


def test_only_bad_files(capsys, tmp_path, checkpoint):
    status, out, err = run(capsys, 'predict', tmp_path / 'absent.png', '--json', '--checkpoint-path', checkpoint)
    assert status == 1 and len(json.loads(out)) == 1 and err.count('\n') == 1


def test_file_name_that_is_not_text(capsys, tmp_path, digit, checkpoint):
    odd = tmp_path / 'odd_\udcff.png'
    try:
        odd.write_bytes(digit.read_bytes())
    except OSError:
        pytest.skip('the file system takes text names alone')
    status, out, _ = run(capsys, 'predict', odd, '--checkpoint-path', checkpoint)
    assert status == 0 and 'odd_' in out


@pytest.mark.parametrize('topk,count', [(1, 1), (4, 4), (10, 10), (500, 10)])
def test_topk(capsys, digit, checkpoint, topk, count):
    _, out, _ = run(capsys, 'predict', digit, '--topk', topk, '--json', '--checkpoint-path', checkpoint)
    assert len(json.loads(out)[0]['predictions']) == count


@pytest.mark.parametrize('topk', ['0', '-1', '1.5', 'x'])
def test_topk_out_of_range(capsys, digit, topk):
    status, _, err = run(capsys, 'predict', digit, f'--topk={topk}')
    assert status == 2 and 'positive whole number' in err


def test_model_without_weights(capsys, digit):
    status, out, err = run(capsys, 'predict', digit, '--model', 'smpconv_mobile31')
    assert status == 2 and not out and err.count('\n') == 1
    assert 'No pretrained weights exist for smpconv_mobile31.in1k' in err and '--checkpoint-path' in err


@pytest.mark.parametrize('command', ['predict', 'validate'])
@pytest.mark.parametrize('name', ['smpconv_huge', 'resnet18', 'smpconv_tiny.in22k', ''])
def test_unknown_model(capsys, digit, command, name):
    arguments = [digit] if command == 'predict' else ['--data-dir', digit.parent]
    status, out, err = run(capsys, command, *arguments, '--model', name)
    assert status == 2 and not out and err.count('\n') == 1
    assert 'Unknown' in err and 'smpconv_tiny' in err


@pytest.mark.parametrize('name', ['smpconv_seq_chartraj', 'smpconv_seq_speech.sc', 'smpconv_seq_speech_raw'])
def test_model_of_other_series(capsys, digit, name):
    status, out, err = run(capsys, 'predict', digit, '--model', name)
    assert status == 2 and not out and 'does not classify images' in err and 'smpconv_cifar' in err


def test_bad_checkpoints(capsys, tmp_path, digit):
    paths = {name: tmp_path / name for name in ('absent.pth', 'text.pth', 'text.safetensors', 'other.safetensors')}
    paths['text.pth'].write_text('no weights')
    paths['text.safetensors'].write_text('no weights')
    save_file({'other': torch.zeros(1)}, paths['other.safetensors'])
    for path in paths.values():
        status, out, err = run(capsys, 'predict', digit, '--checkpoint-path', path)
        assert status == 2 and not out and str(path) in err.splitlines()[-1], err


def test_deployed_checkpoint(capsys, tmp_path, digit, checkpoint, model):
    save_file(model.state_dict(), tmp_path / 'deployed.safetensors')
    outputs = [
        json.loads(run(capsys, 'predict', digit, '--json', '--checkpoint-path', path)[1])[0]['predictions']
        for path in (checkpoint, tmp_path / 'deployed.safetensors')
    ]
    for a, b in zip(*outputs):
        assert a['index'] == b['index'] and a['probability'] == pytest.approx(b['probability'], rel=1e-4)


def test_interrupt(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_smpconv.cli.describe_models', interrupt)
    assert run(capsys, 'list') == (130, '', '')


def test_class_names():
    names = {name: class_names(timm.create_model(name, device='meta')) for name in model_names()}
    assert names['smpconv_seq_pmnist'] == list('0123456789')
    assert names['smpconv_cifar'][3] == names['smpconv_seq_cifar'][3] == 'cat'
    assert len(names['smpconv_tiny']) == 1000 and names['smpconv_tiny'][207] == 'golden retriever'
    assert names['smpconv_seq_chartraj'] == [str(i) for i in range(20)]
    assert class_names(timm.create_model('smpconv_tiny', num_classes=2, device='meta')) == ['0', '1']


# validate and train


@pytest.fixture
def mnist(tmp_path):
    """A small MNIST in the format of the original."""
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    generator = np.random.RandomState(0)
    for prefix, count in (('train', 48), ('t10k', 20)):
        images, labels = generator.randint(0, 256, (count, 28, 28)), generator.randint(0, 10, count)
        for kind, code, values in (('images-idx3', 3, images), ('labels-idx1', 1, labels)):
            header = np.array([0x800 + code, *values.shape], '>u4').tobytes()
            (raw / f'{prefix}-{kind}-ubyte').write_bytes(header + values.astype(np.uint8).tobytes())
    return tmp_path / 'data'


def test_validate(capsys, mnist, checkpoint):
    arguments = ['validate', '--data-dir', mnist, '--checkpoint-path', checkpoint]
    status, out, _ = run(capsys, *arguments, '--json')
    entry = json.loads(out)
    assert status == 0 and entry['total'] == 20 and entry['accuracy'] == pytest.approx(entry['hits'] / 20 * 100)
    low, high = entry['interval']
    assert 0 <= low <= entry['accuracy'] <= high <= 100 and 10 < high - low < 50
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and f'{entry["hits"]} of 20' in out


def test_validate_says_what_is_missing(capsys, tmp_path, checkpoint):
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_tiny', '--data-dir', tmp_path)
    assert status == 2 and 'MNIST models' in err
    status, _, err = run(capsys, 'validate', '--data-dir', tmp_path, '--checkpoint-path', checkpoint)
    assert status == 2 and 'No MNIST under' in err and err.count('\n') == 1


def test_train(capsys, tmp_path, mnist):
    config = tmp_path / 'recipe.json'
    config.write_text('{"epochs": 5, "batch_size": 4, "lr": 1}')
    arguments = ['train', '--data-dir', mnist, '--output', tmp_path / 'run', '--config', config]
    arguments += ['--epochs', 1, '--val-images', 40, '--lr', 1e-3, '--no-augment']
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and Path(out.strip()).is_file()
    recipe = json.loads((tmp_path / 'run' / 'recipe.json').read_text())
    assert (recipe['epochs'], recipe['batch_size'], recipe['lr'], recipe['augment']) == (1, 4, 1e-3, False)
    status, _, err = run(capsys, 'validate', '--data-dir', mnist, '--checkpoint-path', out.strip())
    assert status == 0
    status, _, err = run(capsys, *arguments, '--seed', 3)
    assert status == 2 and 'another recipe' in err


@pytest.mark.parametrize(
    'recipe,message',
    [
        ('{', 'is not JSON'),
        ('[]', 'JSON object'),
        ('{"speed": 1}', 'unknown field'),
        ('{"epochs": "8"}', 'of type int'),
        ('{"model": "resnet18"}', 'Unknown model'),
        ('{"model": "smpconv_tiny"}', 'MNIST models'),
    ],
)
def test_bad_recipe(capsys, tmp_path, recipe, message):
    path = tmp_path / 'recipe.json'
    path.write_text(recipe)
    status, _, err = run(capsys, 'train', '--data-dir', tmp_path, '--output', tmp_path / 'run', '--config', path)
    assert status == 2 and message in err and not (tmp_path / 'run').exists()


def test_recipes_of_the_repository_are_valid(capsys, tmp_path):
    for path in RECIPES.glob('*.json'):
        status, _, err = run(capsys, 'train', '--data-dir', tmp_path, '--output', tmp_path / 'run', '--config', path)
        assert status == 2 and 'No MNIST under' in err


# the bundled weights


@pytest.mark.skipif(not bundled_path('smpconv_seq_mnist.smnist'), reason='no bundled weights')
def test_sample_digits(capsys):
    files = sorted(DIGITS.iterdir())
    status, out, err = run(capsys, 'predict', *files, '--json')
    assert status == 0 and not err and len(files) >= 8
    for file, entry in zip(files, json.loads(out)):
        assert entry['predictions'][0]['label'] == file.stem.split('_')[1], entry
