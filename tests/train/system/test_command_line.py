"""A setting of the wrong kind is one line that says which kinds it takes."""

import os

import pytest
from common.pretraining import settings as pretraining
from common.probing import settings as probing
from common.tuning import settings as tuning

PARSERS = {"pretrain": pretraining.parser, "probe": probing.parser, "finetune": tuning.parser}


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("pretrain", "--optim.lr abc", "optim.lr takes a number above 0, not abc"),
        ("pretrain", "--data.workers -1", "data.workers takes a whole number from 0 to 1000 or null, not -1"),
        ("pretrain", "--dry_run maybe", "dry_run takes true or false, not maybe"),
        (
            "pretrain",
            "--checkpoint.keep_every -3",
            "checkpoint.keep_every takes a whole number above 0 or null, not -3",
        ),
        ("pretrain", "--system.precision fp8", "system.precision takes one of auto, no, bf16, float64, not fp8"),
        ("pretrain", "--model.args 3", 'model.args takes a mapping, {"name": value}, not 3'),
        ("pretrain", "--optim.betas [1]", "optim.betas takes a list of 2, each a number from 0 to below 1, not [1]"),
        ("pretrain", "--data.crop_scale [2,3]", "data.crop_scale takes a list of 2, each a number from 0 to 1, not 2"),
        ("pretrain", "--optim 3", "optim is a section of settings: give those below it, as optim.epochs"),
        ("probe", "--seeds 3", "seeds takes a list, [a, b, …], each a whole number from 0 to 2^63 - 1, not 3"),
        ("probe", "--seeds [a]", "seeds takes a list, [a, b, …], each a whole number from 0 to 2^63 - 1, not a"),
        ("probe", "--views mean", "views takes a list, [a, b, …], each text, not mean"),
        ("finetune", "--optim.clip x", "optim.clip takes a number above 0 or null, not x"),
        ("finetune", "--recipe moe", "recipe takes one of mae, ijepa, not moe"),
        ("pretrain", "photos", "photos belongs to no setting: is it the data set, --data photos?"),
        ("pretrain", "--minutes 1e12", "minutes takes a number above 0 or null, not 1000000000000.0"),
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


FILES = {
    "a key twice": (b"optim: {lr: 1e-3, lr: 2e-3}", "line 1: this is no YAML (lr is given twice)"),
    "a section twice": (b"seed: 1\nseed: 2", "line 2: this is no YAML (seed is given twice)"),
    "an alias of itself": (b"optim: &a {x: *a}", "line 1: this is no YAML (write out what *aliases* stand for)"),
    "aliases that multiply": (b"a: &a [1, 1]\nb: &b [*a, *a]", "line 2: this is no YAML (write out"),
    "thousands of digits": (b"seed: " + b"9" * 5000, "holds what cannot be read as settings (Exceeds the limit"),
    "brackets without end": (b"seed: " + b"[" * 100_000, "holds what cannot be read as settings (maximum recursion"),
    "bytes": (b"\xff\x00\x01", "cannot be read (no UTF-8)"),
    "UTF-16": ("seed: 1".encode("utf-16"), "cannot be read (no UTF-8)"),
    "Latin-1": ("output_dir: läufe".encode("latin-1"), "cannot be read (no UTF-8)"),
    "a control letter": (b"seed: \x01", "this is no YAML"),
    "a tag that makes an object": (b"seed: !!python/object/apply:os.system ['true']", "this is no YAML (could not"),
    "more than settings ever need": (b"#" * (2**20 + 1), "is no file of settings"),
    "a list": (b"[1, 2]", "holds no settings"),
    "a number": (b"7", "holds no settings"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_file_of_settings_is_named_in_one_line(case, tmp_path, capsys):
    content, says = FILES[case]
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        pretraining.parse([f"--config={file}"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"pretrain.py: --config {file}") and says in said, said
    assert said.count("\n") == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_a_place_that_is_no_file_is_not_waited_for(make, tmp_path, capsys):
    make(tmp_path / "settings.yaml")
    with pytest.raises(SystemExit):
        pretraining.parse([f"--config={tmp_path / 'settings.yaml'}"])
    assert "is no file of settings" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--output_dir=", "--data.path= ", "--model.init=", "--hub.push_to=", "--resume="])
def test_an_empty_word_is_no_value(word, capsys):
    with pytest.raises(SystemExit) as end:
        pretraining.parse([word])
    name = word.strip("-= ")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"pretrain.py: {name} is empty: leave it out, or give it a value\n"


def test_a_letter_that_cannot_be_printed_is_shown_as_what_it_is(capsys):
    with pytest.raises(SystemExit):
        pretraining.parse(["--data.path=a\nb"])
    assert capsys.readouterr().err == (
        "pretrain.py: data.path='a\\nb' holds letters that cannot be printed: write it anew\n"
    )


def test_settings_are_found_with_dashes_and_by_short_names(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("seed: 3")
    words = ["--max-steps=3", "--watch.probe-every", "5", "--model=test_vit", "--init", "a-b", "--data", "c-d"]
    config, _ = pretraining.parse([f"--config={own}", *words])
    assert (config.seed, config.max_steps, config.watch.probe_every) == (3, 3, 5)
    assert (config.model.name, config.model.init, config.data.path) == ("test_vit", "a-b", "c-d")


def test_files_of_this_project_are_named_in_short_and_others_come_first(tmp_path, monkeypatch):
    config, _ = pretraining.parse(["--config=speedrun", "--config=presets/paper"])
    assert config.model.min_area == 0.15 and config.model.img_size == 128
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speedrun").write_text("seed: 3")
    assert pretraining.parse(["--config", "speedrun"])[0].seed == 3
