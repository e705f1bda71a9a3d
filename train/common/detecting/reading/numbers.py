"""What counts as a box and as an area: numbers that are some, and not beyond all images."""

from typing import Any

FAR = 1e9


def is_box(value: Any) -> bool:
    """Whether it is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def is_area(value: Any) -> bool:
    """Whether it is a number, 0 or more, or None, which stands for the box's own area."""
    return value is None or (_is_number(value) and value >= 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -FAR <= value <= FAR
