"""Texts of others, fit for a message."""

import re

__all__ = ['one_line', 'without_password']


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception says, or its type: on one line, without passwords, and nothing that a terminal cannot show."""
    plain = re.sub(r'\x1b\[[0-9;]*m', '', str(error))  # without colours
    text = without_password(' '.join(plain.split())) or type(error).__name__
    text = ''.join(c if c.isprintable() else '?' for c in text)
    return text if len(text) <= limit else text[: limit - 3] + '...'


def without_password(text: str) -> str:
    """A text without the user and password of the addresses in it."""
    return re.sub(r'(?<=//)[^/\s]+@', '', text)
