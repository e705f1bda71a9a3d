"""Judge a frozen backbone: `accelerate launch train/probe.py --model NAME --data NAME --protocol NAME`.

kNN and logistic regression on features that are computed once, or heads trained as published; `--help` lists every
setting, docs/probing.md says whose protocol is which. Results are added to a JSON-lines file that train/table.py reads.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

from dataclasses import replace
from typing import Any

from common.data.digests import data_digest, function_digest, labels_digest, split_digest, weights_digest
from common.labels.labelled import open_full, subset_rows
from common.probing.answers import key_of
from common.probing.features import FrozenBackbone
from common.probing.knn import knn
from common.probing.logistic import logistic
from common.probing.probe_run import ProbeResult, ProbeRun
from common.probing.settings import ON_FEATURES, Cache, Probe, parse
from common.probing.train_heads import VTAB, head_probe, vtab
from common.run import results
from common.run.export import public_name
from common.salient_crop import check_crop, gain, said
from common.system import launch

from timm_dseq.hub.load import data_config, load_backbone

PROTOCOLS = {"knn": knn, "logistic": logistic, "vtab": vtab}  # all others are `head_probe`


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 130 Ctrl-C."""
    return launch.answer_of(
        "probe.py", lambda: run(parse(arguments)), "The same command goes on: features and checkpoints of heads stay."
    )


def run(config: Probe) -> int:
    """Check everything that can be wrong; then the protocol, then its results."""
    results.check(config.results)
    accelerator = launch.accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    data = open_full(config.data)
    subsets = {seed: subset_rows(data, config.data, seed) for seed in config.seeds}
    model, name = load_backbone(config.model, config.img_size, random=config.random, seed=0, **config.args)
    preprocessing = data_config(model)
    backbone = FrozenBackbone(model, preprocessing["mean"], preprocessing["std"]).to(accelerator.device)
    layout = backbone.layout(preprocessing["input_size"])
    probe = ProbeRun(config, data, subsets, backbone, layout, preprocessing, function_digest(model), accelerator)
    probe.check_views()
    if config.salient_crop:
        check_crop(model, config.salient_crop)
    protocol = PROTOCOLS.get(config.protocol, head_probe)
    found, closer = protocol(probe), []
    if config.salient_crop:
        closer = protocol(replace(probe, closer=True))
    duplicates = probe.count_duplicates()
    if accelerator.is_main_process:
        report(probe, name, found, closer, duplicates)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def report(
    probe: ProbeRun, name: str, found: list[ProbeResult], closer: list[ProbeResult], duplicates: dict[str, int]
) -> None:
    """Print the results and add them to the file. name: of the backbone. closer: those with the salient crops.
    duplicates: see `count_duplicates`."""
    config, data = probe.config, probe.data
    images = VTAB[0] if config.protocol == "vtab" else len(probe.train_rows(config.seeds[0]))
    weights = weights_digest(probe.backbone.model)
    if config.args:  # another number of heads changes features, not weights
        weights += f"-{key_of(config.args)}"
    tested = split_digest(data.test, more=[labels_digest(data.test).encode()])
    shared = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in probe.backbone.model.parameters()),
        "img_size": list(probe.preprocessing["input_size"][1:]),
        "weights": weights,
        "data": public_name(config.data.path),
        "data_digest": data_digest(data.train),
        "label": data.train.label,
        "train": {"split": data.train_split, "images": images, "subset": config.data.subset},
        "test": {"split": data.test_split, "images": len(data.test), "digest": tested},
        "classes": len(data.names),
        "protocol": config.protocol,
        "precision": config.precision,
        "seeds": config.seeds,
        "duplicates": duplicates,
    }
    more = changed(config)
    found, closer = ([replace(one, settings={**one.settings, **more}) for one in each] for each in (found, closer))
    records = [{**shared, "view": one.view, "settings": one.settings, **results.summary(one.correct)} for one in found]
    plain = {paired(one): one.correct for one in found}
    for one in closer:
        own = {"view": one.view, "settings": {**one.settings, "salient crop": config.salient_crop}}
        gained = {"gain": gain(one.correct, plain[paired(one)])} if paired(one) in plain else {}
        records.append({**shared, **own, **results.summary(one.correct), **gained})
    results.append(config.results, records)
    subset = f" ({config.data.subset})" if config.data.subset else ""
    print(
        f"{name} on {config.data.path}: learnt from {images} images of {data.train_split}{subset}, tested on "
        f"{len(data.test)} of {data.test_split}, {len(data.names)} classes"
    )
    if duplicates["train_test"]:
        print(f"{duplicates['train_test']} test images are also in the training images, pixel for pixel")
    for record in records:
        print(results.line(record) + (f": {said(record['gain'])}" if "gain" in record else ""))


def changed(config: Probe) -> dict[str, Any]:
    """Settings that decide the result, are not the protocol's, and have no place of their own in the record."""
    more = {}
    if config.protocol not in ("knn", "logistic"):
        more |= results.changed([config.heads], {}, ("at_once", "select_on", "checkpoint_every"), {})
    if config.protocol in ON_FEATURES and config.cache.dtype != Cache.dtype:
        more["features"] = config.cache.dtype
    return more


def paired(one: ProbeResult) -> tuple:
    """What a result with salient crops and the one without have in common."""
    return one.view, one.settings.get("k"), one.settings.get("T")


if __name__ == "__main__":
    launch.exit_with(main)
