"""The parser of every script's settings: one line for a mistake, with what was probably meant."""

import difflib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    PositiveInt: "a whole number above 0",
    NonNegativeInt: "a whole number, 0 or more",
    PositiveFloat: "a number above 0",
    ClosedUnitInterval: "a number from 0 to 1",
}


class Parser(ArgumentParser):
    """Settings of typed dataclasses."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        value = re.match(r'Parser key "(.+?)": (.*)', line)
        if name := _unknown(line):
            line = f"there is no setting {name}{self._meant(name)}"
        elif value:
            line = self._misfit(*value.groups())
        print(f"{self.prog}: {line}", file=sys.stderr)
        sys.exit(2)

    def _meant(self, name: str) -> str:
        known = [action.dest for action in self._actions]
        ends = {dest.rpartition(".")[2]: dest for dest in known}
        near = difflib.get_close_matches(name, known, 1) or [
            ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, 1)
        ]
        return f"; did you mean {near[0]}?" if near else "; see --help"

    def _misfit(self, name: str, reason: str) -> str:
        kind = next((getattr(action, "_typehint", None) for action in self._actions if action.dest == name), None)
        if kind is None:
            return f"{name}: {reason}"
        given = re.search(r"(?:Got|Given) value: (.+)$|: (\S+) does not conform|'([^']*)'$", reason)
        return f"{name} takes {takes(kind)}" + (f", not {next(filter(None, given.groups()), '')}" if given else "")


def flagged(arguments: Sequence[str]) -> list[str]:
    """`--dry-run` alone stands for `--dry_run=true`."""
    words = [re.sub(r"^--dry-run(?=$|=)", "--dry_run", word) for word in arguments]
    following = [*words, ""][1:]
    return [
        "--dry_run=true" if word == "--dry_run" and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


def _unknown(line: str) -> str | None:
    """The setting that there is not, if that is the mistake."""
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", line):
        return found[1].replace("-", "_")
    if found := re.search(r"Group '(.+?)' does not accept option '(.+?)'", line):
        return f"{found[1]}.{found[2]}"
    found = re.search(r"Option '(.+?)' is not accepted", line)
    return found[1] if found else None


def takes(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(takes, inner))
    if origin is list:
        return f"a list, [a, b, …], each {takes(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {takes(inner[0])}"
    if origin is dict:
        return 'a mapping, {"name": value}'
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    items = {}
    for name, value in tree.items():
        items |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return items
