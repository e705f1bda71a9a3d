"""The folder that fine-tuning ends in loads everywhere, to the same numbers, with the right names of the classes."""

import dataclasses
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from common.data.digests import weights_digest
from common.tuning.classifier import Description, card
from PIL import Image
from safetensors.torch import load_file

from timm_dseq.hub.cards import blanks
from timm_dseq.hub.load import load_backbone
from timm_dseq.hub.verify import verify

from ..run.test_export import leaks
from ..runs import tensors_of
from ..tunings import NAMES, tune

pytestmark = pytest.mark.xdist_group("tunings")


@pytest.fixture(scope="module")
def two_seeds(data, tmp_path_factory):
    """Runs of two seeds, with a moving average."""
    output = tmp_path_factory.mktemp("two") / "run"
    code, said = tune(output, data, optim__ema=0.5, seeds="[3,1]")
    assert code == 0, said
    return output, said


@pytest.fixture(scope="module")
def export(two_seeds):
    return two_seeds[0] / "export"


def test_the_folder_holds_the_average_of_the_first_seed(two_seeds, export):
    saved = tensors_of(two_seeds[0] / "seed-3")
    weights = load_file(export / "model.safetensors")
    assert weights
    assert all(torch.equal(tensor, saved[f"model: ema.{name}"]) for name, tensor in weights.items())
    assert any(not torch.equal(tensor, saved[f"model: model.{name}"]) for name, tensor in weights.items())


def test_the_folder_passes_every_check_of_verify(export):
    checks = verify(export)
    assert {name: check["seen"] for name, check in checks.items() if not check["ok"]} == {}
    assert {"stock timm", "transformers", "timm_dseq"} <= checks.keys()


USE = """
import json, sys
from PIL import Image
image = Image.open(sys.argv[1])
{code}
assert not any(name.startswith("timm_dseq") for name in sys.modules)
print(json.dumps({answer}))
"""


def code_of(export, heading):
    """The card's own example, on the folder."""
    code = (export / "README.md").read_text().split(f"### {heading}\n")[1].split("```python\n")[1].split("```")[0]
    return re.sub(r'"<namespace>/[^"]+"', repr(str(export)), code).replace(
        re.search(r'"hf-hub:[^"]+"', code)[0] if "hf-hub:" in code else "\0", repr(f"local-dir:{export}")
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "x.png"
    Image.effect_noise((50, 40), 90).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def expected(export, picture):
    """Class name → probability, by the model under its own name and a preprocessing written by hand."""
    model = timm.create_model("dseq_jepa_vit_ti16", img_size=32, num_classes=3).eval()
    model.load_state_dict(load_file(export / "model.safetensors"))
    image = Image.open(picture).resize((45, 36), Image.Resampling.BICUBIC).crop((6, 2, 38, 34))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        return dict(zip(NAMES, model(((pixels - mean) / std)[None]).softmax(1)[0].tolist(), strict=True))


@pytest.mark.slow
def test_the_cards_pipeline_gives_the_right_names_and_scores(export, picture, expected, run_python):
    answer = "{one['label']: one['score'] for one in classify(image)}"
    run = run_python(USE.format(code=code_of(export, "transformers"), answer=answer), str(picture))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_the_cards_stock_timm_gives_the_right_names_and_scores(export, picture, expected, run_python):
    answer = "dict(zip(model.pretrained_cfg['label_names'], shares[0].tolist()))"
    run = run_python(USE.format(code=code_of(export, "timm"), answer=answer), str(picture))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)
    assert run.stdout.splitlines()[-2] == max(expected, key=expected.get)


def test_the_folder_tells_nothing_of_this_machine(data, two_seeds, export):
    assert not leaks(export, data.parent, two_seeds[0].parent, socket.gethostname(), Path.home())


def test_the_card_says_what_was_measured_and_of_which_seed(two_seeds, export):
    output, said = two_seeds
    card = (export / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["pipeline_tag"], front["library_name"]) == ("image-classification", "timm")
    scores = [float(x) for x in re.findall(r"seed \d+: ([\d.]+)%", said)]
    assert len(scores) == 2
    mean, spread = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    assert f"**{mean:.2f} ± {spread:.2f} %** over 2 seeds" in card
    assert f"of seed 3: {scores[0]:.2f} %" in card
    assert "$" not in card and str(output.parents[1]) not in card
    assert set(blanks(card)) == {"[TO BE STATED: licence]"}  # weights that were drawn here have none of others


def test_the_results_name_split_seeds_and_the_backbone_as_it_was(two_seeds):
    line = json.loads((two_seeds[0].parent / "results.jsonl").read_text())
    assert (line["protocol"], line["seeds"]) == ("finetune-mae", [3, 1])
    assert (line["test"]["split"], line["test"]["images"], len(line["test"]["digest"])) == ("test", 24, 16)
    assert line["accuracy"] == pytest.approx(sum(line["each"]) / 2)
    assert line["std"] == pytest.approx(abs(line["each"][0] - line["each"][1]) / 2**0.5)
    assert line["interval"][0] <= line["accuracy"] <= line["interval"][1]
    backbone, _ = load_backbone("dseq_jepa_vit_ti16", 32, random=True, seed=3, num_classes=3)
    backbone.reset_classifier(0)
    assert line["weights"] == weights_digest(backbone)


def test_a_licence_is_one_entry_of_the_card_whatever_is_written_in_it():
    described = Description(
        **{field.name: None for field in dataclasses.fields(Description)}
        | {"name": "x", "architecture": "vit", "license": "mit\nevil: yes", "label_names": ["a", "b"]}
        | {"preprocessing": {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}, "model_args": {}}
    )
    text = card(described, 10**6, {"introduction": "", "training": "", "results": ""})
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "mit\nevil: yes" and "evil" not in head
    assert head["library_name"] == "timm" and head["tags"][-1] == "image-classification"
