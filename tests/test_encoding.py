"""Text is read and written as UTF-8, whatever the locale: a run of hours failed at its end for an arrow in its card."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "timm_dseq").rglob("*.py"), *(ROOT / "train").rglob("*.py")]


def without_encoding(source: str) -> list[int]:
    """Lines that open a file as text, and do not say in which encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [word.value for word in node.keywords if word.arg == "mode"]
        modes += node.args[1:2] if isinstance(node.func, ast.Name) else node.args[:1]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
        module = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("os", "Image")
        if name in ("read_text", "write_text") or (name == "open" and "b" not in str(mode) and not module):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_utf_8(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["Path(x).read_text()", "open(x)", 'open(x, "w")', 'Path(x).open("a")', "p.write_text(y)"]
)
def test_what_has_none_is_seen(line):
    assert without_encoding(line) == [1]
