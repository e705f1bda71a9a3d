"""Every figure that a run logs or stores is compared with an independent computation: here, or in a test named here."""

import json
import math
import re
import sys
from pathlib import Path

import psutil
import pytest
import timm
from common.run.log import records

import timm_dseq  # noqa: F401

from . import runs

TESTS = Path(__file__).parents[1]
SHIPPED = TESTS.parent / "docs/runs/dseq_jepa_vit_ti16.photos65k/results.jsonl"
HERE = "train/test_figures.py::test_the_simple_figures_of_a_log_are_counted_again"
SCHEDULES = "train/run/test_schedules.py::test_the_papers_schedules_at_every_epoch"
ENGINE = "engine/test_jepa.py::test_loss_and_gradients_equal_the_reference"
FACTS = "engine/test_jepa.py::test_facts_of_a_step_are_those_of_its_plan"
MONITOR = "train/pretraining/test_monitor.py::test_the_figures_are_those_of_scikit_learn_and_scipy"
SHARES = "train/pretraining/test_monitor.py::test_shares_of_the_tokens_variance_are_those_of_a_slow_count"
RECIPES = "train/tuning/test_recipes.py::test_the_first_20_steps_equal_a_loop_written_by_hand"
INTERVAL = "train/probing/test_probe.py::test_the_interval_is_a_bootstrap_of_the_images"
RECORD = "train/test_figures.py::test_a_result_says_what_it_is_of"
DUPLICATES = "train/probing/test_probe.py::test_duplicates_of_a_real_data_set"

LOG = {  # a field of a line of log.jsonl → the test that computes it in another way
    **dict.fromkeys(("step", "samples", "seconds", "images_per_second", "memory_mib", "skipped", "broken"), HERE),
    **dict.fromkeys(("region_share", "region_counts", "regions_found", "losses", "loss_by_step"), HERE),
    **dict.fromkeys(("lr", "weight_decay", "momentum", "lambda"), SCHEDULES),
    "loss": ENGINE,
    "gradient_norm": "train/pretraining/test_step.py::test_gradients_are_limited_by_their_norm_over_all_parameters",
    **dict.fromkeys(("encoder_fill", "predictor_fill"), FACTS),
    "mfu": "train/pretraining/test_utilisation.py::test_without_padding_we_count_what_torch_counts",
    "graphs": "train/pretraining/test_compile.py",
    "probe.knn": "train/pretraining/test_monitor.py::test_knn_equals_brute_force",
    **dict.fromkeys(("probe.linear", "probe.rank_me", "probe.rank_me_tokens", "probe.feature_std"), MONITOR),
    **dict.fromkeys(("probe.share_image", "probe.share_place"), SHARES),
    **dict.fromkeys(
        ("probe.phase", "probe.collapse"), "train/pretraining/test_monitor.py::test_a_collapse_is_called_one"
    ),
}
RESULTS = {  # a number of a record of results → the same
    "accuracy": "train/probing/test_logistic.py::test_accuracy_is_scikit_learns",
    "each": INTERVAL,
    "std": INTERVAL,
    "interval": INTERVAL,
    "duplicates": DUPLICATES,
    **dict.fromkeys(("parameters", "img_size", "train", "test", "classes", "seeds"), RECORD),
}
WORDS = {"model", "weights", "data", "data_digest", "label", "protocol", "precision", "view", "settings"}
WORDS |= {"time", "versions"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("figures") / "run"
    code, said = runs.train(output, optim__regions=1.0, optim__regions_end=1.0, watch__probe_every=7)
    assert code == 0, said
    return output


def names(line):
    """The fields of a line of the log; probes before the first step have those of later ones, the student's those of
    the target."""
    for name, value in line.items():
        if name in ("probe", "probe_before"):
            inner = {**value, **value["student"]}
            yield from (f"probe.{own}" for own in inner if own != "student")
        else:
            yield name


def test_every_field_of_a_log_and_of_a_result_has_its_check(run):
    lines = records(run / "log.jsonl")
    assert {name for line in lines for name in names(line)} <= LOG.keys()
    record = json.loads(SHIPPED.read_text().splitlines()[0])
    assert record.keys() == RESULTS.keys() | WORDS
    for place in {*LOG.values(), *RESULTS.values()}:
        file, _, function = place.partition("::")
        assert re.search(rf"^def {function or 'test'}", (TESTS / file).read_text(), re.MULTILINE), place


def test_the_simple_figures_of_a_log_are_counted_again(run):
    lines = records(run / "log.jsonl")
    assert len(lines) == 20
    for number, line in enumerate(lines, 1):
        assert (line["step"], line["samples"], line["broken"], line["skipped"]) == (number, 8 * number, 0, False)
        assert line["seconds"] * line["images_per_second"] == pytest.approx(8)
        counts = line["region_counts"]
        assert sum(counts) == 8 and line["regions_found"] * 8 == sum(n * images for n, images in enumerate(counts))
        # an image with no region at all is trained on blocks
        assert line["region_share"] * 8 == 8 - counts[0]
        assert sum(line["losses"].values()) == pytest.approx(line["loss"])
        means = [mean for mean in line["loss_by_step"] if mean is not None]
        assert min(means) <= line["loss"] * (1 + 1e-6) and line["loss"] <= max(means) * (1 + 1e-6)
    if sys.platform == "linux":
        used = [line["memory_mib"] for line in lines]
        assert used == sorted(used) and 50 < used[0] < psutil.virtual_memory().total / 2**20


def test_a_result_says_what_it_is_of():
    """Of the shipped run: counted in its own files, not by the code that wrote them."""
    model = timm.create_model("dseq_jepa_vit_ti16", num_classes=0)
    weights = sum(math.prod(tensor.shape) for tensor in model.parameters())
    for text in SHIPPED.read_text().splitlines():
        record = json.loads(text)
        assert record["parameters"] == (0 if record["model"] == "raw pixels" else weights)
        assert record["img_size"] in ([128, 128], [32, 32]) and record["seeds"] == [0] and len(record["each"]) == 1
        if record["data"] == "imagenette128":
            assert (record["train"]["images"], record["test"]["images"], record["classes"]) == (9469, 3925, 10)
            # an accuracy is a whole number of images
            right = record["accuracy"] * 3925 / 100
            assert abs(right - round(right)) < 1e-6
