"""model.tag → its weights in the local store: downloaded or given as a file, converted, verified, recorded."""

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import timm

from ...dseq_jepa import META_TAG
from ...errors import FULL, UserError, printable, similar
from .. import cards
from ..config import read_stock
from ..convert import NotWritten, convert
from ..stock import registered
from ..verify import verify
from ..weights import sha256
from . import folders
from .arrival import Arrival, BrokenOff, instead
from .sources import SOURCES, Source

TRIES = 5  # at a download that breaks off, as long as each brings something
PAUSE = 2  # seconds between them
Say = Callable[[str], None]


def get(name: str, file: Path | None = None, say: Say = print) -> dict[str, Any]:
    """Bring the weights of a model.tag into the store, if they are not there; returns their record.

    file: the checkpoint, where it has been downloaded by other means. say: takes a line for the screen.
    """
    source = _known(name)
    if file is not None and not file.is_file():
        raise UserError(f"{file} is no file: give the checkpoint that you downloaded.")
    if file is not None and not os.access(file, os.R_OK):
        raise UserError(f"{file} may not be read: check its rights.")
    if (here := _whole(name)) and not os.path.lexists(folders.unfinished(name)):
        return here  # without a lock: a store of others may only be read
    with folders.locked(name, say):
        if here := _whole(name):
            with folders.writing(name):
                folders.delete(folders.unfinished(name))  # a kill has left it
            return here
        if folder := folders.stored(name):
            say(f"{name} is damaged in the store, so it is brought anew: {folders.damage(folder, thorough=True)}")
        say(f"{name}\n  from {file or source.link}\n  licence: {source.license}")
        with folders.writing(name):
            work = folders.prepared(name)
            record = _brought(name, source, file, work, say)
            folder = folders.publish(work / "folder", name)
            shutil.rmtree(work)
    return {**record, "name": name, "folder": str(folder), "new": True}


def _whole(name: str) -> dict[str, Any] | None:
    """The record of weights that are in the store and undamaged."""
    folder = folders.stored(name)
    if not folder or folders.damage(folder, thorough=True):
        return None
    return {**folders.record(folder), "name": name, "folder": str(folder), "new": False}


def listing() -> list[dict[str, Any]]:
    """What can be brought, and what of it is here."""
    rows = []
    for name, source in SOURCES.items():
        folder = folders.stored(name)
        row = {"name": name, "link": source.link, "license": source.license, "folder": folder and str(folder)}
        rows.append(row | {"record": folder and folders.record(folder)})
    return rows


def remove(name: str, say: Say = print) -> dict[str, Any]:
    """Remove the weights of a model.tag from the store, and what has arrived of them."""
    _known(name)
    with folders.locked(name, say), folders.writing(name):
        entry = folders.store() / name
        if not any(map(os.path.lexists, (entry, folders.unfinished(name)))):
            raise UserError(f"{name} is not in the store: timm-dseq get --list shows what is.")
        if entry.is_symlink():
            say(f"{name} is a link: what it leads to, {os.readlink(entry)}, stays.")
        return {"name": name, "freed": folders.remove(name)}


def _known(name: str) -> Source:
    if name not in SOURCES:
        hint = similar(name, SOURCES)
        raise UserError(f"{name} is nothing that can be brought{hint}: timm-dseq get --list shows what can.")
    return SOURCES[name]


def _brought(name: str, source: Source, file: Path | None, work: Path, say: Say) -> dict[str, Any]:
    """Write the complete folder work/folder; returns its record."""
    encoder = sum(4 * parameter.numel() for parameter in registered(name).blueprint.parameters())
    arrival = Arrival(name, work, encoder)
    if file is None:
        where = _downloaded(source, arrival)
        arrival.check_whole()
        file = arrival.file
    else:
        folders.check_room(encoder, name)
        where = f"the file {printable(file.name)}"
    record = {
        "source": where,
        "size": file.stat().st_size,
        "sha256": sha256(file),
        "license": source.license,
        "date": date.today().isoformat(),
    }
    say(f"  {where}: {record['size']:,} bytes, SHA-256 {record['sha256']}")
    try:
        _convert(file, name, source, work / "folder", where)
    except NotWritten as error:
        full = any(os.strerror(code) in str(error.__cause__) for code in FULL)
        raise UserError(f"{str(error).rstrip('.')}{folders.held(name) if full else ''}.") from error
    except UserError:
        if file == arrival.file:
            arrival.discard()  # to keep it would be of no use
        raise
    checks = verify(work / "folder")
    if failed := [f"{check}: {result['seen']}" for check, result in checks.items() if not result["ok"]]:
        raise UserError(
            f"{name}, converted, does not load as it should ({failed[0]}): mend that, then give the same command again."
        )
    say("\n".join(f"  verified, {check}: {result['seen']}" for check, result in checks.items()))
    weights = work / "folder" / folders.WEIGHTS
    record["weights"] = {"size": weights.stat().st_size, "sha256": sha256(weights)}
    (work / "folder" / folders.RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _downloaded(source: Source, arrival: Arrival) -> str:
    try:
        for _ in range(TRIES - 1):
            before = arrival.done
            try:
                return source.fetch(arrival)
            except BrokenOff:
                if arrival.done <= before:
                    raise
            time.sleep(PAUSE)
        return source.fetch(arrival)
    finally:
        arrival.close()


def _convert(file: Path, name: str, source: Source, folder: Path, where: str) -> None:
    """Convert a checkpoint; refuse one that is of another kind, or holds another encoder."""
    mend = f"it should lie at {source.link}, give it as --file PATH"
    if kind := instead(file):
        found = f"the server sent {kind} instead of the file" if file.parent == folder.parent else f"it is {kind}"
        raise UserError(f"{where} is not {name} ({found}): {mend}.")
    try:
        done = convert(file, folder)
    except NotWritten:
        raise
    except UserError as error:
        reason = str(error).replace(str(file), "it").rstrip(".")
        raise UserError(f"{where} is not {name} ({reason}): {mend}.") from error
    config, stock = read_stock(folder / "config.json")
    if (done["kind"], stock) != (source.kind, registered(name)):
        found = f"{stock.dseq_name or stock.architecture} at {stock.img_size[0]}×{stock.img_size[1]}"
        raise UserError(f"{where} is not {name}, but holds {found}, kind {done['kind']}: {mend}.")
    if name.endswith(f".{META_TAG}"):  # of which the file does not say on what it was trained
        crop = timm.get_pretrained_cfg(name).crop_pct
        config["pretrained_cfg"] |= {"tag": META_TAG, "crop_pct": crop}
        card = cards.ijepa_card(f"{stock.architecture}.{META_TAG}", stock, done["encoder"], crop)
        (folder / "config.json").write_text(cards.config_text(config), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
