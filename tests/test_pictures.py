"""Kernels of networks: how far they reach, and what pictures of them show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import build
from PIL import Image
from safetensors.torch import save_file

from timm_smpconv.cli import main
from timm_smpconv.kernels import LayerKernel, find_kernels
from timm_smpconv.layers import PeripheralConv2d, SMPConv1d, SMPConv2d
from timm_smpconv.pictures import draw_confusion, draw_kernels, paint
from timm_smpconv.weights import WEIGHTS

DOCS = Path(__file__).resolve().parents[1] / 'docs' / 'kernels.md'

LINE = (205, 205, 205)


def layer_kernel(total, causal=False):
    return LayerKernel('layer', (1, 1, *total.shape), total.unsqueeze(0), total, causal=causal)


@pytest.mark.parametrize(
    'shape, causal', [((9, 5), False), ((7, 7), False), ((11,), False), ((8,), True), ((1,), True)]
)
@pytest.mark.parametrize('share', [0.0, 0.3, 0.5, 0.9, 1.0])
def test_reach(shape, causal, share):
    """The smallest window that holds the share, found by trying all."""
    for seed in range(5):
        total = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double() ** 4
        windows = range(1, max(shape) + 1) if causal else range(1, max(shape) + 1, 2)
        for window in windows:
            if causal:
                part = total[max(len(total) - window, 0) :]
            else:
                parts = [slice(max(k // 2 - window // 2, 0), k // 2 + window // 2 + 1) for k in shape]
                part = total[tuple(parts)]
            if part.sum() >= share * total.sum() - 1e-12:
                break
        assert layer_kernel(total, causal).reach(share) == window
    assert layer_kernel(torch.zeros(shape), causal).reach(share) == 0


def test_find_kernels(name):
    """Of every model: all large layers, in order, with what they render; of a deployed one the plain ones."""
    model = build(name).eval()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (SMPConv1d, SMPConv2d, PeripheralConv2d))]
    found = list(find_kernels(model, 3))
    assert [kernel.name for kernel in found] == [n for n, _ in layers]
    for kernel, (_, layer) in zip(found, layers):
        with torch.no_grad():
            dense = layer.kernel()
        assert kernel.shape == dense.shape and kernel.causal == isinstance(layer, SMPConv1d)
        torch.testing.assert_close(kernel.total, dense.abs().sum((0, 1)))
        some = dense[:3, 0] if dense.shape[1] == 1 else dense[0, :3]
        assert torch.equal(kernel.some, some)
        if isinstance(layer, PeripheralConv2d):
            assert kernel.num_points is None
        else:
            assert kernel.coords.shape == (len(some), kernel.num_points, layer.kernel.ndim)
            assert (
                torch.equal(kernel.coords[0], layer.kernel.coords[0]) and kernel.radii.shape == kernel.coords.shape[:2]
            )
    model.reparameterize()
    deployed = list(find_kernels(model, 3))
    assert [kernel.shape for kernel in deployed] == [kernel.shape for kernel in found]
    assert all(kernel.num_points is None for kernel in deployed)
    assert [kernel.causal for kernel in deployed] == [kernel.causal for kernel in found]


@pytest.mark.parametrize('groups', [1, 4])
def test_idle_filters(groups):
    """Are counted, and others are looked at."""
    conv = SMPConv1d(4, 4, 21, groups=groups)
    with torch.no_grad():
        conv.kernel.weights[:2] = 1e-6
        kernel = conv.kernel()
        (found,) = find_kernels(conv, 2)
        assert found.num_idle == 2
        assert torch.equal(found.some, kernel[2:, 0] if groups == 4 else kernel[2, :2])
        assert torch.equal(found.coords, conv.kernel.coords[2:] if groups == 4 else conv.kernel.coords[[2, 2]])
        conv.kernel.weights.zero_()
        (found,) = find_kernels(conv, 2)
    assert found.num_idle == 4 and found.some.shape == (2, 21) and found.reach(0.5) == 0


def test_draw_every_model(name, tmp_path):
    draw_kernels(find_kernels(build(name).eval(), 2), f'all of {name}', tmp_path / 'kernels.png')
    with Image.open(tmp_path / 'kernels.png') as image:
        assert image.format == 'PNG' and min(image.size) > 100 and len(image.convert('L').getcolors()) > 20


def panels(path, rows):
    """The pictures in a picture, without their frames, row by row."""
    pixels = np.asarray(Image.open(path).convert('RGB')).astype(int)
    frame = (pixels == LINE).all(-1)
    # sides of frames are lines of many pixels without a gap
    top = [y for y in range(1, len(frame)) if _longest(frame[y]) > 40 and _longest(frame[y - 1]) <= 40]
    result = []
    for y in top[::2][:rows]:
        starts = np.flatnonzero(frame[y] & ~np.roll(frame[y], 1))
        ends = np.flatnonzero(frame[y] & ~np.roll(frame[y], -1))
        row = []
        for a, b in zip(starts, ends):
            if b - a > 40:
                height = int(np.flatnonzero(~frame[y:, a])[0])
                row.append(pixels[y + 1 : y + height - 1, a + 1 : b])
        result.append(row)
    return result


def _longest(line):
    best = run = 0
    for value in line:
        run = run + 1 if value else 0
        best = max(best, run)
    return best


@pytest.mark.parametrize('right, up', [(0.5, -0.25), (-0.75, 0.5), (0.0, 0.875)])
def test_point_and_kernel_lie_at_the_same_place(tmp_path, right, up):
    """Coordinate 0 to the right, coordinate 1 upwards, as the kernel is rendered; a positive weight is red."""
    conv = SMPConv2d(2, 2, 33, groups=2, num_points=1, radius=0.2)
    with torch.no_grad():
        conv.kernel.coords.copy_(torch.tensor([right, up]))
        conv.kernel.weights.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1))
    draw_kernels(find_kernels(conv), 'a point', tmp_path / 'a.png')
    ((points, positive, negative, total),) = panels(tmp_path / 'a.png', 1)
    size = np.array(points.shape[:2])
    wanted = np.array([(1 - up) / 2, (1 + right) / 2])
    dark = np.argwhere(points.sum(-1) < 150).mean(0) / (size - 1)
    assert np.abs(dark - wanted).max() < 0.03
    for picture, strong, weak in ((positive, 0, 2), (negative, 2, 0), (total, 0, 2)):
        coloured = np.argwhere(picture[..., weak] < 60)  # the tap of the largest value
        assert np.abs(coloured.mean(0) / (np.array(picture.shape[:2]) - 1) - wanted).max() < 0.03
        assert (picture[tuple(coloured[0])][strong] > picture[tuple(coloured[0])][weak]).all()


def test_kernels_of_sequences(tmp_path):
    """Curves from the first tap on the left to the present on the right, points on the axis."""
    conv = SMPConv1d(1, 1, 101, num_points=2, radius=0.05)
    with torch.no_grad():
        conv.kernel.coords.copy_(torch.tensor([-0.5, 0.8]).reshape(1, 2, 1))
        conv.kernel.weights.copy_(torch.tensor([1.0, -1.0]))
    draw_kernels(find_kernels(conv), 'two points', tmp_path / 'a.png')
    ((curve, total),) = panels(tmp_path / 'a.png', 1)
    height, width = curve.shape[:2]
    red = np.argwhere((curve[..., 0] > 150) & (curve[..., 2] < 60))
    blue = np.argwhere((curve[..., 2] > 150) & (curve[..., 0] < 60))
    assert red[:, 0].mean() < height / 2 - 5 and blue[:, 0].mean() > height / 2 + 5  # positive values upwards
    for pixels, place in ((red, 0.25), (blue, 0.9)):
        assert abs(pixels[:, 1].mean() / (width - 1) - place) < 0.02
    assert not ((total[..., 2] > 150) & (total[..., 0] < 60)).any()  # of absolute values


def test_paint():
    picture = np.asarray(paint(torch.tensor([[-1.0, 0.0], [0.5, 2.0]]))).astype(int)
    size = len(picture)
    corners = picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]
    assert picture.shape == (size, size, 3) and size > 50
    assert tuple(corners[1]) == (255, 255, 255) and tuple(corners[3]) == (178, 24, 43)
    assert corners[0][2] > corners[0][0] and corners[2][0] > corners[2][2]
    half = np.asarray(paint(torch.tensor([[1.0]]), 2.0))[0, 0]  # a scale of its own
    assert np.abs(half.astype(int) - (np.array([255, 255, 255]) + [178, 24, 43]) / 2).max() <= 1
    assert (np.asarray(paint(torch.zeros(3, 3))) == 255).all()
    assert max(paint(torch.randn(401, 301)).size) <= 110


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match='no large convolutions'):
        draw_kernels(find_kernels(torch.nn.Conv2d(3, 3, 7)), 'none', tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())


def test_confusion_picture(tmp_path):
    """Rows are true classes and columns predicted ones, right is blue and wrong is red, by the share of the row."""
    confusion = torch.tensor([[8, 0, 0], [3, 1, 0], [0, 0, 2]])
    draw_confusion(confusion, ['a', 'b', 'c'], 'three classes', tmp_path / 'picture.png')
    pixels = np.asarray(Image.open(tmp_path / 'picture.png')).astype(int)
    grid = (pixels == (205, 205, 205)).all(-1)
    rows, columns = ((grid.sum(axis) > 100).nonzero()[0] for axis in (1, 0))  # of its lines
    assert len(rows) == len(columns) == 4
    colours = {}
    for i in range(3):
        for j in range(3):
            cell = pixels[rows[i] + 1 : rows[i + 1], columns[j] + 1 : columns[j + 1]]
            colours[i, j] = red, green, blue = tuple(cell[2, 2])
            number = int(confusion[i, j])
            assert ((cell != cell[2, 2]).any(-1).sum() > 5) == (number > 0)  # written into it
            wanted = (blue > red and blue > green) if i == j else (red > blue and red > green)
            assert wanted if number else (red, green, blue) == (255, 255, 255)
    assert colours[0, 0] == colours[2, 2] != colours[1, 1] and sum(colours[0, 0]) < sum(colours[1, 1])


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return status, out, err


@pytest.mark.parametrize('deployed', [False, True])
def test_command(capsys, tmp_path, deployed):
    """The table, the same as JSON, and a picture with as many kernels as were asked for."""
    arguments = ['kernels', '--model', 'smpconv_seq_mnist', *(['--deployed'] if deployed else [])]
    status, out, _ = run(capsys, *arguments, '--json', '--picture', tmp_path / 'a.png', '--count', 2)
    entries = json.loads(out)
    model = timm.create_model('smpconv_seq_mnist', pretrained=True, inference_mode=deployed)
    expected = list(find_kernels(model))
    assert status == 0 and len(entries) == len(expected) == 12
    for entry, kernel in zip(entries, expected):
        assert entry['layer'] == kernel.name and entry['shape'] == list(kernel.shape) and entry['causal']
        assert entry['points'] == (None if deployed else 30) and entry['idle_filters'] == kernel.num_idle
        reach = entry['taps_that_hold_percent']
        assert reach == {str(share): kernel.reach(share / 100) for share in (50, 90, 99)}
        assert 0 < reach['50'] < reach['90'] < reach['99'] <= 784
    rows = panels(tmp_path / 'a.png', 12)
    assert [len(row) for row in rows] == [2 + 1] * 12  # the first layer has one channel: of two filters
    status, out, _ = run(capsys, *arguments)
    lines = out.splitlines()
    assert status == 0 and lines[0].split()[:3] == ['layer', 'taps', 'filters']
    for line, entry in zip(lines[1:], entries):
        assert line.split()[0] == entry['layer'] and line.split()[-1] == str(entry['taps_that_hold_percent']['99'])


def test_documentation(tmp_path, monkeypatch, capsys):
    """The block of docs/kernels.md runs; the numbers of its table are those of the weights."""
    text = DOCS.read_text()
    (block,) = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 12 and (tmp_path / 'kernels.png').stat().st_size > 10_000
    rows = re.findall(r'^\| (smpconv_\w+) \| ([\w.]+) \| ([\d x]+) \| (.*) \|$', text, re.MULTILINE)
    assert {row[0] for row in rows} == {name.split('.')[0] for name, entry in WEIGHTS.items() if entry.bundled}
    for model, name, taps, numbers in rows:
        if model == 'smpconv_seq_speech_raw':  # takes seconds
            continue
        found = find_kernels(timm.create_model(model, pretrained=True))
        layer = next(layer for layer in found if layer.name == name)
        assert taps == ' x '.join(str(k) for k in layer.shape[2:])
        said = [f'{layer.num_idle} of {layer.shape[0]}', *(str(layer.reach(share)) for share in (0.5, 0.9, 0.99))]
        assert numbers == ' | '.join(said), (model, name)
    assert all((DOCS.parent / path).is_file() for path in re.findall(r'!\[.*?\]\((.*?)\)', text))


def test_command_on_a_checkpoint(capsys, tmp_path):
    """Weights of a file; those of another form, or a picture that cannot be written, are said in one line."""
    model = timm.create_model('smpconv_mobile31').eval()
    save_file(model.state_dict(), tmp_path / 'a.safetensors')
    model.reparameterize()
    save_file(model.state_dict(), tmp_path / 'deployed.safetensors')
    arguments = ['kernels', '--model', 'smpconv_mobile31', '--checkpoint-path']
    status, out, _ = run(capsys, *arguments, tmp_path / 'a.safetensors')
    assert status == 0 and ' 31 x 31 ' in out and len(out.splitlines()) == 8 + 3
    assert run(capsys, *arguments, tmp_path / 'deployed.safetensors', '--deployed', '--json')[0] == 0
    status, out, err = run(capsys, *arguments, tmp_path / 'deployed.safetensors')
    assert status == 2 and not out and 'Cannot load' in err and len(err.splitlines()) == 1
    status, _, err = run(capsys, *arguments, tmp_path / 'a.safetensors', '--picture', tmp_path)
    assert status == 2 and len(err.splitlines()) == 1
    status, out, err = run(capsys, 'kernels', '--model', 'smpconv_mobile31')
    assert status == 2 and not out and '--checkpoint-path' in err
