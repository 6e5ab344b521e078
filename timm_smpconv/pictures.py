"""Pictures: large kernels with their points, and which classes are taken for which."""

from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Tuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ._files import atomic_path
from .kernels import LayerKernel

__all__ = ['MAX_CLASSES', 'draw_confusion', 'draw_kernels', 'paint']

MAX_CLASSES = 40  # more do not fit a picture that can be read

_CELL, _MARGIN, _SIZE = 56, 24, 15
_GROUND, _INK, _LINE, _AXIS = (255, 255, 255), (30, 30, 30), (205, 205, 205), (225, 225, 225)
_BLUE, _RED = (33, 102, 172), (178, 24, 43)
_PANEL, _WIDE, _GAP = 104, 180, 12  # sides of a picture of a kernel, of sequences the longer one, and what is between
_MAX_SEEN_RADII = 64  # more would hide each other


def draw_kernels(layers: Iterable[LayerKernel], title: str, path: Path) -> None:
    """Draws kernels as PNG, a row for each layer: points, some kernels, and the sum of the absolute values of all.

    As in Figures 4 and 5 of the SMPConv paper, but with signs: negative values are blue, positive ones red, each
    picture by its own largest absolute value. Points are dots at their coordinates and, if they are few, diamonds as
    large as they reach (in 2D); those outside of the kernel are not seen. Kernels of sequences are curves from the
    first tap to the last, with their points as dots on the axis.

    Args:
        layers: What to draw.
        title: Line above.
        path: File to write.

    Raises:
        ValueError: There are no layers.
    """
    rows = [(layer, _panels(layer)) for layer in layers]
    if not rows:
        raise ValueError('There is nothing to draw: the network has no large convolutions of this package.')
    font, bold = ImageFont.load_default(_SIZE), ImageFont.load_default(_SIZE + 3)
    labels = [_label(layer) for layer, _ in rows]
    left = 2 * _MARGIN + max(int(font.getlength(line)) for lines in labels for line in lines)
    columns = max(len(panels) for _, panels in rows)
    step = max(panel.width for _, panels in rows for panel in panels) + _GAP
    size = max(left + columns * step - _GAP, _MARGIN + int(bold.getlength(title))) + _MARGIN
    heights = [
        max(*(panel.height for panel in panels), _SIZE * len(lines)) + _GAP for lines, (_, panels) in zip(labels, rows)
    ]
    image = Image.new('RGB', (size, 3 * _MARGIN + sum(heights) + _MARGIN), _GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, _INK, bold, 'lm')
    dotted = rows[0][0].coords is not None and rows[0][0].total.ndim == 2
    captions = {columns - 1: 'sum of all', 0: 'points' if dotted else 'some kernels', int(dotted): 'some kernels'}
    for column, caption in captions.items():
        draw.text((left + column * step, 2 * _MARGIN + 8), caption, _INK, font, 'lm')
    y = 3 * _MARGIN
    for (_, panels), lines, height in zip(rows, labels, heights):
        for i, line in enumerate(lines):
            draw.text((_MARGIN, y + _SIZE * (i + 0.5)), line, _INK, font, 'lm')
        for i, panel in enumerate(panels):
            column = columns - 1 if i == len(panels) - 1 else i
            image.paste(panel, (left + column * step, y))
        y += height
    with atomic_path(path) as part:
        image.save(part, 'PNG')


def _label(layer: LayerKernel) -> List[str]:
    lines = [layer.name, ' x '.join(str(taps) for taps in layer.shape[2:]) + ' taps']
    return lines if layer.num_points is None else [*lines, f'{layer.num_points} points']


def _panels(layer: LayerKernel) -> Tuple[Image.Image, ...]:
    if layer.total.ndim == 1:
        dots = [None] * len(layer.some) if layer.coords is None else list(layer.coords[..., 0])
        return *(_curve(kernel, points) for kernel, points in zip(layer.some, dots)), _curve(layer.total)
    kernels = *(_framed(paint(kernel)) for kernel in layer.some), _framed(paint(layer.total))
    if layer.coords is None:
        return kernels
    return _scatter(layer.coords[0], layer.radii[0], kernels[0].size), *kernels


def paint(values: torch.Tensor, largest: Optional[float] = None) -> Image.Image:
    """A picture of a matrix, (H, W): negative entries blue, positive ones red, zero white.

    Args:
        values: The matrix.
        largest: Absolute value of the full colours; None for the largest one of the matrix.
    """
    limit = float(values.abs().max()) if largest is None else largest
    share = (values / limit if limit else values).clamp(-1, 1).unsqueeze(2)
    ground, red, blue = (torch.tensor(colour, dtype=torch.float32) for colour in (_GROUND, _RED, _BLUE))
    pixels = ground + share.clamp(min=0) * (red - ground) - share.clamp(max=0) * (blue - ground)
    image = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    scale = _PANEL / max(image.size)
    if scale < 1:
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return image.resize([side * int(scale) for side in image.size], Image.Resampling.NEAREST)


def _framed(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, 1, _LINE)


def _scatter(coords: torch.Tensor, radii: torch.Tensor, size: Tuple[int, int]) -> Image.Image:
    """Points of a kernel of maps at their places, coordinate 1 upwards."""
    image = Image.new('RGB', size, _GROUND)
    draw = ImageDraw.Draw(image)
    half = [(side - 1) / 2 for side in size]
    for (right, up), radius in zip(coords.tolist(), radii.tolist()):
        x, y = (1 + right) * half[0], (1 - up) * half[1]
        if len(radii) <= _MAX_SEEN_RADII:
            a, b = radius * half[0], radius * half[1]
            draw.polygon([(x - a, y), (x, y - b), (x + a, y), (x, y + b)], outline=_LINE)
    for right, up in coords.tolist():
        x, y = (1 + right) * half[0], (1 - up) * half[1]
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), _INK)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_LINE)
    return image


def _curve(values: torch.Tensor, points: Optional[torch.Tensor] = None) -> Image.Image:
    """A kernel of sequences: what its values span in each column of pixels."""
    width, height = _WIDE, _PANEL // 2
    image = Image.new('RGB', (width, height), _GROUND)
    draw = ImageDraw.Draw(image)
    limit, middle = float(values.abs().max()) or 1.0, (height - 1) / 2
    columns = ((torch.arange(len(values)) + 0.5) / len(values) * width).long()
    zeros = torch.zeros(width, dtype=values.dtype)
    highest = zeros.scatter_reduce(0, columns, values, 'amax') / limit
    lowest = zeros.scatter_reduce(0, columns, values, 'amin') / limit
    draw.line((0, middle, width, middle), _AXIS)
    for x in range(width):
        if highest[x] > 0:
            draw.line((x, middle, x, middle - float(highest[x]) * (middle - 2)), _RED)
        if lowest[x] < 0:
            draw.line((x, middle, x, middle - float(lowest[x]) * (middle - 2)), _BLUE)
    for point in [] if points is None else points.tolist():
        x = (1 + point) / 2 * (width - 1)
        draw.ellipse((x - 1, middle - 1, x + 1, middle + 1), _INK)
    draw.rectangle((0, 0, width - 1, height - 1), outline=_LINE)
    return image


def draw_confusion(confusion: torch.Tensor, names: Sequence[str], title: str, path: Path) -> None:
    """Draws a confusion matrix as PNG, with labels, counts, and a shade for the share of the true class.

    Args:
        confusion: Samples of each true class (row) taken for each class (column).
        names: Names of the classes.
        title: Line above the matrix.
        path: File to write.

    Raises:
        ValueError: Too many classes.
    """
    count = len(names)
    if count > MAX_CLASSES:
        raise ValueError(f'A confusion matrix of {count} classes cannot be read: at most {MAX_CLASSES} are drawn.')
    font, bold = ImageFont.load_default(_SIZE), ImageFont.load_default(_SIZE + 3)
    widest = max(int(font.getlength(name)) for name in names)
    left, top = 2 * _MARGIN + 20 + widest, 3 * _MARGIN + 20 + widest
    size = left + count * _CELL + _MARGIN, top + count * _CELL + _MARGIN
    size = max(size[0], int(bold.getlength(title)) + 2 * _MARGIN), size[1]
    image = Image.new('RGB', size, _GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, _INK, bold, 'lm')
    middle = count * _CELL // 2
    draw.text((left + middle, 2 * _MARGIN + 8), 'predicted', _INK, font, 'mm')
    _upright(image, (_MARGIN, top + middle), 'true', font)
    for i, name in enumerate(names):
        draw.text((left - 10, top + i * _CELL + _CELL // 2), name, _INK, font, 'rm')
        position = left + i * _CELL + _CELL // 2, top - 10 - int(font.getlength(name)) // 2
        _upright(image, position, name, font)
    rows = confusion.sum(1).clamp(min=1)
    for i in range(count):
        for j in range(count):
            number = int(confusion[i, j])
            share = number / int(rows[i])
            x, y = left + j * _CELL, top + i * _CELL
            # errors are few: the root makes them visible
            fill = _blend(_BLUE if i == j else _RED, share if i == j else share**0.5)
            draw.rectangle((x, y, x + _CELL, y + _CELL), fill, _LINE)
            if number:
                ink = _GROUND if sum(fill) < 400 else _INK
                draw.text((x + _CELL // 2, y + _CELL // 2), str(number), ink, font, 'mm')
    with atomic_path(path) as part:
        image.save(part, 'PNG')


def _blend(colour: Tuple[int, ...], share: float) -> Tuple[int, ...]:
    return tuple(round(ground + share * (value - ground)) for ground, value in zip(_GROUND, colour))


def _upright(image: Image.Image, centre: Tuple[int, int], text: str, font: ImageFont.FreeTypeFont) -> None:
    """Text that reads from bottom to top."""
    width, height = int(font.getlength(text)) + 4, _SIZE + 8
    label = Image.new('RGB', (width, height), _GROUND)
    ImageDraw.Draw(label).text((width // 2, height // 2), text, _INK, font, 'mm')
    label = label.rotate(90, expand=True)
    image.paste(label, (centre[0] - label.width // 2, centre[1] - label.height // 2))
