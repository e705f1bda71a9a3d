"""The text of Hub folders: config.json and the model card, made from timm's registry and the template card.md.

`python -m timm_dseq.hub.cards hub_configs` writes one folder for each model.tag. What only a measurement or the
publisher can supply is a blank, as [TO BE MEASURED: …]; `timm-dseq push` refuses a card that still has one.
"""

import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from huggingface_hub import ModelCardData

from ..dseq_jepa import ARCHITECTURES, IJEPA_LICENSE, META_TAG, STOCK, TAGS
from . import paper
from .stock import StockModel, registered

BLANK = re.compile(r"\[TO BE [A-Z]+: [^\]]*\]")
REPOSITORY = "<namespace>/{name}"  # in a card until push replaces it by the repository
_LICENSE_BLANK = "[TO BE STATED: licence]"

_DSEQ_PAPER = "[DSeq-JEPA](https://arxiv.org/abs/2511.17354) (He et al., ECCV 2026)"
_DSEQ_CITATION = """@inproceedings{he2026dseqjepa,
  title = {{DSeq-JEPA}: Discriminative Sequential Joint-Embedding Predictive Architecture},
  author = {Xiangteng He and Shunsuke Sakai and Shivam Chandhok and Sara Beery and Kun Yuan and Nicolas Padoy and
            Tatsuhito Hasegawa and Leonid Sigal},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year = {2026},
  note = {arXiv:2511.17354}
}"""
_IJEPA_CITATION = """@inproceedings{assran2023ijepa,
  title = {Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture},
  author = {Mahmoud Assran and Quentin Duval and Ishan Misra and Piotr Bojanowski and Pascal Vincent and
            Michael Rabbat and Yann LeCun and Nicolas Ballas},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023}
}"""

_METHODS = {
    "in1k": "trained by this project's code with the recipe of the paper",
    "in1k_official": "the weights the authors released with the paper, converted",
    "in1k_vicreg": "trained by this project's code with the paper's recipe and its contrastive term (C-JEPA's VICReg)",
    "in1k_ijepa": "its baseline, I-JEPA on the same ViT with a class token, trained by this project's code",
}

_DSEQ_IDEA = (
    "The method decides where an image is informative and in what order to predict its regions, and predicts each "
    "region's latents from the regions before it."
)
_IJEPA_IDEA = "I-JEPA predicts the latents of random blocks from one context block."
_ENCODERS = {  # which was taken of a checkpoint, as hub.convert says it
    "target": "This is the target encoder (the moving average)",
    "student": "This is the student encoder (the one that the gradients trained), not the target encoder",
    "lone student": "This is the student encoder (the one that the gradients trained): its checkpoint held no target "
    "encoder (the moving average)",
}


def blanks(card: str) -> list[str]:
    """The blanks that a card still has."""
    return BLANK.findall(card)


def config_text(config: dict) -> str:
    """config.json as it is written."""
    return json.dumps(config, indent=2) + "\n"


def license_of(tag: str) -> str:
    """The licence of the weights of one of our tags, as the Hub writes it."""
    return TAGS[tag].get("license", "apache-2.0") if tag in TAGS else "unknown"


def dseq_card(
    model_tag: str, stock: StockModel | None = None, license: str | None = None, encoder: str = "target"
) -> str:
    """The card of one of our model.tags, at its registered image size or that of `stock`.

    license: of the weights, as the Hub writes it, if not the tag's default. encoder: which of the checkpoint it is.
    """
    architecture, _, tag = model_tag.partition(".")
    stock = stock or registered(model_tag)
    if license is None and tag == "in1k_official":
        metadata, licence = {"license": "other", "license_name": "not-stated"}, _OFFICIAL_LICENCE
    else:
        metadata = {"license": license or "apache-2.0"}
        licence = f"{license or 'Apache-2.0'}. ImageNet-1k has its own terms of access."
    return _fill(
        model_tag,
        stock,
        method_tag="i-jepa" if tag == "in1k_ijepa" else "dseq-jepa",
        metadata=metadata,
        introduction=f"A self-supervised Vision Transformer of {_DSEQ_PAPER}: {_METHODS[tag]}. "
        f"{_IJEPA_IDEA if tag == 'in1k_ijepa' else _DSEQ_IDEA} {_ENCODERS[encoder]}, without a head.",
        with_package=_WITH_PACKAGE.format(name=model_tag, width=ARCHITECTURES[architecture]["embed_dim"]),
        training=_training(architecture, tag),
        results=_results(architecture, tag),
        licence=licence,
        citation=_IJEPA_CITATION + "\n\n" + _DSEQ_CITATION if tag == "in1k_ijepa" else _DSEQ_CITATION,
    )


def run_card(
    name: str, stock: StockModel, *, method: str, training: str, results: str, license: str | None = None
) -> str:
    """The card of an encoder that a user pretrained with this project's recipe. method: as in "I-JEPA", "DSeq-JEPA"."""
    return _fill(
        name,
        stock,
        method_tag="i-jepa" if method == "I-JEPA" else "dseq-jepa",
        metadata={"license": license or _LICENSE_BLANK},
        introduction=f"A self-supervised Vision Transformer, pretrained with {method} by the recipe of timm_dseq. "
        f"{_IJEPA_IDEA if method == 'I-JEPA' else _DSEQ_IDEA} {_ENCODERS['target']}, without a head.",
        with_package="",
        training=training,
        results=results,
        licence=license or _LICENSE_BLANK,
        citation=_IJEPA_CITATION + "\n\n" + _DSEQ_CITATION if method == "I-JEPA" else _DSEQ_CITATION,
    )


def ijepa_card(name: str, stock: StockModel, encoder: str = "target", crop_pct: float | None = None) -> str:
    """The card of Meta's I-JEPA weights, converted: a stock architecture and Meta's licence.

    Of the tag META_TAG it is known what they were trained on, and this package has a name for them. encoder: which of
    the checkpoint it is. crop_pct: in timm's words, if not that of our models.
    """
    data, with_package = "[TO BE STATED: the data set of this checkpoint, IN1k or IN22k]", ""
    if name.endswith(f".{META_TAG}"):
        ours = next(ours for ours, theirs in STOCK.items() if theirs == stock.architecture)
        data = "ImageNet-1k"
        with_package = _WITH_PACKAGE.format(name=f"{ours}.{META_TAG}", width=stock.blueprint.embed_dim)
    return _fill(
        name,
        stock,
        method_tag="i-jepa",
        metadata={"license": IJEPA_LICENSE},
        introduction="A self-supervised Vision Transformer of [I-JEPA](https://arxiv.org/abs/2301.08243) (Assran et "
        f"al., CVPR 2023), converted from Meta's release. {_ENCODERS[encoder]}; it has no class token.",
        crop_pct=crop_pct,
        with_package=with_package,
        training=f"Pretrained by Meta with I-JEPA, on {data}; see the paper for the recipe.",
        results=f"| task | these weights |\n|---|---|\n| ImageNet-1k, linear | {_measure('linear probe')} |",
        licence="CC-BY-NC-4.0, as Meta's release: attribution, no commercial use.",
        citation=_IJEPA_CITATION,
    )


def other_card(name: str, stock: StockModel, license: str | None) -> str:
    """The card of any other ViT: what its file does not say is a blank for the publisher."""
    return _fill(
        name,
        stock,
        method_tag="vision-transformer",
        metadata={"license": license or _LICENSE_BLANK},
        introduction="A Vision Transformer converted from a checkpoint of timm: [TO BE STATED: where it comes from].",
        with_package="",
        training="[TO BE STATED: training data and recipe]",
        results="[TO BE MEASURED: results, with their spread over seeds]",
        licence=license or _LICENSE_BLANK,
        citation="[TO BE STATED: what to cite]",
    )


_WITH_PACKAGE = """### timm with timm_dseq

```python
import timm_dseq  # first: it registers the names below
import timm

model = timm.create_model("{name}", pretrained=True)  # features, (B, {width})
model = timm.create_model("{name}", pretrained=True, num_classes=10)  # with a new head, to fine-tune
```

"""
_OFFICIAL_LICENCE = """The authors' code is under the MIT licence; for the weights no licence is stated.
[TO BE STATED: the licence, or the authors' permission, under which this copy is published]"""


def _fill(
    name: str,
    stock: StockModel,
    *,
    method_tag: str,
    metadata: dict[str, str],
    crop_pct: float | None = None,
    **sections: str,
) -> str:
    """The template, filled in. metadata: the licence, as the Hub's front matter wants it."""
    model, config = stock.blueprint, stock.config("", "")
    height, width = stock.img_size
    grid = model.patch_embed.grid_size
    resize = int(min(height, width) / (crop_pct or config["pretrained_cfg"]["crop_pct"]))
    template = Template((files(__package__) / "card.md").read_text(encoding="utf-8"))
    front_matter = ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", "image-feature-extraction", "self-supervised-learning", method_tag],
        **metadata,
    )
    return template.substitute(
        front_matter=front_matter.to_yaml(),
        name=name,
        repository=REPOSITORY.format(name=name),
        stock=stock.architecture,
        model_args=", ".join(f"`{key}={value!r}`" for key, value in config["model_args"].items()),
        architecture=f"ViT, patch {'×'.join(map(str, model.patch_embed.patch_size))}, {len(model.blocks)} blocks, "
        f"width {model.embed_dim}, {model.blocks[0].attn.num_heads} heads",
        details=f"- **Parameters:** {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        image=f"{stock.in_chans} × {height} × {width}",
        crop=f"{height} × {width}",
        resize=str(resize),
        width=str(model.embed_dim),
        patches=f"(1, {model.embed_dim}, {grid[0]}, {grid[1]}) as (B, C, h, w)",
        **sections,
    )


def _training(architecture: str, tag: str) -> str:
    epochs = 300 if architecture == "dseq_jepa_vit_h16_448" else 600
    in_paper = architecture in paper.RESULTS or architecture == "dseq_jepa_vit_l16"
    data = "ImageNet-1k (ILSVRC-2012, 1,281,167 training images), labels unused."
    if tag == "in1k_official":
        return f"{data} Trained by the authors of the paper; their recipe is in the paper."
    whose = "the paper's" if in_paper else "the paper's for ViT-B/16 (the paper does not train this size)"
    objective = {
        "in1k": "DSeq-JEPA, 5 regions, lambda 0 → 1 linear",
        "in1k_vicreg": "DSeq-JEPA, 5 regions, lambda 0 → 1 linear, + VICReg (25, 25, 1) × 0.001",
        "in1k_ijepa": "I-JEPA, 1 context and 4 target blocks",
    }[tag]
    return f"""{data} Recipe, {whose}:

| | |
|---|---|
| objective | {objective} |
| optimiser | AdamW, batch 2048, {epochs} epochs |
| learning rate | 1e-4 → 1e-3 over 15 epochs, cosine → 1e-6 |
| weight decay | 0.04 → 0.4 cosine; none on biases, norms and the class token |
| target encoder | moving average, 0.996 → 1.0 linear |
| augmentation | RandomResizedCrop, scale 0.3–1.0; no flip, no colour |

What this run did differently, its commit and its cost: [TO BE STATED: deviations, commit, hardware and hours]"""


def _results(architecture: str, tag: str) -> str:
    if architecture not in paper.RESULTS:
        return f"""The paper has no figures for this size.

| task | these weights |
|---|---|
| ImageNet-1k, linear probe, top-1 | {_measure("ImageNet-1k linear probe")} |
| ImageNet-1k, kNN (k = 20), top-1 | {_measure("ImageNet-1k kNN")} |"""
    results = paper.RESULTS[architecture]
    methods = paper.METHODS[: len(next(iter(results.values())))]
    header = " | ".join(f"{method} (paper)" for method in methods)
    rows = [f"| {task} | {' | '.join(figures)} | {_measure(task)} |" for task, figures in results.items()]
    return f"""Columns marked "paper" are quoted from the paper, not measured here. It reports one spread, ±0.4 over 3
seeds: a difference of a point needs several seeds to be believed.

| task | {header} | these weights |
|---|{"---|" * (len(methods) + 1)}
""" + "\n".join(rows)


def _measure(task: str) -> str:
    return f"[TO BE MEASURED: {task}, mean ± standard deviation over seeds]"


def write_hub_configs(folder: Path) -> None:
    """Write config.json and README.md of every model.tag below `folder`."""
    for architecture in ARCHITECTURES:
        for tag in TAGS:
            name = f"{architecture}.{tag}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            config = registered(name).config(tag, license_of(tag))
            (folder / name / "config.json").write_text(config_text(config), encoding="utf-8")
            (folder / name / "README.md").write_text(dseq_card(name), encoding="utf-8")


if __name__ == "__main__":
    write_hub_configs(Path(sys.argv[1]))
