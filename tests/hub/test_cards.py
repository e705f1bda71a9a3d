import json

import pytest
import yaml

from timm_dseq.dseq_jepa import ARCHITECTURES, BACKBONE, STOCK, TAGS
from timm_dseq.hub import cards
from timm_dseq.hub.stock import registered

from ..conftest import ROOT

MODEL_TAGS = [f"{architecture}.{tag}" for architecture in ARCHITECTURES for tag in TAGS]


def test_the_committed_hub_folders_are_exactly_what_is_generated(tmp_path):
    """Mend: python -m timm_dseq.hub.cards hub_configs"""
    cards.write_hub_configs(tmp_path)
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = ROOT / "hub_configs"
    assert generated == {p.relative_to(committed): p.read_bytes() for p in committed.rglob("*") if p.is_file()}
    assert len(generated) == 2 * len(MODEL_TAGS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_names_the_stock_architecture_and_its_arguments_only(architecture):
    config = registered(f"{architecture}.in1k").config("in1k", "apache-2.0")
    assert config["architecture"] == STOCK[architecture]
    assert config["model_args"] == BACKBONE
    assert config["pretrained_cfg"]["crop_pct"] == 0.875 and config["pretrained_cfg"]["tag"] == "in1k"
    assert json.loads(cards.config_text(config)) == json.loads(json.dumps(config))


@pytest.mark.parametrize("name", MODEL_TAGS)
def test_a_card_is_complete_and_honest(name):
    card = cards.dseq_card(name)
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "timm" and metadata["pipeline_tag"] == "image-feature-extraction"
    assert metadata["license"] == ("other" if name.endswith("official") else "apache-2.0")
    for title in ("Usage", "Training", "Results", "Licence", "Citation"):
        assert f"\n## {title}\n" in body
    first_line = body.split("```python\n")[1].splitlines()[0]
    assert first_line.startswith("import timm_dseq")
    for usage in (f"hf-hub:<namespace>/{name}", "AutoModel.from_pretrained", "as (B, C, h, w)", f'"{name}"'):
        assert usage in body
    assert "$" not in card  # every word of the template is filled in
    assert any("MEASURED" in blank for blank in cards.blanks(card))
    assert ("permission" in card) == name.endswith("official")


def test_the_papers_figures_are_quoted_as_the_papers():
    card = cards.dseq_card("dseq_jepa_vit_b16.in1k")
    assert "| ImageNet-1k, linear probe | 72.4 | 73.5 | 73.5 | 73.8 | [TO BE MEASURED" in card
    assert "quoted from the paper, not measured here" in card
    assert "The paper has no figures for this size" in cards.dseq_card("dseq_jepa_vit_s16.in1k")


def test_blanks_are_found_and_filled_ones_are_not():
    assert cards.blanks("a [TO BE MEASURED: x, mean] b [TO BE STATED: y] c [1] [TO DO: z]") == [
        "[TO BE MEASURED: x, mean]",
        "[TO BE STATED: y]",
    ]


@pytest.mark.slow
def test_a_cards_own_code_runs(exported, run_python):
    """The usage of the card, word for word, with the folder in the place of the repository."""
    blocks = (exported / "README.md").read_text().split("```python\n")[2:]
    code = "\n".join(block.split("```")[0] for block in blocks)
    code = code.replace("hf-hub:<namespace>/dseq_jepa_vit_ti16.in1k", f"local-dir:{exported}")
    code = code.replace("<namespace>/dseq_jepa_vit_ti16.in1k", str(exported))
    prelude = "from PIL import Image; image = Image.new('RGB', (300, 400), 'teal')\n"
    after = """
import sys
assert patches.shape == (1, 192, 14, 14) and features.shape == (1, 192)
assert not any(name.startswith("timm_dseq") for name in sys.modules)
expected = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()(x)
print("difference", (features - expected).abs().max().item())
"""
    # the middle of the card loads `model` twice: patches are taken from timm's, so put transformers' aside
    code = code.replace("model = AutoModel", "auto = AutoModel").replace("features = model(**", "features = auto(**")
    run = run_python(prelude + code + after, str(exported))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 1e-4
