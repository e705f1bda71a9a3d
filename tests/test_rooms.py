"""Which room may import which; nothing private across rooms, no import cycle, no long file, no full room."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_FILES, MOST_LINES = 12, 350

# A room (or a file beside the rooms; "" is timm_dseq/__init__.py) and the others that it may import.
LIBRARY = {
    "errors": set(),
    "arguments": {"errors"},
    "host": set(),
    "images": set(),
    "positions": set(),
    "engine": {"arguments", "errors", "host", "positions"},
    "hub": {"errors", "dseq_jepa"},
    "dseq_jepa": {"errors", "positions", "hub"},
    "explain": {"errors", "engine"},
    "prune": {"arguments", "errors", "engine"},
    "cli": {"", "errors", "dseq_jepa", "hub", "early", "explain", "images", "recipes"},
    "recipes": set(),
    "early": {"recipes"},
    "__main__": {"cli"},
    "": {"errors", "dseq_jepa", "early", "engine", "prune"},
}
RECIPES = {  # all of them may import timm_dseq; the scripts in train/ may import all of them
    "system": set(),
    "run": {"system"},
    "data": {"system"},
    "labels": {"data", "system"},
    "classifiers": set(),
    "salient_crop": {"run"},
    "pretraining": {"classifiers", "data", "run", "system"},
    "probing": {"classifiers", "salient_crop", "labels", "data", "run", "system"},
    "boxes": set(),
    "supervised": {"data", "run", "system"},
    "tuning": {"supervised", "salient_crop", "labels", "data", "run", "system"},
    "dense": {"supervised", "run", "system"},
    "detecting": {"boxes", "dense", "data", "run", "system"},
    "discovering": {"boxes", "labels", "data", "run", "system"},
    "segmenting": {"dense", "labels", "data", "run", "system"},
}

Sources = dict[str, str]  # module → its source


def modules() -> Sources:
    """timm_dseq.engine.jepa, common.data.order, pretrain, …"""
    found = {}
    for folder, top in ((ROOT, "timm_dseq"), (ROOT / "train", "common"), (ROOT / "train", "")):
        for path in (folder / top).rglob("*.py") if top else folder.glob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


@cache
def import_nodes(source: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements of a source, and whether they run when it is imported."""
    tree = ast.parse(source)
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    return [(n, id(n) not in late) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def imports(sources: Sources, module: str) -> Iterator[tuple[str, str, bool]]:
    """What a module imports of this project: (module, name, whether at import time)."""
    package = module if any(other.startswith(module + ".") for other in sources) else module.rpartition(".")[0]
    for node, now in import_nodes(sources[module]):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name in sources:
                    yield name.name, "", now
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            for name in node.names:
                inner = f"{source}.{name.name}"
                if inner in sources:
                    yield inner, "", now
                elif source in sources:
                    yield source, name.name, now


def room(module: str) -> tuple[str, str]:
    """timm_dseq.engine.jepa → ("timm_dseq", "engine"); a script is a house by itself."""
    top, _, rest = module.partition(".")
    return top, rest.partition(".")[0]


def broken_rules(sources: Sources) -> list[str]:
    """One line for each import that is not allowed."""
    lines = []
    for module in sources:
        top, own = room(module)
        for other, name, _ in imports(sources, module):
            its_top, its_room = room(other)
            if (its_top, its_room) != (top, own) and (name.startswith("_") and not name.startswith("__")):
                lines.append(f"{module} imports {name}, which is private to {other}")
            if its_top not in ("timm_dseq", "common"):
                lines.append(f"{module} imports the script {other}")
            elif top == "timm_dseq":
                if its_top != top or (its_room != own and its_room not in LIBRARY.get(own, ())):
                    lines.append(f"{module} imports {other}")
            elif top == its_top and own not in ("", its_room) and its_room not in RECIPES.get(own, ()):
                lines.append(f"{module} imports {other}")
    return lines


def cycle(sources: Sources) -> list[str]:
    """Modules that import each other in a cycle when they are imported, if any do."""
    edges = {module: {other for other, _, now in imports(sources, module) if now} - {module} for module in sources}
    while edges:
        ends = {module for module, others in edges.items() if not others & edges.keys()}
        if not ends:
            return sorted(edges)
        edges = {module: others for module, others in edges.items() if module not in ends}
    return []


def test_a_room_imports_only_what_it_may():
    assert broken_rules(modules()) == []


def test_there_is_no_import_cycle():
    assert cycle(modules()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("timm_dseq.engine.plans", "from ..hub import convert"),
        ("timm_dseq.engine.plans", "from common.data import order"),
        ("timm_dseq.hub.convert", "from ..engine.jepa import DSeqJEPA"),
        ("common.data.source", "from ..pretraining.settings import Config"),
        ("common.run.length", "from common.tuning import settings"),
        ("common.run.length", "def late():\n    from ..data import order"),
        ("common.tuning.task", "from ..probing.heads import Grid"),
        ("common.pretraining.model", "import pretrain"),
        ("common.probing.probe_run", "from ..data.source import _label_column"),
    ],
)
def test_what_is_not_allowed_is_seen(module, line):
    sources = modules()
    before = broken_rules(sources)
    assert len(broken_rules({**sources, module: f"{sources[module]}\n{line}\n"})) == len(before) + 1


def test_a_cycle_is_seen():
    sources = modules()
    sources["common.data.order"] += "\nfrom . import crops\n"
    assert {"common.data.order", "common.data.crops"} <= set(cycle(sources))


def test_no_file_is_long_and_no_room_is_full():
    files = [*(ROOT / "timm_dseq").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    long = {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > MOST_LINES}
    assert long == {}
    for folder in {path.parent for path in files}:
        inside = [path for path in files if path.parent == folder and path.name != "__init__.py"]
        assert len(inside) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(inside)} files"
