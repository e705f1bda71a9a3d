"""A setting of the wrong kind is one line that says which kinds it takes."""

import pytest
from common.pretraining import settings as pretraining
from common.probing import settings as probing
from common.tuning import settings as tuning

PARSERS = {"pretrain": pretraining.parser, "probe": probing.parser, "finetune": tuning.parser}


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("pretrain", "--optim.lr abc", "optim.lr takes a number above 0, not abc"),
        ("pretrain", "--data.workers -1", "data.workers takes a whole number, 0 or more or null, not -1"),
        ("pretrain", "--dry_run maybe", "dry_run takes true or false, not maybe"),
        (
            "pretrain",
            "--checkpoint.keep_every -3",
            "checkpoint.keep_every takes a whole number above 0 or null, not -3",
        ),
        ("pretrain", "--system.precision fp8", "system.precision takes one of auto, no, bf16, float64, not fp8"),
        ("pretrain", "--model.args 3", 'model.args takes a mapping, {"name": value}, not 3'),
        ("pretrain", "--optim.betas [1]", "optim.betas takes a list of 2, each a number, not [1]"),
        ("pretrain", "--data.crop_scale [2,3]", "data.crop_scale takes a list of 2, each a number from 0 to 1, not 2"),
        ("pretrain", "--optim 3", "optim is a section of settings: give those below it, as optim.epochs"),
        ("probe", "--seeds 3", "seeds takes a list, [a, b, …], each a whole number, 0 or more, not 3"),
        ("probe", "--seeds [a]", "seeds takes a list, [a, b, …], each a whole number, 0 or more, not a"),
        ("probe", "--views mean", "views takes a list, [a, b, …], each text, not mean"),
        ("finetune", "--optim.clip x", "optim.clip takes a number above 0 or null, not x"),
        ("finetune", "--recipe moe", "recipe takes one of mae, ijepa, not moe"),
        ("probe", "--protocoll knn", "there is no setting protocoll; did you mean protocol?"),
    ],
)
def test_a_mistake_is_one_line_in_words(capsys, script, words, line):
    needed = [] if script == "pretrain" else ["--model=x", "--data.path=y"]
    with pytest.raises(SystemExit) as end:
        PARSERS[script]().parse_args([*needed, *words.split()])
    assert end.value.code == 2 and capsys.readouterr().err == f"{script}.py: {line}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sed: 3", "there is no setting sed; did you mean seed?"),
        ("optim:\n  lrr: 3", "there is no setting optim.lrr; did you mean optim.lr?"),
        ("optim:\n  lr: abc", "optim.lr takes a number above 0, not abc"),
        ("optim: 3", "optim is a section of settings: give those below it, as optim.epochs"),
        ("data: [1]", "data is a section of settings: give those below it, as data.path"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_too(text, line, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        pretraining.parse([f"--config={tmp_path / 'settings.yaml'}"])
    assert end.value.code == 2 and capsys.readouterr().err == f"pretrain.py: {line}\n"
