"""The doors of the timm-dseq command to the recipes, from a checkout and from an installed package."""

import os
import subprocess
import sys

import pytest

from timm_dseq import recipes
from timm_dseq.cli import main

from .train import TRAIN


class Entered(Exception):
    """Instead of the recipe."""


@pytest.fixture
def entered(monkeypatch):
    """A function: a command line of timm-dseq → the words that the recipe is started with."""

    def execv(program, words):
        raise Entered(words)

    monkeypatch.setattr(os, "execv", execv)

    def entered(*words):
        with pytest.raises(Entered) as begun:
            main(words)
        python, program, *rest = begun.value.args[0]
        assert python == sys.executable and program == str(TRAIN / f"{words[0]}.py")
        return rest

    return entered


def test_every_program_in_train_has_a_door():
    assert {path.stem for path in TRAIN.glob("*.py")} == recipes.RECIPES.keys()
    assert recipes.FOLDER == TRAIN


def test_a_data_set_may_stand_first(entered):
    assert entered("probe", "cub", "--model", "x") == ["--data.path", "cub", "--model", "x"]
    assert entered("probe", "--model", "x") == ["--model", "x"]
    assert entered("table", "a.jsonl", "b.jsonl") == ["a.jsonl", "b.jsonl"]


def test_a_folder_to_pretrain_on_has_a_recipe_that_suits_it(entered):
    speedrun = TRAIN / "configs" / "speedrun.yaml"
    assert entered("pretrain", "photos") == [f"--config={speedrun}", "--data.path", "photos"] and speedrun.is_file()
    assert entered("pretrain", "photos", "--config", "x.yaml") == ["--data.path", "photos", "--config", "x.yaml"]
    assert entered("pretrain") == []  # the demo


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(recipes, "_NEEDED", ("json", "no_such_library"))
    with pytest.raises(SystemExit) as ended:
        main(["probe", "--help"])
    assert ended.value.code == "timm-dseq probe: no_such_library is not here: pip install 'timm-dseq[train]'"


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {recipe}" in said for recipe in recipes.RECIPES)


@pytest.mark.parametrize("module", [False, True], ids=["timm-dseq", "-m timm_dseq"])
def test_a_recipe_runs_and_its_exit_code_is_the_commands(module, tmp_path):
    if module:
        command = [sys.executable, "-m", "timm_dseq"]
    else:
        script = tmp_path / "timm-dseq"
        script.write_text("import sys\nfrom timm_dseq.cli import main\nsys.exit(main())\n")
        command = [sys.executable, script]
    environment = {**os.environ, "PYTHONPATH": str(TRAIN.parent)}
    done = subprocess.run([*command, "table", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "table.py" in done.stdout, done.stderr
    done = subprocess.run([*command, "probe", "--no-such"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "probe.py: there is no setting no_such; see --help\n"
