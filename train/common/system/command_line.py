"""Settings from a command line and YAML files; a mistake is one line that says what was probably meant.

The library's own messages are long: `Parser` picks out of them which setting is wrong. tests/train/system checks every
form of them, so a version that words them in another way is noticed.
"""

import difflib
import math
import re
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from . import numbers
from .last_line import complain

Settings = TypeVar("Settings")
# What the values of a free mapping may be. With Any the library would import and call what a `class_path` in it names.
Plain = bool | int | float | str | list[bool | int | float | str] | None

_LONGEST = 2**20  # bytes of a file of settings
_CONFIGS = Path(__file__).parents[2] / "configs"

_UNKNOWN = re.compile(
    "unrecognized arguments: --([\\w.-]+)|Group '(.+?)' does not accept option '(.+?)'|Option '(.+?)' is not accepted"
)
_WRONG_VALUE = re.compile(r'Parser key "(.+?)": (.*)')
_GIVEN = re.compile(r"(?:Got|Given) value: (.+?)(?: Given value type: .*)?$|: (\S+) does not conform|'([^']*)'$")
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    **numbers.WORDS,
}


class _PlainLoader(yaml.SafeLoader):
    """YAML as settings need it: each key once, and no aliases, which can refer to themselves or grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="write out what *aliases* stand for", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Parser(ArgumentParser):
    """The parser of a dataclass of settings, whose sections are dataclasses, too."""

    def settings(self, kind: type[Settings], arguments: Sequence[str]) -> tuple[Settings, str]:
        """The settings of a command line, and the same as YAML."""
        namespace = self.parse_args(self._with_files(map(_underscored, arguments)))
        for section in self._sections():
            if not isinstance(namespace[section], Namespace):
                self.error(f'Parser key "{section}": no section')
        for name, hint in self._kinds().items():
            if namespace[name] is None and type(None) not in get_args(hint):  # in a file: NAME, colon, and nothing
                self.error(f'Parser key "{name}": it takes a value. Got value: null')
        text = self.dump(namespace)
        namespace.pop("config", None)
        for name, value in flat(namespace.as_dict()).items():
            self._check_plain(name, value)
        return kind(**vars(self.instantiate(namespace))), text

    def _check_plain(self, name: str, value: Any) -> None:
        """Refuse text that is empty, as an unset variable of the shell leaves it, control letters, NaN and infinity."""
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and not each.strip():
                self.error(f"{name} is empty: leave it out, or give it a value")
            if isinstance(each, str) and not each.isprintable():
                self.error(f"{name}={each!r} holds letters that cannot be printed: write it anew")
            if isinstance(each, float) and not math.isfinite(each):
                self.error(f"{name}={each} is no finite number: give one")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line."""
        line = " ".join(message.split())
        if bare := re.match(r"unrecognized arguments: (?!-)(\S+)", line):
            line = f"{bare[1]} belongs to no setting: is it the data set, --data {bare[1]}?"
        elif unknown := _UNKNOWN.search(line):
            name = ".".join(filter(None, unknown.groups())).replace("-", "_")
            line = f"there is no setting {name}{self._meant(name)}"
        elif wrong := _WRONG_VALUE.match(line):
            line = self._wrong_value(*wrong.groups())
        complain(f"{self.prog}: {line}")
        sys.exit(2)

    def _with_files(self, arguments: Iterable[str]) -> list[str]:
        """The command line without files of settings that are empty, which mean the defaults; others are checked."""
        words, kept = iter(arguments), []
        for word in words:
            option, equals, path = word.partition("=")
            if option != "--config":
                kept.append(word)
                continue
            path = _own(path if equals else next(words, ""))
            if self._holds_settings(path):
                kept.append(f"--config={path}")
        return kept

    def _holds_settings(self, path: str) -> bool:
        """Whether a file holds any; the program ends if it is no file of settings."""
        try:
            file = Path(path)
            if file.exists() and (not file.is_file() or file.stat().st_size > _LONGEST):
                self.error(f"--config {path} is no file of settings: name a short YAML file")
            settings = yaml.load(file.read_text(encoding="utf-8"), _PlainLoader)  # a kind of SafeLoader
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"--config {path} cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'})")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            self.error(f"--config {path}{where}: this is no YAML ({getattr(error, 'problem', None) or error})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
            self.error(f"--config {path} holds what cannot be read as settings ({error})")
        if settings is not None and not isinstance(settings, dict):
            self.error(f"--config {path} holds no settings: write them as section, colon, and NAME: VALUE below it")
        if settings and "config" in settings:
            self.error(f"--config {path} names a file of settings itself (config): give each by a --config of its own")
        return bool(settings)

    def _kinds(self) -> dict[str, Any]:
        """The type of each setting."""
        return {action.dest: kind for action in self._actions if (kind := getattr(action, "_typehint", None))}

    def _sections(self) -> dict[str, str]:
        """The sections, and a setting of each."""
        names = [action.dest for action in self._actions]
        return {name.rpartition(".")[0]: name for name in reversed(names) if "." in name}

    def _meant(self, name: str) -> str:
        """A hint for a name that is no setting's: the nearest one, or the nearest that ends alike."""
        known = [action.dest for action in self._actions]
        ends = {dest.rpartition(".")[2]: dest for dest in known}
        near = difflib.get_close_matches(name, known, 1) or [
            ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, 1)
        ]
        return f"; did you mean {near[0]}?" if near else "; see --help"

    def _wrong_value(self, name: str, reason: str) -> str:
        """What a setting takes, and what it was given."""
        if example := self._sections().get(name):
            return f"{name} is a section of settings: give those below it, as {example}"
        kind = self._kinds().get(name)
        if kind is None:
            return f"{name}: {reason}"
        given = _GIVEN.search(reason)
        return f"{name} takes {takes(kind)}" + (f", not {next(filter(None, given.groups()), '')}" if given else "")


def _underscored(word: str) -> str:
    """--max-steps=3 → --max_steps=3."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _own(path: str) -> str:
    """The path of a file of settings; `presets/recommended` and the like are this project's own."""
    own = _CONFIGS / f"{path}.yaml"
    return str(own) if own.is_file() and not Path(path).exists() else path


def flagged(arguments: Sequence[str]) -> list[str]:
    """`--dry-run` alone stands for `--dry_run=true`."""
    words = [re.sub(r"^--dry-run(?=$|=)", "--dry_run", word) for word in arguments]
    following = [*words, ""][1:]
    return [
        "--dry_run=true" if word == "--dry_run" and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


def shortened(arguments: Sequence[str], **more: str) -> list[str]:
    """`--data NAME` on a command line is short for `--data.path NAME`. more: what other short names mean."""
    long = {"--data": "--data.path", **{f"--{short}": f"--{name}" for short, name in more.items()}}
    return ["".join((long.get(option, option), *rest)) for option, *rest in (word.partition("=") for word in arguments)]


def takes(kind: Any) -> str:
    """A type as words for a person."""
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
