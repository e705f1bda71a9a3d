"""Every setting of the three programs × nonsense, as an option and in a file: a line that names it, or a sane value.

What is refused is refused as it is read, or by the checks that a program makes before its work.
"""

import functools
import json
import math
import re
import types
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml
from common.pretraining import settings as pretraining
from common.probing import settings as probing
from common.system import numbers
from common.tuning import settings as tuning

from timm_dseq import UserError

PROGRAMS = {"pretrain": pretraining, "probe": probing, "finetune": tuning}
NEEDED = {"pretrain": {}, "probe": {"model": "x", "data.path": "y"}, "finetune": {"model": "x", "data.path": "y"}}
KINDS = {program: module.parser()._kinds() for program, module in PROGRAMS.items()}
SETTINGS = [(program, name) for program, kinds in KINDS.items() for name in kinds]
every_setting = pytest.mark.parametrize(("program", "name"), SETTINGS, ids=[f"{p}-{name}" for p, name in SETTINGS])

LONG = "x" * 300
# As words of a command line …
FAR = "99999999999999999999999"
NUMBERS = ["nan", "inf", "-inf", "-1", "1e300", FAR, "abc", "[1]", "{a: 1}", "null", "true"]
LISTS = [
    "null",
    "",
    "[nan, inf]",
    "[[1]]",
    "[-1, 2]",
    "[1e300, 0]",
    "{a: 1}",
    "abc",
    "[null]",
    "[",
    "[1",
    "[true]",
    FAR,
]
WORDS = {
    "number": [*NUMBERS, "", " ", "\x07", "[", "0x", "1,5", "!!python/name:os.system"],
    "text": ["", " ", "\t", "\x07", "a\nb", "\u2028", LONG, "nan", "{a: 1}"],
    "choice": ["null", "", "AUTO", "auto ", "1", "[auto]", "{a: 1}", LONG],
    "truth": ["null", "", "yes please", "2", "-1", "[true]", "{a: 1}", "nan"],
    "list": [*LISTS, "[1, 1, 1]"],
    "mapping": ["null", "", "[1]", "abc", "7", "{", "{a: {b: 1}}", '{"a": 1e400}', '{"a": [1e400]}', "{a: [[1]]}"],
}
# … and as values of a YAML file.
VALUES = [None, "", " ", "a\nb", math.nan, math.inf, -1, 1e300, 10**23, "abc", [], [1], [math.nan, 1], {"a": 1}, True]


def family(kind):
    """Which nonsense a setting of this type is given."""
    if kind is str or (str in get_args(kind) and get_origin(kind) is not dict):
        return "text"
    if get_origin(kind) is Literal or Literal in map(get_origin, get_args(kind)):
        return "choice"
    names = {bool: "truth", list: "list", tuple: "list", dict: "mapping"}
    return names.get(get_origin(kind) or kind, "number")


def sane(kind, value):
    """Whether a value is of its setting's type, finite and within reason."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(sane(each, value) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        fits = isinstance(value, origin) and (origin is list or len(value) == len(inner))
        return fits and all(sane(inner[0], each) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and sane(inner[1], v) for k, v in value.items())
    if kind is str:
        return isinstance(value, str) and bool(value.strip()) and value.isprintable()
    if kind in (bool, type(None)):
        return isinstance(value, kind)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and (kind in (int, float) or 0 <= value < 2**63)


@pytest.fixture(autouse=True)
def one_parser(monkeypatch):
    """Making one takes longer than using it."""
    for module in PROGRAMS.values():
        monkeypatch.setattr(module, "parser", functools.cache(module.parser))


def read(program, arguments):
    found = PROGRAMS[program].parse(arguments)
    return found if program == "probe" else found[0]


def words(program, without=()):
    return [f"--{name}={value}" for name, value in NEEDED[program].items() if name not in without]


def part(config, name):
    return functools.reduce(getattr, name.split("."), config)


def wrong(program, name, arguments, capsys):
    """What is wrong with the answer to a setting's nonsense; None if nothing is."""
    try:
        found = part(read(program, arguments), name)
    except SystemExit as end:
        said = capsys.readouterr().err
        named = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", said)
        return None if end.code == 2 and named and said.count("\n") == 1 else said
    except UserError as error:
        return None if name in str(error) and "\n" not in str(error) else repr(error)
    except Exception as error:
        return repr(error)
    return None if sane(KINDS[program][name], found) else f"taken as {found!r}"


@every_setting
def test_nonsense_as_an_option_is_refused_by_name_or_sane(program, name, capsys):
    given = WORDS[family(KINDS[program][name])]
    faults = {value: wrong(program, name, [*words(program), f"--{name}={value}"], capsys) for value in given}
    assert {value: fault for value, fault in faults.items() if fault} == {}


def file_of(folder, settings):
    tree = {}
    for name, value in settings.items():
        *above, last = name.split(".")
        functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)[last] = value
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return f"--config={path}"


@every_setting
def test_nonsense_in_a_file_is_refused_by_name_or_sane(program, name, tmp_path, capsys):
    given = VALUES if program == "pretrain" else [None, "", math.nan, [1], {"a": 1}]
    faults = {}
    for value in given:
        arguments = [*words(program, without=[name]), file_of(tmp_path, {name: value})]
        faults[repr(value)] = wrong(program, name, arguments, capsys)
    assert {value: fault for value, fault in faults.items() if fault} == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_defaults_are_taken_in_a_file(program, tmp_path):
    """The control case: each setting with the value that it has without."""
    config = read(program, words(program))
    own = {name: value for p, name in SETTINGS if p == program and (value := part(config, name)) is not None}
    plain = json.loads(json.dumps(own))  # the parser's numbers have types of their own
    assert len(plain) > (15 if program == "probe" else 30)
    again = read(program, [file_of(tmp_path, plain)])
    assert {name: part(again, name) for name in own} == own


def test_the_table_is_of_every_kind_of_setting():
    """A type that a later setting brings is not to be passed over."""
    kinds = [kind for kinds in KINDS.values() for kind in kinds.values()]
    assert {*map(family, kinds)} == WORDS.keys()
    assert {*numbers.WORDS} <= {each for kind in kinds for each in (kind, *get_args(kind))}
