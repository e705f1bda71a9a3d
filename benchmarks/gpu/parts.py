"""Files → parts that a machine lets through, a few at a time; and back, each checked by its SHA-256.

    parts/manifest.json  fetch-01/export.000 …  fetch-01/state.000 …  fetch-02/state.004 …

Each bundle is one tar, cut. A bundle whose parts are all there can be had without the others.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
PART_MIB = 15.9  # of the 16 MiB that a file may have
FETCH_MIB = 63.9  # of the 64 MiB that go at once, the manifest among them
FETCH_FILES = 7  # of the 8 files, beside the manifest


class PartsError(Exception):
    """One line that says which part is wrong, and how to mend it."""


def split(
    folder: Path, bundles: dict[str, Iterable[str]], into: Path, facts: dict, part_mib: float = PART_MIB
) -> list[list[Path]]:
    """Cut bundles of files and folders below `folder`, the most wanted first: the parts of each fetch.

    facts: what is to be known of them before they are joined.
    """
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    limit = int(part_mib * 2**20)
    parts = []
    for bundle, names in bundles.items():
        whole = into / f"{bundle}.tar"
        with tarfile.open(whole, "w") as tar:
            for name in names:
                tar.add(folder / name, arcname=name)
        with whole.open("rb") as file:
            for number in range(-(-whole.stat().st_size // limit)):
                part = into / f"{bundle}.{number:03d}"
                part.write_bytes(file.read(limit))
                parts.append({"bundle": bundle, "name": part.name, "size": part.stat().st_size, "sha256": digest(part)})
        whole.unlink()
    fetches: list[list[dict]] = [[]]
    for part in parts:
        last = fetches[-1]
        if last and (
            len(last) == FETCH_FILES or sum(p["size"] for p in last) + part["size"] > (FETCH_MIB * 2**20 - 2**16)
        ):
            fetches.append([])
        fetches[-1].append(part)
    placed = []
    for number, fetch in enumerate(fetches, 1):
        goal = into / f"fetch-{number:02d}"
        goal.mkdir()
        placed.append([(into / part["name"]).rename(goal / part["name"]) for part in fetch])
    (into / MANIFEST).write_text(json.dumps({**facts, "fetches": len(fetches), "parts": parts}, indent=1))
    return placed


def join(parts: Path, into: Path, bundles: Iterable[str] | None = None) -> dict:
    """Put bundles (default: all) back below `into`; returns the manifest. Parts may lie in any folder below `parts`."""
    manifest = manifest_of(parts)
    found = {path.name: path for path in parts.rglob("*") if path.is_file()}
    names = list(dict.fromkeys(part["bundle"] for part in manifest["parts"]))
    into.mkdir(parents=True, exist_ok=True)
    for bundle in names if bundles is None else bundles:
        own = [part for part in manifest["parts"] if part["bundle"] == bundle]
        if not own:
            raise PartsError(f"{parts} holds no {bundle}, only {', '.join(names)}: bring the parts of a whole run.")
        for part in own:
            check(found.get(part["name"]), part, parts)
        whole = into / f".{bundle}.tar"
        with whole.open("wb") as file:
            for part in own:
                file.write(found[part["name"]].read_bytes())
        with tarfile.open(whole) as tar:
            tar.extractall(into, filter="data")
        whole.unlink()
    return manifest


def manifest_of(parts: Path) -> dict:
    """What stands in the manifest, which may lie in any folder below."""
    found = sorted(parts.rglob(MANIFEST)) if parts.is_dir() else []
    if not found:
        raise PartsError(f"{parts} holds no {MANIFEST}: name the folder into which the parts were copied.")
    return json.loads(found[0].read_text())


def check(path: Path | None, part: dict, folder: Path) -> None:
    """Refuse a part that is missing or differs from what was written."""
    if path is None:
        raise PartsError(f"{part['name']} is missing in {folder}: copy it there, too.")
    if path.stat().st_size != part["size"] or digest(path) != part["sha256"]:
        raise PartsError(f"{path} is damaged (its SHA-256 is not the one written): copy it again.")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
