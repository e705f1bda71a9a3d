"""Does a classifier need what saliency marks? `accelerate launch train/faithfulness.py --model NAME --data NAME`.

Fits logistic regression to a frozen backbone's features, then takes patches away, or adds them, in the order of each
saliency, of the centre, of colour and of chance. docs/discovery.md says what the areas mean.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common.classifiers import Regression
from common.data.digests import data_digest, weights_digest
from common.data.order import sample_seeds
from common.data.source import Source
from common.data.unreadable import batches_of_all
from common.discovering.faithfulness import areas, places
from common.discovering.looking import Looking, look_with
from common.discovering.settings import Faithfulness, parse
from common.discovering.table import markdown
from common.labels.labelled import open_labelled
from common.labels.subsets import holdout_mask
from common.run import results
from common.run.export import public_name
from common.system import launch
from common.system.screen import Screen
from torch.utils.data import Dataset, Subset

from timm_dseq import UserError
from timm_dseq.engine.random import uniform

CS = [10.0**power for power in range(-3, 4)]  # of the classifier, chosen on a tenth of the training images
RANDOM = "random"


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 130 Ctrl-C."""
    return launch.answer_of("faithfulness.py", lambda: run(parse(Faithfulness, "faithfulness.py", arguments)))


@torch.no_grad()
def run(config: Faithfulness) -> int:
    """Check everything that can be wrong; then fit the classifier, and ask it."""
    results.check(config.results)
    accelerator = launch.accelerator()
    data = open_labelled(config.data, config.seed)
    looking = look_with(config, config.model, accelerator.device)
    if accelerator.is_main_process and looking.left_out:
        print("\n".join(looking.left_out), flush=True)
    head = fitted(looking, data.train, len(data.names), config, accelerator)
    rows = torch.linspace(0, len(data.test) - 1, min(config.images, len(data.test))).long().tolist()
    found = measured(looking, head, data.test, rows, config, accelerator)
    if accelerator.is_main_process:
        about = {
            "model": looking.name,
            "weights": weights_digest(looking.model),
            "function": looking.digest(),
            "img_size": list(looking.size),
            "data": public_name(config.data.path),
            "data_digest": data_digest(data.test),
            "train": {"digest": data_digest(data.train), "images": len(data.train), "subset": config.data.subset},
            "images": len(rows),
            "accuracy": 100 * float(found.pop("right").mean()),
            "block": config.block,
            "steps": config.steps,
            "draws": config.draws,
            "seed": config.seed,
        }
        records = [{**about, **record} for record in summaries(found)]
        results.append(config.results, records)
        print(table(records))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


class Shown(Dataset):
    """`shown[place]`: an image as the backbone sees it, uint8 (3, H, W), and its label."""

    def __init__(self, source: Source, looking: Looking) -> None:
        self.source, self.looking = source, looking

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.looking.show(self.source.picture(index)), int(self.source.truth[index])


def batches(
    source: Source, rows: list[int], looking: Looking, config: Faithfulness, accelerator: Accelerator, text: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Places among these rows, images (B, 3, H, W) in [0, 1] and labels of this process's share, with progress."""
    share = torch.arange(accelerator.process_index, len(rows), accelerator.num_processes)
    screen = Screen(len(share), 0, accelerator.is_main_process, unit="image")
    chosen = Subset(Shown(source, looking), [rows[place] for place in share])
    done = 0
    for images, labels in batches_of_all(chosen, batch_size=config.batch_size, num_workers=config.workers):
        yield share[done : done + len(images)], images.to(accelerator.device) / 255, labels.to(accelerator.device)
        done += len(images)
        screen.show(done, text)
    screen.close()


def pooled(looking: Looking, images: torch.Tensor) -> torch.Tensor:
    """The backbone's features of images (B, 3, H, W) in [0, 1], as its own head would take them: (B, D)."""
    tokens = looking.model.forward_features(looking.normalised(images))
    return looking.model.forward_head(tokens, pre_logits=True).float()


def together(part: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """What each process has filled in, in all of them; what is not its own is 0."""
    return accelerator.reduce(part, "sum") if accelerator.num_processes > 1 else part


def fitted(looking: Looking, train: Source, classes: int, config: Faithfulness, accelerator: Accelerator) -> Regression:
    """Logistic regression on all training images; C is the one that is best on a tenth of them."""
    rows, labels = [*range(len(train))], train.all_labels()
    x = torch.zeros(len(rows), looking.model.num_features, device=accelerator.device)
    for at, images, _ in batches(train, rows, looking, config, accelerator, "features to fit to"):
        x[at.to(x.device)] = pooled(looking, images)
    x = together(x, accelerator)
    if not x.isfinite().all():
        raise UserError("the features are not finite: check the weights.")
    aside, labels = holdout_mask(labels, 0.1, config.seed).to(x.device), labels.to(x.device)
    trial, scores = Regression(x[~aside], labels[~aside], classes, accelerator), []
    with torch.enable_grad():
        for c in CS:
            trial.fit(c)
            scores.append(float((trial.predict(x[aside]) == labels[aside]).float().mean()))
        head = Regression(x, labels, classes, accelerator)
        head.fit(CS[max(range(len(CS)), key=scores.__getitem__)])
    return head


def measured(
    looking: Looking, head: Regression, test: Source, rows: list[int], config: Faithfulness, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Order → its areas of each image, deletion and insertion (n, 2); and which images are classified right (n,)."""
    found: dict[str, torch.Tensor] = {"right": torch.zeros(len(rows), device=accelerator.device)}
    for at, images, labels in batches(test, rows, looking, config, accelerator, "taking patches away, adding them"):

        def probability(some: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
            return head.probabilities(pooled(looking, some)).gather(1, labels[:, None])[:, 0]

        found["right"][at] = (head.predict(pooled(looking, images)) == labels).float()
        maps = looking.maps(images)
        grid = next(iter(maps.values())).shape[1:]
        seeds = sample_seeds(config.seed, torch.stack([torch.zeros_like(at), at], dim=1))
        drawn = uniform(seeds, config.draws * grid.numel()).view(len(at), config.draws, *grid)
        for name, orders in {**{name: each[:, None] for name, each in maps.items()}, RANDOM: drawn}.items():
            each = [
                torch.stack(areas(images, places(order).to(images.device), config.steps, probability), dim=1)
                for order in orders.unbind(1)
            ]
            part = found.setdefault(name, torch.zeros(len(rows), 2, device=accelerator.device))
            part[at] = torch.stack(each).mean(0)
    return {name: together(part, accelerator).double().cpu() for name, part in found.items()}


def summaries(found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """A record of each order: both areas, and how far they are from those of random orders, with intervals."""
    records = []
    for name, values in found.items():
        record: dict[str, Any] = {"order": name}
        for column, curve in enumerate(("deletion", "insertion")):
            better = 1 if curve == "insertion" else -1
            gain = better * (values[:, column] - found[RANDOM][:, column])
            for key, figures in ((curve, values[:, column]), (f"{curve}_gain", gain)):
                record |= {key: figures.mean().item(), f"{key}_interval": [*results.interval(figures)]}
        records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    first = records[0]
    title = (
        f"{first['model']} at {first['img_size'][0]} px, {first['data']}, {first['images']} test images, of which the "
        f"classifier knows {first['accuracy']:.1f} %"
    )
    rows = []
    for record in records:
        row = [record["order"]]
        for curve in ("deletion", "insertion"):
            gain = "" if record["order"] == RANDOM else _spread(record, f"{curve}_gain", "+.3f")
            row += [_spread(record, curve, ".3f"), gain]
        rows.append(row)
    heads = [
        "order of",
        "deletion (low is good)",
        "better than random",
        "insertion (high is good)",
        "better than random",
    ]
    return f"{title}\n\n{markdown(heads, rows)}"


def _spread(record: dict[str, Any], name: str, form: str) -> str:
    low, high = record[f"{name}_interval"]
    return f"{record[name]:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    launch.exit_with(main)
