"""Judge where a backbone looks: `accelerate launch train/discover.py --model NAME --data NAME`.

Its saliency maps and ranked regions against masks or boxes of objects, beside priors that know no model. Prints
Markdown, adds to a JSON-lines file, draws the best and the worst images. docs/discovery.md says what the figures mean.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from common.data.digests import data_digest, weights_digest
from common.data.order import sample_seeds
from common.data.unreadable import batches_of_all
from common.discovering.judging import Judging
from common.discovering.looking import Looking, look_with
from common.discovering.maps import CONSTANT, PRIORS, RECTANGLES
from common.discovering.pictures import save_sheet
from common.discovering.settings import Discover, parse
from common.discovering.table import over_training, score, tables
from common.discovering.truth import Truth, Truths, open_truths
from common.run import results
from common.run.export import public_name
from common.system import launch
from common.system.screen import Screen
from torch.utils.data import Subset

from timm_dseq import UserError
from timm_dseq.engine.regions import rank_regions
from timm_dseq.engine.vit import block_index
from timm_dseq.hub.checkpoints import steps

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 130 Ctrl-C."""
    return launch.answer_of(
        "discover.py",
        lambda: run(parse(Discover, "discover.py", arguments)),
        "The same command goes on: models that are judged stay.",
    )


def run(config: Discover) -> int:
    """Check everything that can be wrong; then judge each model, print and draw."""
    results.check(config.results)
    accelerator = launch.accelerator()
    names = models_of(config)
    looking = look_with(config, names[0], accelerator.device)
    truths = open_truths(config.data, config.workers, accelerator.is_main_process)
    if len(truths) < accelerator.num_processes:
        raise UserError(f"{len(truths)} images are too few for {accelerator.num_processes} processes: start fewer.")
    if accelerator.is_main_process:
        for line in (*looking.left_out, *said_of(truths)):
            print(line, flush=True)
    records: list[Record] = []
    for number, name in enumerate(names):
        looking = looking if number == 0 else look_with(config, name, accelerator.device)
        records += judged(looking, truths, config, accelerator, priors=number == 0)
    if accelerator.is_main_process:
        print(tables(records, config.data.path))
        if config.checkpoints:
            print(f"\n{over_training(records)}")
        own = [record for record in records if record["model"] == looking.name]
        if config.pictures and own:
            print(f"pictures: {draw(looking, own, truths, config)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def models_of(config: Discover) -> list[str]:
    """The models to judge: the one that is named, or all checkpoints of the run."""
    if not config.checkpoints:
        return [config.model]
    folder = Path(config.model)
    found = steps(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    if not found:
        raise UserError(f"model={config.model} holds no checkpoints: name a run of pretrain.py.")
    return [str(path) for path in found]


def said_of(truths: Truths) -> list[str]:
    """Lines on what is judged and what is not."""
    lines = []
    if truths.form:
        lines.append(f"boxes are {truths.form}, as the data shows")
    if truths.empty:
        first = truths.where(truths.empty[0])
        lines.append(f"{len(truths.empty)} images hold no object and are left out, the first {first}")
    return lines


def judged(looking: Looking, truths: Truths, config: Discover, accelerator: Accelerator, priors: bool) -> list[Record]:
    """The records of one model: found in the file of results, or measured and added to it."""
    about = {
        "img_size": list(looking.size),
        "grid": list(looking.grid),
        "data": public_name(config.data.path),
        "data_digest": data_digest(truths.source),
        "truth_digest": truths.digest,
        "boxes": truths.form,
        "images": len(truths),
        "empty": len(truths.empty),
        "skip": config.data.skip,
        "block": config.block,
        "num_regions": config.num_regions,
        "min_area": config.min_area,
        "draws": config.draws,
        "seed": config.seed,
    }
    own = {"model": looking.name, "weights": weights_digest(looking.model), "function": looking.digest()}
    nobody = {"model": "no model", "weights": "", "function": ""}
    wanted = [({**about, **own}, looking.queries)]
    if priors:
        wanted.append(({**about, **nobody}, [*PRIORS, CONSTANT, *[RECTANGLES] * truths.scenes]))
    known = [recorded(config.results, *each) for each in wanted] if accelerator.is_main_process else None
    (known,) = broadcast_object_list([known])
    if all(known):
        return [record for each in known for record in each]
    truths.show = looking.show
    names = [*looking.queries, *(PRIORS if priors else ())]
    judging = Judging(names, len(truths), config.num_regions, config.min_area, config.draws, truths.scenes)
    share = range(accelerator.process_index, len(truths), accelerator.num_processes)
    screen = Screen(len(share), 0, accelerator.is_main_process, unit="image")
    for places, images, found in batches(truths, share, config):
        maps = looking.maps(images, priors)
        rows = torch.tensor([truths.rows[place] for place in places])
        seeds = sample_seeds(config.seed, torch.stack([torch.zeros_like(rows), rows], dim=1))
        judging.add(places, maps, images, found, seeds)
        screen.show(share.index(places[-1]) + 1, looking.name)
    screen.close()
    judging.gather(accelerator)
    records = []
    for record in judging.records():
        is_query = record["map"] in looking.queries
        if is_query or priors:
            records.append({**about, **(own if is_query else nobody), **record})
    if accelerator.is_main_process:
        results.append(config.results, records)
    return records


def batches(truths: Truths, share: range, config: Discover) -> Iterator[tuple[list[int], torch.Tensor, list[Truth]]]:
    """Places, images (B, 3, H, W) in [0, 1] and truths of this process's share."""
    loader = batches_of_all(Subset(truths, share), list, batch_size=config.batch_size, num_workers=config.workers)
    done = 0
    for batch in loader:
        _, images, found = zip(*batch, strict=True)
        places = [*share[done : done + len(batch)]]
        done += len(batch)
        yield places, torch.from_numpy(np.stack(images)) / 255, [*found]


def recorded(path: str, about: Record, maps: list[str]) -> list[Record]:
    """The records of these maps in the file of results; none unless all are there."""
    if not Path(path).is_file():
        return []
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that was cut off
        if isinstance(record, dict) and about.items() <= record.items():
            found[record["map"]] = record
    return [found[name] for name in maps] if found.keys() >= {*maps} else []


def draw(looking: Looking, records: list[Record], truths: Truths, config: Discover) -> Path:
    """A sheet of the images where the best map of the model finds objects best, and worst; returns its path."""
    record = max((record for record in records if "best" in record), key=lambda record: score(record)[1])
    half = -(-config.pictures // 2)
    places = record["best"][:half] + record["worst"][: config.pictures - half]
    truths.show = None
    photos = [truths.source.picture(truths.rows[place]) for place in places]
    images = torch.from_numpy(np.stack([looking.show(photo) for photo in photos])) / 255
    maps = looking.maps(images, priors=False)[record["map"]]
    regions = rank_regions(maps, config.num_regions, config.min_area)
    path = Path(config.output_dir) / picture_name(record, looking)
    title = f"{looking.name}, {record['map']}: where its regions find objects best (left) and worst (right)"
    save_sheet(path, photos, [truths[place][2] for place in places], maps, regions, title)
    return path


def picture_name(record: Record, looking: Looking) -> str:
    """Of what a sheet shows, in words, and a few digits of what words would be too long for."""
    about = [record[name] for name in ("function", "data_digest", "truth_digest", "skip", "num_regions", "min_area")]
    digits = hashlib.blake2b(repr(about).encode(), digest_size=4).hexdigest()
    block = f"block{block_index(looking.model, looking.block)}"
    words = [looking.name, f"{looking.size[0]}px", record["data"], "boxes" if record["boxes"] else "masks", block]
    return re.sub(r"[^\w.,()=+-]+", "_", ".".join([*words, record["map"]]))[:200] + f".{digits}.jpg"


if __name__ == "__main__":
    launch.exit_with(main)
