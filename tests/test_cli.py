"""The command line, in process."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import timm
import torch
from datasets import speech_members, write_mnist, write_speech, write_tar, write_trajectories
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_smpconv
from timm_smpconv._files import save_tensors
from timm_smpconv.catalog import model_names
from timm_smpconv.checkpoint import ancestors
from timm_smpconv.classes import CIFAR10, SPEECH_WORDS
from timm_smpconv.cli import main
from timm_smpconv.convert import convert
from timm_smpconv.data import speaker_number
from timm_smpconv.predict import check_inputs, class_names, load_image, load_model, predict_files
from timm_smpconv.recipe import Recipe, read_recipe
from timm_smpconv.tasks import TASKS, network_input, stepwise
from timm_smpconv.train import train
from timm_smpconv.validate import validate
from timm_smpconv.weights import WEIGHTS, bundled_path, design_effect, training_speakers, wilson

DIGITS = Path(__file__).resolve().parents[1] / 'examples' / 'digits'
WORDS = DIGITS.with_name('words')
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


@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_closed_streams(closed, digit):
    """As some service managers start programs."""
    code = f'import sys; sys.{closed} = None; from timm_smpconv.cli import main; raise SystemExit(main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-c', code, 'predict', str(digit)], capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    assert ('digit.png' in done.stdout) == (closed == 'stderr')


def test_reader_that_has_seen_enough(digit):
    """`timm-smpconv list | head` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, '-m', 'timm_smpconv', 'list']
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_version(capsys):
    assert run(capsys, '--version') == (0, f'timm-smpconv {timm_smpconv.__version__}\n', '')


@pytest.mark.parametrize('args', [[], ['fly'], ['predict'], ['validate'], ['predict', 'x.png', '--topk', 'many']])
def test_wrong_arguments(capsys, args):
    status, out, err = run(capsys, *args)
    assert status == 2 and not out and 'usage:' in err


@pytest.mark.parametrize('command', ['', 'predict', 'list', 'validate', 'data', 'train', 'convert', 'push', 'verify'])
def test_help(capsys, command):
    """argparse formats it, and fails on a stray percent sign."""
    status, out, err = run(capsys, *command.split(), '--help')
    assert status == 0 and not err and out.startswith(f'usage: timm-smpconv {command}'.rstrip())


def test_help_of_train_names_every_field(capsys):
    _, out, _ = run(capsys, 'train', '--help')
    for field in dataclasses.fields(Recipe):
        option = '--' + field.name.replace('_', '-')
        assert re.search(rf'^  {option}[ ,]', out, re.M), option


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
    if int(PIL.__version__.split('.')[0]) >= 13:  # older ones cannot read what they have written
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


# blocks that compression and conversion leave as they are, in a row
BLOCKS = np.array([[255, 0, 0], [0, 0, 255], [255, 255, 0], [90, 90, 90]], np.uint8)


def _blocks(tmp_path, name, image, tolerance, wanted=BLOCKS, **options):
    """Saves a row of blocks of 16 x 16 pixels, and compares the middle of each with what is read."""
    image.resize((16 * image.width, 16 * image.height), Image.Resampling.NEAREST).save(tmp_path / name, **options)
    read = np.asarray(load_image(tmp_path / name, 3))[8::16, 8::16].astype(int)
    assert np.abs(read - np.reshape(wanted, read.shape)).max() <= tolerance, read


@pytest.mark.parametrize('name,tolerance', [('CMYK.tif', 0), ('CMYK.jpg', 8)])
def test_colours_of_printing(tmp_path, name, tolerance):
    _blocks(tmp_path, name, Image.fromarray(BLOCKS[None]).convert('CMYK'), tolerance)


def test_colours_of_a_palette(tmp_path):
    image = Image.fromarray(np.arange(4, dtype=np.uint8)[None])
    image.putpalette(BLOCKS.tobytes())
    _blocks(tmp_path, 'P.png', image, 0)
    _blocks(tmp_path, 'one.png', image, 0, [BLOCKS[0], [255] * 3, BLOCKS[2], BLOCKS[3]], transparency=1)
    half = [BLOCKS[0], [127, 127, 255], [255] * 3, BLOCKS[3]]  # over the white ground
    _blocks(tmp_path, 'alpha.png', image, 1, half, transparency=bytes([255, 128, 0, 255]))


def test_colours_of_lab(tmp_path):
    """Lightness and two axes of colour, from green to red and from blue to yellow; grey lies in the middle of both."""
    values = np.array([[138, 209, 198], [76, 196, 16], [249, 112, 222], [97, 128, 128]], np.uint8)
    _blocks(tmp_path, 'LAB.tif', Image.merge('LAB', Image.fromarray(values[None]).split()), 30)  # roughly


@pytest.mark.parametrize('orientation,turns', [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_upright(tmp_path, orientation, turns):
    """6 wants a quarter turn clockwise, 8 the other one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = _pixels((5, 4, 3))
    Image.fromarray(pixels).save(tmp_path / 'photo.png', exif=exif.tobytes())
    assert (np.asarray(load_image(tmp_path / 'photo.png', 3)) == np.rot90(pixels, turns)).all()


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


def test_transparent_grey_values(tmp_path):
    """A PNG may name one value of 8 or of 16 bits that is transparent."""
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535)):
        Image.fromarray(np.array([[white, white // 2]], dtype)).save(tmp_path / 'a.png')
        content = (tmp_path / 'a.png').read_bytes()
        chunk = b'tRNS' + white.to_bytes(2, 'big')  # which not every Pillow writes of 16 bits
        chunk = (2).to_bytes(4, 'big') + chunk + zlib.crc32(chunk).to_bytes(4, 'big')
        first = content.index(b'IDAT') - 4
        (tmp_path / 'a.png').write_bytes(content[:first] + chunk + content[first:])
        assert np.asarray(load_image(tmp_path / 'a.png', 1, background=0)).tolist() == [[0, 127]]


def test_metadata_that_are_damaged(tmp_path):
    pixels = _pixels((5, 4, 3))
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=b'garbage')
    assert (np.asarray(load_image(tmp_path / 'a.png', 3)) == pixels).all()


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
    assert 'Cannot load the weights smpconv_mobile31.in1k' in err and '--checkpoint-path' in err


@pytest.mark.parametrize('command', ['predict', 'validate'])
@pytest.mark.parametrize('name', ['smpconv_huge', 'resnet18', 'smpconv_tiny.in22k', ''])
def test_unknown_model(capsys, digit, command, name):
    arguments = [digit] if command == 'predict' else ['--data-dir', digit.parent]
    status, out, err = run(capsys, command, *arguments, '--model', name)
    assert status == 2 and not out and err.count('\n') == 1
    assert 'Unknown' in err and 'smpconv_tiny' in err


def test_model_of_other_series(capsys, digit):
    status, out, err = run(capsys, 'predict', digit, '--model', 'smpconv_seq_chartraj')
    assert status == 2 and not out and 'does not classify images' in err
    assert 'smpconv_cifar' in err and 'smpconv_seq_speech' in err


@pytest.mark.parametrize('name', ['smpconv_seq_speech.sc', 'smpconv_seq_speech_raw'])
def test_sounds_have_nothing_to_invert(capsys, digit, name):
    status, out, err = run(capsys, 'predict', digit, '--model', name, '--invert')
    assert status == 2 and not out and 'invert' in err and name in err


def test_words(capsys, digit):
    """The samples of the repository, recordings that were not trained on; and a file that is no sound."""
    files = sorted((Path(__file__).resolve().parents[1] / 'examples' / 'words').glob('*.wav'))
    status, out, err = run(capsys, 'predict', *files, digit, '--model', 'smpconv_seq_speech', '--json')
    results = json.loads(out)
    assert status == 1 and 'cannot read' in err and 'is not a readable WAV or FLAC file' in results[-1]['error']
    hits = sum(Path(r['file']).stem == r['predictions'][0]['label'] for r in results[:-1])
    assert len(files) == 10 and hits >= 8


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
    save_file(model.state_dict(), tmp_path / 'deployed.pt')  # its contents say what a file is, not its name
    outputs = [
        json.loads(run(capsys, 'predict', digit, '--json', '--checkpoint-path', path)[1])[0]['predictions']
        for path in (checkpoint, tmp_path / 'deployed.safetensors', tmp_path / 'deployed.pt')
    ]
    for wanted, *others in zip(*outputs):
        for got in others:
            assert got['index'] == wanted['index']
            assert got['probability'] == pytest.approx(wanted['probability'], rel=1e-4)


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
    assert names['smpconv_seq_speech'] == names['smpconv_seq_speech_raw'] and names['smpconv_seq_speech'][9] == 'go'
    assert ''.join(names['smpconv_seq_chartraj']) == 'abcdeghlmnopqrsuvwyz'
    assert class_names(timm.create_model('smpconv_tiny', num_classes=2, device='meta')) == ['0', '1']


# validate and train


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Small data sets, as `timm-smpconv data` makes them."""
    folder = tmp_path_factory.mktemp('data')
    write_trajectories(write_speech(write_mnist(folder, 48, 20), 30, 20))
    for i, name in enumerate(CIFAR10):
        (folder / 'cifar10' / 'test' / name).mkdir(parents=True)
        for j in range(2):
            pixels = np.random.RandomState(10 * i + j).randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'cifar10' / 'test' / name / f'{j}.png')
    return folder


def _save(name, path):
    """Random weights whose predictions differ from sample to sample."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch.nn.init.normal_(model.get_classifier().weight)
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    'name',
    ['smpconv_seq_mnist', 'smpconv_seq_pmnist', 'smpconv_seq_speech', 'smpconv_seq_chartraj', 'smpconv_seq_cifar'],
)
def test_validate(capsys, tmp_path, data, name):
    weights = _save(name, tmp_path / 'weights.safetensors')
    arguments = ['validate', '--model', name, '--data', data, '--checkpoint-path', weights]
    status, out, _ = run(capsys, *arguments, '--json')
    entry = json.loads(out)
    assert status == 0 and entry['total'] == 20 and entry['accuracy'] == pytest.approx(entry['hits'] / 20 * 100)
    low, high = entry['interval']
    assert 0 <= low <= entry['accuracy'] <= high <= 100 and 10 < high - low < 50
    picture = tmp_path / 'confusion.png'
    status, out, _ = run(capsys, *arguments[:3], '--data-dir', data, *arguments[5:], '--confusion', picture)
    assert status == 0 and f'{entry["hits"]} of 20 test samples' in out
    with Image.open(picture) as image:
        assert image.format == 'PNG' and min(image.size) > 500 and len(image.convert('L').getcolors()) > 3


@pytest.mark.parametrize('name', ['smpconv_seq_speech', 'smpconv_seq_speech_raw', 'smpconv_seq_chartraj'])
def test_step_statistics(tmp_path, data, name):
    """Inputs are normalised as by the authors' normalise_data, step by step; validate gives them to the network."""
    task = TASKS[name]
    train, test = (task.load(data, part) for part in (True, False))
    raw_features, features = (task.features(task.signal(part.inputs, None, None), None, None) for part in (train, test))
    steps = zip(features.unbind(-1), raw_features.unbind(-1))
    expected = torch.stack([(x - known.mean()) / (known.std() + 1e-5) for x, known in steps], -1)
    cfg = dict(timm.get_pretrained_cfg(name).to_dict(), mean=(0.0,), std=(1.0,))
    ours = network_input(stepwise(task, train, 7), test.inputs, cfg)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    if name == 'smpconv_seq_speech_raw':  # slow, and the same from here on
        return
    weights = _save(name, tmp_path / 'weights.safetensors')
    with torch.inference_mode():
        logits = load_model(name, weights)(expected)
    best = logits.topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-2 * logits.abs().max()
    result = validate(name, data, weights, progress=False, step_statistics=True)
    assert clear.sum() > 10 and torch.equal(result.predictions[clear], best.indices[clear, 0])
    assert not torch.equal(result.predictions, validate(name, data, weights, progress=False).predictions)


def test_weights_that_do_not_say_their_normalisation(capsys, caplog, tmp_path, data):
    weights = _save('smpconv_seq_chartraj', tmp_path / 'weights.safetensors')
    arguments = ['validate', '--model', 'smpconv_seq_chartraj', '--data', data, '--checkpoint-path', weights]
    assert run(capsys, *arguments)[0] == 0 and 'The authors normalise each time step' in caplog.text
    caplog.clear()
    assert run(capsys, *arguments, '--step-statistics')[0] == 0
    save_tensors(weights, load_file(weights), dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]))
    assert run(capsys, *arguments)[0] == 0
    for checkpoint in (None, bundled_path('smpconv_seq_speech.sc')):
        check_inputs('smpconv_seq_speech', checkpoint)
    assert not caplog.text
    status, _, err = run(capsys, *arguments, '--step-statistics')
    assert status == 2 and 'weights.safetensors says how its inputs were normalised' in err
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_seq_speech', '--data', data, '--step-statistics')
    assert status == 2 and 'leave out step_statistics' in err
    status, _, err = run(capsys, 'validate', '--data', data, '--step-statistics')
    assert status == 2 and 'not for smpconv_seq_mnist' in err
    weights.write_bytes(b'no checkpoint')
    for command in (arguments, ['predict', '--model', 'smpconv_seq_speech', 'a.wav', '--checkpoint-path', weights]):
        status, _, err = run(capsys, *command)
        assert status == 2 and 'Cannot load' in err and err.count('\n') == 1


def test_the_same_recordings_are_left_out_of_any_copy(tmp_path, data):
    """Speakers that the bundled weights were trained on: their file is known by its contents; of others nothing is."""
    name, bundled = 'smpconv_seq_speech', bundled_path('smpconv_seq_speech.sc')
    tensors = load_file(data / 'speech_commands' / 'test.safetensors')
    known = [speaker_number(speaker) for speaker in training_speakers('smpconv_seq_speech.sc')[:5]]
    tensors['speakers'] = torch.tensor([0] * 15 + known)
    (tmp_path / 'speech_commands').mkdir()
    save_file(tensors, tmp_path / 'speech_commands' / 'test.safetensors')
    copy = shutil.copy(bundled, tmp_path / 'copy.pt')
    own = validate(name, tmp_path, progress=False)
    assert own.left_out == 5 and torch.equal(own.labels, tensors['labels'][:15])
    for file in (bundled, copy):
        given = validate(name, tmp_path, file, progress=False)
        assert given.left_out == 5 and torch.equal(given.labels, own.labels)
        assert torch.equal(given.predictions, own.predictions)
    other = validate(name, tmp_path, _save(name, tmp_path / 'other.safetensors'), progress=False)
    assert (other.left_out, other.total) == (0, 20)
    (tmp_path / 'heard' / 'speech_commands').mkdir(parents=True)
    tensors['speakers'] = torch.tensor(known * 4)
    save_file(tensors, tmp_path / 'heard' / 'speech_commands' / 'test.safetensors')
    with pytest.raises(ValueError, match='All 20 test recordings in .* were trained on'):
        validate(name, tmp_path / 'heard', progress=False)
    # what is made of them
    folder = convert(bundled, name, tmp_path / 'folder', deployed=True, install=True).folder
    for file in (folder / 'model.safetensors', folder / 'deployed.safetensors', None):
        assert validate(name, tmp_path, file, progress=False).left_out == 5
    # what has learned from them, directly or by way of others
    shutil.copy(data / 'speech_commands' / 'train.safetensors', tmp_path / 'speech_commands')
    recipe = Recipe(name, epochs=1, batch_size=8, model_kwargs=dict(dim=4, depth=1), val_percent=0)
    taught = train(
        dataclasses.replace(recipe, kd_model_name=f'local-dir:{folder}'), tmp_path, tmp_path / 'taught', progress=False
    )
    for start in (bundled, taught, tmp_path / 'taught' / 'checkpoint.pt'):
        kwargs = {} if start == bundled else recipe.model_kwargs
        run_ = dataclasses.replace(recipe, initial_checkpoint=str(start), model_kwargs=kwargs)
        output = tmp_path / f'from_{Path(start).parent.name}_{Path(start).name}'
        for _ in range(2):  # the second time from its own checkpoint
            path = train(run_, tmp_path, output, progress=False)
        assert ancestors(path) == ancestors(output / 'checkpoint.pt') == ['smpconv_seq_speech.sc']
        if start == bundled:
            assert validate(name, tmp_path, path, progress=False).left_out == 5
        again = convert(path, name, output / 'converted', deployed=True, model_kwargs=kwargs).folder
        assert ancestors(again / 'model.safetensors') == ancestors(again / 'deployed.safetensors') == ancestors(path)
    fresh = train(recipe, tmp_path, tmp_path / 'fresh', progress=False)
    assert ancestors(fresh) == []


def test_networks_of_ones_own(tmp_path, capsys):
    """Fine-tuned to other classes: converted with their names, they predict and are validated from the folder."""
    kwargs = dict(num_classes=3, dims=(4, 4), kernel_size=5)
    model = timm.create_model('smpconv_cifar', **kwargs).eval()
    torch.save(dict(arch='smpconv_cifar', state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    for label in ('cat', 'dog', 'owl'):
        folder = tmp_path / 'photos' / 'val' / label
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f'{i}.png')
    convert_ = ['convert', tmp_path / 'last.pth.tar', '--model', 'smpconv_cifar', '--num-classes', '3']
    convert_ += ['--model-kwargs', '{"dims": [4, 4], "kernel_size": 5}', '--out', tmp_path / 'own']
    for names in (['cat', 'dog'], ['cat', 'dog', 'dog']):
        status, _, err = run(capsys, *convert_, '--label-names', *names)
        assert status == 2 and 'Expected 3 different label_names' in err
    assert run(capsys, *convert_, '--label-names', 'cat', 'dog', 'owl')[0] == 0
    assert 'The classes are, in this order: cat, dog, owl.' in (tmp_path / 'own' / 'README.md').read_text()
    own, photos = f'local-dir:{tmp_path / "own"}', sorted((tmp_path / 'photos').rglob('*.png'))
    status, out, _ = run(capsys, 'predict', '--model', own, *photos, '--json', '--topk', '3')
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    with torch.no_grad():
        wanted = model(torch.stack([transform(load_image(path)) for path in photos])).softmax(1)
    predictions = [entry['predictions'] for entry in json.loads(out)]
    for entry, row in zip(predictions, wanted):
        found = {prediction['label']: prediction['probability'] for prediction in entry}
        assert found == pytest.approx(dict(zip(('cat', 'dog', 'owl'), row.tolist())), abs=1e-4)
    arguments = ['validate', '--model', own, '--data', tmp_path / 'photos', '--confusion', tmp_path / 'a.png', '--json']
    status, out, _ = run(capsys, *arguments)
    result = json.loads(out)
    hits = sum(entry[0]['label'] == path.parent.name for entry, path in zip(predictions, photos))
    assert (result['hits'], result['total']) == (hits, 6) and (tmp_path / 'a.png').exists()
    status, _, err = run(capsys, *arguments, '--checkpoint-path', tmp_path / 'last.pth.tar')
    assert status == 2 and 'brings its own weights' in err
    (tmp_path / 'photos' / 'val' / 'emu').mkdir()
    status, _, err = run(capsys, *arguments)
    assert status == 2 and 'emu is not a class of local-dir' in err
    # without names
    assert run(capsys, *convert_, '--overwrite')[0] == 0
    status, _, err = run(capsys, *arguments)
    assert status == 2 and 'does not name its classes: convert it with label_names' in err
    status, out, _ = run(capsys, 'predict', '--model', own, photos[0], '--json')
    assert json.loads(out)[0]['predictions'][0]['label'] in ('0', '1', '2')
    # of somebody else's
    timm.models.save_for_hf(timm.create_model('resnet18'), tmp_path / 'other', safe_serialization=True)
    for name, message in (('other', 'is a resnet18: expected one of'), ('absent', 'has no config.json')):
        for command in (['predict', photos[0]], ['validate', '--data', tmp_path / 'photos']):
            status, _, err = run(capsys, *command, '--model', f'local-dir:{tmp_path / name}')
            assert status == 2 and message in err and err.count('\n') == 1


def test_digit_networks_of_ones_own(tmp_path, data, capsys):
    """Measured on pictures in one folder for each class, grey as the network is, and not on MNIST."""
    kwargs = dict(num_classes=3, dim=4, depth=1)
    model = timm.create_model('smpconv_seq_mnist', **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    photos = tmp_path / 'photos' / 'test'
    for i, label in enumerate(('ash', 'elm')):
        (photos / label).mkdir(parents=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 30, 3), np.uint8)).save(photos / label / 'a.png')
    out = tmp_path / 'own'
    convert(tmp_path / 'a.pth', 'smpconv_seq_mnist', out, model_kwargs=kwargs, label_names=('ash', 'beech', 'elm'))
    result = validate(f'local-dir:{out}', tmp_path / 'photos', progress=False)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    pictures = [transform(Image.open(photos / label / 'a.png').convert('L')) for label in ('ash', 'elm')]
    with torch.no_grad():
        assert result.predictions.tolist() == model(torch.stack(pictures)).argmax(1).tolist()
    assert result.labels.tolist() == [0, 2] and result.confusion.sum() == 2
    status, _, err = run(capsys, 'validate', '--model', f'local-dir:{out}', '--data', data)
    assert status == 2 and 'No test images' in err and 'ash, beech, elm' in err
    # of sounds there are test data of ten words alone
    kwargs = dict(num_classes=2, dim=4, depth=1)
    torch.save(timm.create_model('smpconv_seq_speech', **kwargs).state_dict(), tmp_path / 'b.pth')
    convert(tmp_path / 'b.pth', 'smpconv_seq_speech', tmp_path / 'two', model_kwargs=kwargs, label_names=('hi', 'ho'))
    status, _, err = run(capsys, 'validate', '--model', f'local-dir:{tmp_path / "two"}', '--data', data)
    assert status == 2 and 'classes of its own (hi, ho), of which there are no test data' in err
    for command in (['predict', 'a.png'], ['validate', '--data', data]):
        status, _, err = run(capsys, *command, '--model', f'local-dir:{"x" * 300}')
        assert status == 2 and 'File name too long' in err and err.count('\n') == 1


def test_speech_networks_of_ones_own(tmp_path, data, capsys):
    name = 'smpconv_seq_speech'
    folder = convert(bundled_path('smpconv_seq_speech.sc'), name, tmp_path / 'folder').folder
    own = validate(name, data, bundled_path('smpconv_seq_speech.sc'), progress=False)
    assert torch.equal(validate(f'local-dir:{folder}', data, progress=False).predictions, own.predictions)
    status, out, _ = run(
        capsys,
        'predict',
        '--model',
        f'local-dir:{folder}',
        *sorted((DIGITS.parent / 'words').glob('*.wav'))[:2],
        '--json',
    )
    assert status == 0 and json.loads(out)[0]['predictions'][0]['label'] in SPEECH_WORDS


def test_validate_counts(tmp_path, data):
    """Hits and confusion of an image folder, image by image."""
    weights = _save('smpconv_cifar', tmp_path / 'weights.safetensors')
    result = validate('smpconv_cifar', data, weights, progress=False)
    model = load_model('smpconv_cifar', weights)
    expected = torch.zeros(10, 10, dtype=torch.long)
    for label, name in enumerate(CIFAR10):
        for prediction in predict_files(model, sorted((data / 'cifar10' / 'test' / name).iterdir()), topk=1):
            expected[label, prediction.predictions[0].index] += 1
    assert torch.equal(result.confusion, expected) and result.total == 20
    assert result.hits == expected.diagonal().sum() and result.names == list(CIFAR10)


def test_validate_on_a_part_of_the_classes(tmp_path, data):
    """Labels are those of the model, not the places of the folders."""
    for name in ('truck', 'cat'):
        shutil.copytree(data / 'cifar10' / 'test' / name, tmp_path / 'test' / name)
    result = validate('smpconv_cifar', tmp_path, _save('smpconv_cifar', tmp_path / 'w.safetensors'), progress=False)
    assert result.labels.tolist() == [3, 3, 9, 9]


def test_validate_imagenet(tmp_path):
    folder = tmp_path / 'val' / 'n01443537'
    folder.mkdir(parents=True)
    Image.fromarray(_pixels((50, 60, 3))).save(folder / 'fish.jpg')
    weights = _save('smpconv_mobile31', tmp_path / 'w.safetensors')
    result = validate('smpconv_mobile31', tmp_path, weights, progress=False)
    assert result.labels.tolist() == [1] and result.names[1] == 'goldfish, Carassius auratus'


def test_validate_says_what_is_missing(capsys, tmp_path, data, checkpoint):
    status, _, err = run(capsys, 'validate', '--data-dir', tmp_path, '--checkpoint-path', checkpoint)
    assert status == 2 and 'No MNIST under' in err and err.count('\n') == 1
    for name, message in (
        ('smpconv_tiny', 'one folder for each class (n01440764'),
        ('smpconv_cifar', 'timm-smpconv data cifar10 DIR'),
        ('smpconv_seq_speech', 'timm-smpconv data speech_commands'),
        ('smpconv_seq_chartraj', 'timm-smpconv data character_trajectories'),
    ):
        status, _, err = run(capsys, 'validate', '--model', name, '--data', tmp_path)
        assert status == 2 and message in err and err.count('\n') == 1
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'unicorn').mkdir()
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_cifar', '--data', tmp_path)
    assert status == 2 and 'unicorn is not a class of smpconv_cifar' in err
    (tmp_path / 'unicorn').rmdir()
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_cifar', '--data', tmp_path)
    assert status == 2 and 'No images in the folders of' in err
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_seq_chartraj', '--data', data)  # there are no weights
    assert status == 2 and '--checkpoint-path' in err
    status, _, err = run(capsys, 'validate', '--model', 'smpconv_tiny', '--data', data, '--confusion', 'x.png')
    assert status == 2 and 'at most 40 classes' in err


def test_data(capsys, tmp_path):
    archives = [write_tar(tmp_path / f'{speaker}.tar', speech_members([speaker])) for speaker in ('0a', '0b')]
    arguments = ['data', 'speech_commands', tmp_path / 'data', '--archive', *archives]
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, '') and out.endswith('speech_commands: 10 train samples, 10 test samples\n')
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, '') and out.endswith('speech_commands: already there\n')
    status, _, err = run(capsys, 'data', 'mnist', tmp_path / 'data', '--archive', tmp_path / 'absent')
    assert status == 2 and 'No archive at' in err and err.count('\n') == 1
    assert run(capsys, 'data', 'imagenet', tmp_path)[0] == 2


def test_train(capsys, tmp_path, data, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    config = tmp_path / 'recipe.yaml'
    config.write_text('epochs: 5\nbatch_size: 4\nlr: 1\n')
    arguments = ['train', '--data-dir', data, '--output', tmp_path / 'run', '--config', config, '--threads', 2]
    arguments += ['--epochs', 1, '--val-images', 44, '--lr', 1e-3, '--no-augment', '--model-kwargs', '{"depth": 6}']
    status, out, err = run(capsys, *arguments)
    assert status == 0 and threads == [2] and Path(out.strip()).is_file() and 'epoch 1/1' in err and 'sample/s' in err
    recipe = read_recipe(tmp_path / 'run' / 'recipe.yaml')
    assert (recipe['epochs'], recipe['batch_size'], recipe['lr'], recipe['augment']) == (1, 4, 1e-3, False)
    assert recipe['model_kwargs'] == {'depth': 6}
    status, _, err = run(capsys, 'validate', '--data', data, '--checkpoint-path', out.strip())
    assert status == 0
    status, _, err = run(capsys, *arguments, '--seed', 3)
    assert status == 2 and 'another recipe' in err
    status, _, err = run(capsys, *arguments[:-1], '[1]')
    assert status == 2 and 'expected a JSON object' in err


def test_train_on_a_device_that_is_not_there(capsys, tmp_path, data):
    arguments = ('train', '--data', data, '--output', tmp_path / 'run', '--batch-size', 4, '--val-images', 5)
    status, out, err = run(capsys, *arguments, '--device', 'nowhere')
    assert status == 2 and not out and err.count('\n') == 1
    assert err.startswith("timm-smpconv: device 'nowhere' cannot be used") and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'recipe,message',
    [
        ('{', 'is not YAML'),
        ('lr: 0.1\nepochs: 2\nlr: 0.2\n', "'lr' is given twice"),
        ('[]', 'must hold the fields'),
        ('{"speed of light": 1}', 'unknown field'),
        ('{"epochs": "8"}', 'of type int'),
        ('epochs: 0', 'epochs must be at least 1, got 0'),
        ('lr: fast', 'of type float'),
        (f'epochs: {10**400}', 'epochs must be at least 1, got'),
        ('epochs: !!int ""', 'is not YAML: string index out of range'),
        ('amp: !!bool "x"', "is not YAML: 'x'"),
        ('model: 2020-13-45', 'is not YAML: month must be in 1..12'),
        ('[' * 3000, 'is not YAML: '),
        ('model: resnet18', 'Unknown model'),
        ('model: smpconv_tiny', "timm's own train.py trains smpconv_tiny: recipes/smpconv_tiny.yaml"),
        ('noise: 0.1', 'has no effect'),
    ],
)
def test_bad_recipe(capsys, tmp_path, recipe, message):
    path = tmp_path / 'recipe.yaml'
    path.write_text(recipe)
    status, _, err = run(capsys, 'train', '--data-dir', tmp_path, '--output', tmp_path / 'run', '--config', path)
    assert status == 2 and message in err and not (tmp_path / 'run').exists()


def test_recipes_of_the_repository_are_valid(capsys, tmp_path):
    for path in [*RECIPES.glob('smpconv_seq_[mps]*.yaml'), *RECIPES.glob('shipped/smpconv_seq_[mps]*.yaml')]:
        status, _, err = run(capsys, 'train', '--data', tmp_path, '--output', tmp_path / 'run', '--config', path)
        assert status == 2 and 'timm-smpconv data' in err


def test_wilson():
    low, high = wilson(9950, 10000)
    assert (low, high) == (pytest.approx(0.9934, abs=5e-5), pytest.approx(0.9962, abs=5e-5))
    assert wilson(5, 5)[1] == 1.0 and wilson(0, 5)[0] == 0.0
    assert wilson(995, 1000, 4.0) == pytest.approx(wilson(248.75, 250))


def test_design_effect():
    """Equal answers within groups of m count once; independent ones, or none that differ, count as they are."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(400).repeat_interleave(8)
    right = torch.rand(400, generator=generator) < 0.7
    assert design_effect(right.repeat_interleave(8), groups) == pytest.approx(8 * 400 / 399)
    assert design_effect(torch.rand(3200, generator=generator) < 0.7, groups) == pytest.approx(1.0, abs=0.15)
    assert design_effect(torch.ones(8, dtype=torch.bool), torch.arange(8)) == 1.0
    assert design_effect(torch.tensor([True, False]), torch.zeros(2)) == 1.0


# the bundled weights


def test_sample_digits(capsys):
    files = sorted(DIGITS.iterdir())
    status, out, err = run(capsys, 'predict', *files, '--json')
    assert status == 0 and not err and len(files) >= 8
    for file, entry in zip(files, json.loads(out)):
        assert entry['predictions'][0]['label'] == file.stem.split('_')[1], entry


def test_convert_command(capsys, tmp_path, checkpoint):
    """A checkpoint of this package becomes a folder and an installed file; a second time needs --overwrite."""
    arguments = ('convert', checkpoint, '--model', 'smpconv_seq_mnist', '--out', tmp_path / 'out')
    status, out, err = run(capsys, *arguments, '--install', '--deployed')
    assert status == 0 and not err and str(tmp_path / 'out') in out and 'smpconv_seq_mnist.smnist: sha256' in out
    assert (tmp_path / 'out' / 'deployed.safetensors').is_file()
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out and 'exists' in err and err.count('\n') == 1
    assert run(capsys, *arguments, '--overwrite')[0] == 0
    assert not (tmp_path / 'out' / 'deployed.safetensors').exists()
    status, out, err = run(capsys, *arguments, '--overwrite', '--num-classes', '3')
    assert status == 2 and 'shape of head.fc.weight: (10, 30), expected (3, 30)' in err
    status, out, err = run(capsys, *arguments[:-2])
    assert status == 2 and 'Nothing to do' in err


def test_options_of_convert(capsys, tmp_path):
    """The weights themselves or their average, a licence, and a network of another size, in weights and card."""
    states = {}
    for i, key in enumerate(('state_dict', 'state_dict_ema')):
        torch.manual_seed(i)
        states[key] = timm.create_model('smpconv_seq_mnist', depth=1, dim=4).state_dict()
    torch.save(states, tmp_path / 'last.pth.tar')
    command = ('convert', tmp_path / 'last.pth.tar', '--model', 'smpconv_seq_mnist')
    size = ('--model-kwargs', '{"depth": 1, "dim": 4}')
    assert run(capsys, *command, *size, '--out', tmp_path / 'average')[0] == 0
    options = ('--no-ema', '--license', 'cc-by-4.0', '--deployed', '--out', tmp_path / 'itself')
    assert run(capsys, *command, *size, *options)[0] == 0
    for folder, key in (('average', 'state_dict_ema'), ('itself', 'state_dict')):
        found = load_file(tmp_path / folder / 'model.safetensors')
        assert found.keys() == states[key].keys() and all(torch.equal(found[k], states[key][k]) for k in found)
        assert json.loads((tmp_path / folder / 'config.json').read_text())['model_args'] == dict(depth=1, dim=4)
    cards = {folder: (tmp_path / folder / 'README.md').read_text() for folder in ('average', 'itself')}
    assert '\nlicense: cc-by-4.0\n' in cards['itself'] and '\nlicense: unknown\n' in cards['average']
    assert 'checkpoint_path=FILE, depth=1, dim=4)' in cards['itself']
    status, _, err = run(capsys, *command, '--out', tmp_path / 'full')
    assert status == 2 and 'does not fit smpconv_seq_mnist' in err


def test_images_are_read_as_predict_does(tmp_path, capsys):
    """Of any format, turned, of 16 bits, in folders of folders: all of them count, for the class of the outermost."""
    photos = sorted((DIGITS.parent / 'photos').iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for i, photo in enumerate(photos):
        image = Image.open(photo)
        folder = tmp_path / 'test' / photo.stem / 'dog'
        folder.mkdir(parents=True)
        files.append(folder / f'a{(".BMP", ".webp", ".png", ".tif", ".gif")[i % 5]}')
        if i % 5 == 2:
            image.rotate(90).save(files[-1], exif=exif.tobytes())
        else:
            image.save(files[-1], lossless=True)
    _, out, _ = run(capsys, 'predict', '--model', 'smpconv_cifar', '--topk', 1, *files)
    hits = sum(line.split(': ')[1].startswith(file.parts[-3]) for line, file in zip(out.splitlines(), files))
    for hidden in ('.hidden', '__MACOSX', 'cat/.ipynb_checkpoints'):
        (tmp_path / 'test' / hidden).mkdir()
        shutil.copy(photos[0], tmp_path / 'test' / hidden)
    for other in ('._a.png', 'Thumbs.db', 'notes.pdf'):
        (tmp_path / 'test' / 'cat' / other).touch()
    shutil.move(tmp_path / 'test' / 'deer' / 'dog', tmp_path / 'elsewhere')
    (tmp_path / 'test' / 'deer' / 'link').symlink_to(tmp_path / 'elsewhere')
    status, out, err = run(capsys, 'validate', '--model', 'smpconv_cifar', '--data', tmp_path, '--json')
    assert status == 0 and (json.loads(out)['hits'], json.loads(out)['total']) == (hits, 10) and hits >= 9


def test_weights_that_are_not_finite(tmp_path, capsys, digit, checkpoint, data):
    state = load_file(checkpoint)
    state['head.fc.weight'].fill_(float('nan'))
    save_file(state, tmp_path / 'nan.safetensors')
    status, out, err = run(capsys, 'predict', digit, '--json', '--checkpoint-path', tmp_path / 'nan.safetensors')
    assert status == 2 and not out and 'not finite' in err and err.count('\n') == 1
    arguments = ('--model', 'smpconv_seq_mnist', '--data', data, '--checkpoint-path', tmp_path / 'nan.safetensors')
    status, out, err = run(capsys, 'validate', *arguments)
    assert status == 2 and not out and 'not finite' in err


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no disk that is always full')
def test_output_that_is_full():
    with open('/dev/full', 'w') as full:
        command = [sys.executable, '-m', 'timm_smpconv', 'list']
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, 'timm-smpconv: [Errno 28] No space left on device\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no disk that is always full')
def test_messages_that_cannot_be_written(digit, tmp_path):
    """Do not cost the results."""
    with open('/dev/full', 'w') as full:
        command = [sys.executable, '-m', 'timm_smpconv', 'predict', str(tmp_path / 'absent.png'), str(digit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 1 and 'digit.png: ' in done.stdout


def test_channels_that_files_do_not_have(capsys, tmp_path, data):
    """Is said once, and of no file."""
    for name, kwargs, file in (
        ('smpconv_cifar', dict(in_chans=4, dims=(4, 4), kernel_size=5), DIGITS / 'digit_1_a.png'),
        ('smpconv_seq_speech', dict(in_chans=1, dim=4, depth=1), WORDS / 'yes.wav'),
    ):
        save_file(timm.create_model(name, **kwargs).state_dict(), tmp_path / 'w.safetensors')
        convert(tmp_path / 'w.safetensors', name, tmp_path / name, model_kwargs=kwargs)
        own = f'local-dir:{tmp_path / name}'
        status, out, err = run(capsys, 'predict', '--model', own, file)
        assert status == 2 and not out and 'the model takes' in err and str(file) not in err
    status, out, err = run(capsys, 'validate', '--model', f'local-dir:{tmp_path / "smpconv_cifar"}', '--data', data)
    assert status == 2 and not out and 'the model takes 4' in err


def test_links_that_lead_back(capsys, tmp_path, data):
    shutil.copytree(data / 'cifar10' / 'test', tmp_path / 'test')
    weights = _save('smpconv_cifar', tmp_path / 'w.safetensors')
    arguments = ('validate', '--model', 'smpconv_cifar', '--data', tmp_path, '--checkpoint-path', weights, '--json')
    once = json.loads(run(capsys, *arguments)[1])
    (tmp_path / 'test' / 'cat' / 'again').symlink_to('.')
    (tmp_path / 'test' / 'dog' / 'other').symlink_to('../cat')  # and from there back again
    (tmp_path / 'test' / 'cat' / 'other').symlink_to('../dog')
    number = len(list((tmp_path / 'test' / 'cat').glob('*.*')))
    assert json.loads(run(capsys, *arguments)[1])['total'] == once['total'] + 2 * number
    (tmp_path / 'test' / 'cat' / 'other').unlink()
    assert json.loads(run(capsys, *arguments)[1])['total'] == once['total'] + number


def test_file_with_a_name_that_is_no_text(capsys, tmp_path):
    weights = Path(os.fsdecode(os.fsencode(tmp_path) + b'/\xff`.pth'))
    torch.save(timm.create_model('smpconv_seq_mnist', dim=4, depth=1).state_dict(), weights)
    # a model of which no warning names the file: pytest-xdist cannot pass it on
    arguments = ('--model', 'smpconv_seq_mnist', '--model-kwargs', '{"dim": 4, "depth": 1}', '--out', tmp_path / 'out')
    assert run(capsys, 'convert', weights, *arguments)[0] == 0
    assert 'Converted from `??.pth`' in (tmp_path / 'out' / 'README.md').read_text()


def test_number_that_is_too_large_for_a_recipe(capsys, tmp_path):
    (tmp_path / 'r.yaml').write_text('model: smpconv_seq_mnist\nlr: 1' + '0' * 400)
    status, _, err = run(
        capsys, 'train', '--config', tmp_path / 'r.yaml', '--data', tmp_path, '--output', tmp_path / 'o'
    )
    assert status == 2 and 'lr must be of type float' in err and err.count('\n') == 1


@pytest.mark.parametrize('threads', ['0', '1025', '99999999999', '1' * 5000])
def test_numbers_of_threads(threads, capsys, tmp_path):
    status, _, err = run(capsys, 'train', '--data', tmp_path, '--output', tmp_path / 'x', '--threads', threads)
    assert status == 2 and '--threads: expected ' in err


def test_no_image_is_counted_as_another(capsys, tmp_path, data):
    shutil.copytree(data / 'cifar10' / 'test', tmp_path / 'test')
    weights = _save('smpconv_cifar', tmp_path / 'w.safetensors')
    (tmp_path / 'test' / 'cat' / 'zzz.jpg').write_text('no image')
    status, out, err = run(
        capsys, 'validate', '--model', 'smpconv_cifar', '--data', tmp_path, '--checkpoint-path', weights
    )
    assert status == 2 and not out and 'zzz.jpg is no readable image' in err and err.count('\n') == 1


def test_a_picture_that_cannot_be_written(capsys, tmp_path, data):
    """The result is there all the same."""
    weights = _save('smpconv_cifar', tmp_path / 'w.safetensors')
    arguments = ('validate', '--model', 'smpconv_cifar', '--data', data, '--checkpoint-path', weights)
    status, out, err = run(capsys, *arguments, '--confusion', tmp_path)
    assert status == 2 and 'of 20 test samples right' in out and str(tmp_path) in err
    assert run(capsys, *arguments, '--confusion', tmp_path / 'x[1]**.png')[0] == 0
    assert (tmp_path / 'x[1]**.png').is_file()
