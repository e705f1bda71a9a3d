"""Settings of fine-tuning: recipes are defaults, short forms are understood, and mistakes are one line."""

import pytest
import yaml
from common.pretraining import settings as pretraining
from common.run.length import Length
from common.tuning.settings import RECIPES, fitted, parse, parser

from timm_dseq import UserError

GIVEN = ["--model", "vit_base_patch16_224", "--data=cub"]


def test_a_recipe_is_what_is_taken_where_nothing_is_given():
    mae, ijepa = parse(GIVEN)[0], parse([*GIVEN, "--recipe=ijepa", "--optim.layer_decay=0.6"])[0]
    assert (mae.model, mae.data.path, mae.recipe) == ("vit_base_patch16_224", "cub", "mae")
    optim, augment = mae.optim, mae.augment
    # He et al. (2022), fine-tuning of ViT-B
    assert (optim.batch_size, optim.epochs, optim.warmup_epochs, optim.base_lr) == (1024, 100, 5, 5e-4)
    assert (optim.layer_decay, optim.weight_decay, optim.drop_path, optim.betas) == (0.65, 0.05, 0.1, (0.9, 0.999))
    assert (augment.mixup, augment.cutmix, augment.erasing, augment.smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert augment.rand_augment == "rand-m9-mstd0.5-inc1"
    # Assran et al. (2023), 1 % of ImageNet
    assert (ijepa.optim.batch_size, ijepa.optim.epochs) == (512, 50)
    assert ijepa.optim.base_lr * ijepa.optim.batch_size / 256 == pytest.approx(3e-5)
    assert (ijepa.augment.mixup, ijepa.augment.cutmix, ijepa.augment.erasing, ijepa.optim.drop_path) == (0, 0, 0, 0)
    assert (ijepa.augment.smoothing, ijepa.augment.rand_augment) == (0.1, "rand-m9-mstd0.5-inc1")
    assert ijepa.optim.layer_decay == 0.6  # the command line wins


def test_a_recipe_named_in_a_file_is_taken_too_and_saved_settings_make_the_same_run(tmp_path):
    (tmp_path / "a.yaml").write_text("recipe: ijepa\nmodel: m\ndata: {path: d}\noptim: {epochs: 7}\n")
    config, text = parse([f"--config={tmp_path / 'a.yaml'}"])
    assert (config.optim.epochs, config.optim.batch_size) == (7, 512)
    (tmp_path / "b.yaml").write_text(text)
    assert parse([f"--config={tmp_path / 'b.yaml'}"])[0] == config
    assert yaml.safe_load(text)["optim"]["batch_size"] == 512


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--augment.crop_scale=[0.5,0.2]"], "least share"),
        (["--optim.warmup_epochs=100"], "leaves nothing of optim.epochs=100"),
        (["--seeds=[]"], "give one or more"),
        (["--seeds=[1,1]"], "each once"),
        (["--max_steps=3", "--dry-run"], "leave max_steps out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(mistake, says):
    with pytest.raises(UserError, match=says):
        parse([*GIVEN, *mistake])


@pytest.mark.parametrize(
    ("images", "words", "batch", "warmup"),
    [
        (1_281_167, [], 1024, 5),  # what the recipe is for
        (1_281_167, ["--recipe=ijepa"], 512, 5),
        (9_469, [], 256, 5),
        (150, [], 8, 5),
        (6, [], 6, 5),
        (150, ["--optim.epochs=3"], 8, 0.15),
        (150, ["--optim.epochs=10"], 8, 5),  # half of a run may be what was meant
        (150, ["--optim.epochs=3", "--optim.warmup_epochs=1"], 8, 1),
        (150, ["--optim.batch_size=64"], 64, 5),  # what was asked for
        (150, ["--optim.accumulation=3"], 6, 5),
        (3, ["--augment.mixup=0", "--augment.cutmix=0"], 3, 5),
    ],
)
def test_batch_and_warm_up_follow_the_images_and_epochs_where_they_are_the_recipes(images, words, batch, warmup):
    config, said = fitted(parse([*GIVEN, *words])[0], images, 1)
    assert (config.optim.batch_size, config.optim.warmup_epochs) == (batch, warmup)
    assert len(said) == (batch not in (1024, 512, 64)) + (warmup == 0.15)
    assert all(line.startswith("optim.") and "\n" not in line for line in said)
    Length.of(config.optim, images, 1, pairs=not words or "mixup" not in words[0])


@pytest.mark.parametrize("words", [["--dry-run"], ["--dry_run"], ["--dry-run", "true"], ["--dry_run=true"]])
def test_a_dry_run_is_asked_for_in_any_form(words):
    assert parse([*GIVEN, *words])[0].dry_run and not parse([*GIVEN, "--dry_run", "false"])[0].dry_run
    assert pretraining.parse(words)[0].dry_run and not pretraining.parse(["--dry_run", "false"])[0].dry_run


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(
        UserError, match=r"optim\.batch_size=1024 is more than the 30 images of the data set: give less"
    ):
        Length.of(parse(GIVEN)[0].optim, 30, 1)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--optim.lr=1"], "there is no setting optim.lr; did you mean"),
        (["--recipe=mea"], "recipe"),
        (["--optim.ema=2"], "optim.ema"),
    ],
)
def test_a_misspelt_setting_is_named(mistake, says, capsys):
    with pytest.raises(SystemExit) as exit:
        parse([*GIVEN, *mistake])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "mixing", "take"),
    [(30, 4, 2, True, 32), (30, 1, 2, True, 32), (30, 1, 2, False, None), (9, 3, 2, False, 12), (12, 3, 2, True, None)],
)
def test_a_batch_that_cannot_be_dealt_is_refused_with_one_that_can(batch, accumulation, processes, mixing, take):
    words = [f"--optim.batch_size={batch}", f"--optim.accumulation={accumulation}"]
    words += [] if mixing else ["--recipe=ijepa"]
    config = parse([*GIVEN, *words])[0]
    if take is None:
        assert Length.of(config.optim, 100, processes, pairs=mixing).batch == batch
        return
    with pytest.raises(UserError, match=f"take {take}") as error:
        Length.of(config.optim, 100, processes, pairs=mixing)
    assert take % (accumulation * processes * (2 if mixing else 1)) == 0
    assert "\n" not in str(error.value)


def test_help_shows_every_setting_and_the_recipes_defaults(capsys):
    for recipe in RECIPES:
        with pytest.raises(SystemExit):
            parser(recipe).parse_args(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for name in ("model", "data.path", "optim.ema", "augment.mixup", "checkpoint.every", "eval_every"):
            assert f"--{name} " in text
        assert f"default: {512 if recipe == 'ijepa' else 1024})" in text.split(" --optim.batch_size ")[1]
