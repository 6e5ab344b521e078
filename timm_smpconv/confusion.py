"""A picture of which classes are taken for which."""

from pathlib import Path
from typing import Sequence, Tuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ._files import atomic_path

__all__ = ['MAX_CLASSES', 'draw_confusion']

MAX_CLASSES = 40  # more do not fit a picture that can be read

_CELL, _MARGIN, _SIZE = 56, 24, 15
_GROUND, _INK, _RIGHT, _WRONG = (255, 255, 255), (30, 30, 30), (33, 102, 172), (178, 24, 43)


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
            fill = _blend(_RIGHT if i == j else _WRONG, share if i == j else share**0.5)
            draw.rectangle((x, y, x + _CELL, y + _CELL), fill, (205, 205, 205))
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
