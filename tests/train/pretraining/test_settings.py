"""Settings come from files and options, later ones win, and a mistake is named with its mend."""

import json

import pytest
import yaml
from common.pretraining.model import build
from common.pretraining.settings import Config, parse, parser

from timm_dseq import UserError

from .. import TRAIN

CONFIGS = sorted((TRAIN / "configs").rglob("*.yaml"))


def test_options_win_over_files_and_later_files_over_earlier(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\noptim:\n  lr: 0.5\n  batch_size: 32\n")
    second.write_text("optim:\n  lr: 0.25\n")
    config, text = parse([f"--config={first}", f"--config={second}", "--optim.batch_size", "16", "--data.path=x"])
    assert (config.seed, config.optim.lr, config.optim.batch_size, config.data.path) == (1, 0.25, 16, "x")
    assert yaml.safe_load(text)["optim"]["lr"] == 0.25
    assert config.optim.momentum == Config().optim.momentum  # not the small run's


def test_the_saved_settings_make_the_same_run(tmp_path):
    config, text = parse(["--model.args", '{"depth": 2}', "--watch.trackers=[tensorboard]", "--optim.clip=1"])
    (tmp_path / "config.yaml").write_text(text)
    assert parse([f"--config={tmp_path / 'config.yaml'}"])[0] == config


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--data.pth", "x"], "no setting data.pth; did you mean data.path?"),
        (["--batch_size=3"], "no setting batch_size; did you mean optim.batch_size?"),
        (["--config={file}"], "no setting optim.learning_rte; did you mean"),
        (["--optim.lr=abc"], "optim.lr"),
        (["--model.objective=dseqs"], "model.objective"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_misspelt_setting_is_named_with_what_was_meant(mistake, says, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("optim:\n  learning_rte: 3\n")
    with pytest.raises(SystemExit) as exit:
        parse([word.format(file=file) for word in mistake])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b\n", "holds no settings"),
        ("optim:\n  lr: [1\nmodel: 2\n", "line 3: this is no YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(content, says, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words in ([f"--config={file}"], ["--config", str(file)]):
        with pytest.raises(SystemExit) as exit:
            parse(words)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and f"--config {file}" in error and says in error and error.count("\n") == 1


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    config, _ = parse([f"--config={tmp_path / 'empty.yaml'}", "--optim.lr=0.5"])
    assert config.optim.lr == 0.5 and config.model.name == Config().model.name


@pytest.mark.parametrize("way", ["a file", "a file of a section", "an option", "inside a list"])
def test_settings_are_plain_data_and_nothing_in_them_is_imported_or_called(way, tmp_path, monkeypatch, capsys):
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    call = {"class_path": "foreign.X", "init_args": {}}
    args = {"norm_layer": [call] if way == "inside a list" else call}
    tree = {"args": args} if way == "a file of a section" else {"model": {"args": args}}
    (tmp_path / "settings.yaml").write_text(json.dumps(tree))
    words = {"an option": [f"--model.args={json.dumps(args)}"], "a file of a section": ["--model=settings.yaml"]}
    try:
        config, _ = parse(words.get(way, ["--config=settings.yaml"]))
        if way == "a file of a section":  # --model is the model's name
            assert config.model.name == "settings.yaml" and "norm_layer" not in config.model.args
        else:
            assert way == "an option" and isinstance(config.model.args["norm_layer"], str)  # which builds no model
    except SystemExit as exit:
        assert exit.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [3, 0.5, True, None, "jax", [96, 128]])
def test_arguments_of_a_model_keep_their_types(value, tmp_path):
    (tmp_path / "settings.yaml").write_text(json.dumps({"model": {"args": {"x": value}}}))
    found = parse([f"--config={tmp_path / 'settings.yaml'}"])[0].model.args["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--model.objective=views"], "at least two views"),
        (["--model.views=1"], "at least two views"),
        (["--optim.accumulation=3"], "no multiple of optim.accumulation=3"),
        (["--data.crop_scale=[0.5,0.2]"], "least share"),
        (["--model.flat=true", "--model.objective=dseq_causal"], "exclude each other"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(mistake, says):
    with pytest.raises(UserError, match=says):
        parse(mistake)


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group, settings in vars(Config()).items():
        for name, value in vars(settings).items() if hasattr(settings, "__dict__") else [(None, settings)]:
            option = f"--{group}.{name}" if name else f"--{group}"
            assert f"{option} " in text
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert f"default: {value})" in text.split(f" {option} ", 1)[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(TRAIN)))
def test_every_file_of_settings_is_understood(path):
    config, _ = parse([f"--config={path}"])
    for group, settings in yaml.safe_load(path.read_text()).items():
        for name, value in settings.items() if isinstance(settings, dict) else [(None, settings)]:
            found = getattr(getattr(config, group), name) if name else getattr(config, group)
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_without_a_file_the_small_run_is_taken_and_with_one_the_papers():
    assert parse([])[0].data.path == "scenes"
    paper = parse([f"--config={TRAIN / 'configs' / 'vit_b16_in1k.yaml'}"])[0]
    assert (paper.model, paper.optim) == (Config().model.__class__(predictor_depth=6), Config().optim)


def test_a_grid_too_small_for_blocks_is_told_before_anything_runs():
    config, _ = parse(["--model.img_size=48"])
    with pytest.raises(UserError, match=r"model\.img_size=48: 3×3 patches are too few for blocks"):
        build(config)


def test_terms_are_named_with_their_factors():
    tiny = ["--model.img_size=48", '--model.args={"patch_size": 8, "depth": 1}', "--model.predictor_depth=1"]
    config, _ = parse([*tiny, "--model.terms.contrastive=0.5"])
    assert build(config).terms == config.model.terms == {"contrastive": 0.5}
    config, _ = parse([*tiny, "--model.contrastive=true"])
    assert build(config).terms == {"contrastive": 1.0}
    with pytest.raises(UserError, match="terms: 'vicreg' is unknown: choose from contrastive"):
        build(parse([*tiny, "--model.terms.vicreg=1"])[0])


def test_the_recommended_preset_is_what_the_shipped_weights_were_trained_with():
    """Settings files do not include each other: these are kept equal here. Length, model and batch are the run's."""
    preset = yaml.safe_load((TRAIN / "configs" / "presets" / "recommended.yaml").read_text())
    speedrun = yaml.safe_load((TRAIN / "configs" / "speedrun.yaml").read_text())
    shipped = TRAIN.parent / "docs" / "runs" / "dseq_jepa_vit_ti16.photos65k" / "config.yaml"
    shipped = yaml.safe_load(shipped.read_text())
    for section, settings in preset.items():
        for name, value in settings.items():
            assert speedrun[section][name] == value == shipped[section][name], name
