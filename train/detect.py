"""Train a detector on a ViT: `accelerate launch train/detect.py --model NAME --data FOLDER`.

Boxes, and masks where there are any, by torchvision's Mask R-CNN; `--help` lists every setting. A run that was stopped,
killed or crashed resumes when the same command is given again. `--evaluate RUN` judges what one has ended in.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from common.data.digests import data_digest, digests_of, duplicates, split_digest
from common.dense.run import dense_run
from common.detecting.annotated import Annotated
from common.detecting.evaluation import as_coco, evaluate
from common.detecting.export import describe, load_detector, save
from common.detecting.reading.opening import open_annotated
from common.detecting.report import write_report
from common.detecting.settings import Detecting, Optim, parse
from common.detecting.task import DetectionTask
from common.run import results
from common.run.export import public_name
from common.run.length import fitted_warmup
from common.run.lock import locked
from common.system import launch
from common.system.signals import STOPPED, Stop

from timm_dseq import UserError

FREE = ("data.images", "data.test", "data.test_images", "evaluate")  # settings that may differ when a run is resumed

# Settings that decide nothing, or have a place of their own in a record.
LEFT_OUT = ("epochs", "batch_size", "lr", "layer_decay", "accumulation", "max_skipped")
LEFT_OUT += ("window", "pyramid", "size", "masks")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    return launch.answer("detect.py", lambda: parse(arguments), run)


def run(config: Detecting, text: str) -> int:
    """All of it, alone in its folder. text: the settings as YAML."""
    accelerator = launch.accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    if config.evaluate:
        return judge(config, accelerator)
    results.check(config.results)
    config.optim, shorter = fitted_warmup(config.optim, Optim.warmup_epochs)
    if accelerator.is_main_process and shorter:
        print("\n".join(shorter), flush=True)
    with locked(config.output_dir, accelerator, wanted=not config.dry_run):
        return train(config, text, accelerator)


def train(config: Detecting, text: str, accelerator: Accelerator) -> int:
    """Train, evaluate, and write export/, report.html and the results."""
    annotated, test = open_annotated(config.data)
    if accelerator.is_main_process:
        print(f"{annotated.said()}\n{test.said()}", flush=True)
    task = DetectionTask(config, annotated, test, accelerator)
    training = dense_run(task, config, text, accelerator, FREE)
    if config.dry_run:
        training.dry_run()
        return 0
    output = Path(config.output_dir)
    shared = count_duplicates(config, annotated, test, accelerator)  # slow: it comes after all quick checks
    stopped = training.train(Stop())
    if not training.finished:
        return STOPPED if stopped else 0
    if accelerator.is_main_process:  # before the evaluation, which may fail
        save(output / "export", task.model, describe(task.model, config.detector.pyramid, test.names, test.ids))
    figures = task.evaluate()
    accelerator.end_training()
    if accelerator.is_main_process:
        (output / "detections.json").write_text(json.dumps(as_coco(test, task.found)), encoding="utf-8")
        report = write_report(output, test, task.found, figures)
        records = records_of(config, task, figures, shared)
        results.append(config.results, records)
        print(*map(results.line, records), sep="\n")
        print(f"the detector: {output / 'export'}\nthe report: {report}", flush=True)
    return 0


def count_duplicates(config: Detecting, train: Annotated, test: Annotated, accelerator: Accelerator) -> int:
    """Test images that are also trained on, pixel for pixel. An image that cannot be used is named on the way."""
    folder = str(Path(config.output_dir) / "digests")
    tested, learnt = (digests_of(x.source, config.workers, folder, accelerator, x.picture) for x in (test, train))
    return duplicates(learnt, tested)


def records_of(config: Detecting, task: DetectionTask, figures: dict[str, float], shared: int) -> list[dict[str, Any]]:
    """A record for box AP, and one for mask AP. shared: test images that are also trained on."""
    optim, detector = config.optim, config.detector
    record = {
        "model": task.backbone,
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "img_size": [detector.size, detector.size],
        "weights": task.digest,
        "data": public_name(config.data.path),
        "data_digest": data_digest(task.train.source),
        "label": "objects",
        "train": {
            "split": task.train.split,
            "images": len(task.images),
            "subset": None,
            "digest": split_digest(task.train.source, more=annotations(task.train)),
        },
        "test": {
            "split": task.test.split,
            "images": len(task.test),
            "digest": split_digest(task.test.source, more=annotations(task.test)),
        },
        "classes": len(task.train.names),
        "protocol": "mask-rcnn" if task.with_masks else "faster-rcnn",
        "precision": config.system.precision,
        "seeds": [config.seed],
        "duplicates": {"train_test": shared},
        "view": f"{detector.pyramid} pyramid",
        "settings": {
            "epochs": optim.epochs,
            "batch_size": optim.batch_size,
            "lr": optim.lr,
            "layer_decay": optim.layer_decay,
            "window": detector.window,
            **results.changed([detector, optim], {}, LEFT_OUT, config.args),
        },
    }
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in figures]
    return [{**record, **results.figure(f"{kind} AP", 100 * figures[f"{kind}_ap"])} for kind in kinds]


def annotations(split: Annotated) -> Iterator[bytes]:
    """Of every object: its box, class and mask, and whether it is a crowd."""
    for objects in split.objects:
        yield from (array.tobytes() for array in (objects.boxes, objects.labels, objects.crowd))
        yield repr(objects.masks).encode()


def judge(config: Detecting, accelerator: Accelerator) -> int:
    """Evaluate the detector of a run on the test split."""
    detector, description = load_detector(config.evaluate)
    _, test = open_annotated(config.data)
    check_classes(config.evaluate, description, test)
    figures, _ = evaluate(detector.to(accelerator.device), test, accelerator, config.workers)
    if accelerator.is_main_process:
        print(test.said())
        print(
            *(f"{name:<14} {100 * value:6.2f}" for name, value in figures.items() if value >= 0), sep="\n", flush=True
        )
    accelerator.end_training()
    return 0


def check_classes(folder: str, description: dict[str, Any], test: Annotated) -> None:
    """Refuse test images whose classes are not those that the detector knows."""
    if description["ids"] != list(test.ids) or description["names"] != list(test.names):
        raise UserError(
            f"the detector in {folder} knows {len(description['names'])} classes, and the test images have "
            f"{len(test.names)} others: evaluate it on the data set that it was trained on."
        )


if __name__ == "__main__":
    launch.exit_with(main)
