"""The protocols that train heads: dseq, ijepa, dinov2 and attentive on fresh augmentations, their cached forms, vtab.

For each seed: train all heads of the recipe's grid, note which test images each gets right, score each on the images
that the choice is made on. Then the best head of each view, by its mean score over the seeds, is the result.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from timm_dseq import UserError

from ..data.order import Draw, sample_seed
from ..labels.subsets import holdout_mask
from ..run import checkpoints
from ..run.state import collect, restore
from .answers import Answers, answers_file, checkpoint_folder, load_answers, save_answers
from .feature_batches import LiveFeatures, StoredFeatures, Views
from .heads import RECIPES, TOKENS, Grid, HeadSpec, HeadTraining, Recipe
from .probe_run import ProbeResult, ProbeRun
from .settings import ON_FEATURES

HELD_OUT = 0.1  # of the training images, where the choice is not made on the test images
VTAB = 800, 200  # images to train on, and to choose the view on
_SHOWN_EVERY = 50  # steps; reading a loss makes the host wait for the device


def head_probe(probe: ProbeRun) -> list[ProbeResult]:
    """dseq, ijepa, dinov2, attentive and the cached forms: the best head of each view."""
    recipe = RECIPES[probe.config.protocol.removesuffix("-cached")]
    views = [TOKENS] if TOKENS in recipe.views else probe.views(*recipe.views)
    on_test = probe.config.heads.select_on == "test"
    answers = []
    for seed in probe.config.seeds:
        rows = probe.train_rows(seed)
        aside = holdout_mask(probe.data.train.truth[rows], HELD_OUT, seed).numpy()
        train, validation = (rows, None) if on_test else (rows[~aside], rows[aside])
        answers.append(answers_of(probe, recipe, views, seed, train, validation))
    heads, where = recipe.heads(views), "test" if on_test else f"{HELD_OUT:.0%} of train"
    return best_of_each_view(heads, answers, where if len(heads) > 1 else None)


def vtab(probe: ProbeRun) -> list[ProbeResult]:
    """VTAB-1k: 800 images to train on, 200 to choose the view on, drawn by the seed; all of the test split."""
    for seed in probe.config.seeds:
        if (images := len(probe.train_rows(seed))) < sum(VTAB):
            raise UserError(f"vtab takes {sum(VTAB)} training images, and {probe.config.data.path} has {images}.")
    recipe, answers = RECIPES["vtab"], []
    views = probe.views(*recipe.views)
    for seed in probe.config.seeds:
        rows = probe.train_rows(seed)
        generator = torch.Generator().manual_seed(sample_seed(seed, 0, Draw.VTAB))
        drawn = rows[torch.randperm(len(rows), generator=generator)[: sum(VTAB)].numpy()]
        train, validation = np.sort(drawn[: VTAB[0]]), np.sort(drawn[VTAB[0] :])
        answers.append(answers_of(probe, recipe, views, seed, train, validation))
    return best_of_each_view(recipe.heads(views), answers, f"{VTAB[1]} of train")[:1]


def answers_of(
    probe: ProbeRun, recipe: Recipe, views: list[str], seed: int, rows: np.ndarray, validation: np.ndarray | None
) -> Answers:
    """Train one seed's heads on these rows and test them; or read what they answered when they were trained before."""
    batch = probe.config.heads.batch_size or recipe.batch_size
    steps = recipe.length(len(rows), batch, probe.config.heads.epochs)
    training = HeadTraining(recipe, views, seed, rows, validation, batch, steps)
    folder, path = checkpoint_folder(probe, training), answers_file(probe, training)
    answers, main = load_answers(path, probe), probe.accelerator.is_main_process
    if answers is None:
        answers = train_and_test(probe, training, folder)
        if main:
            save_answers(path, answers)
    elif main:
        print(f"{probe.config.protocol}, seed {seed}: trained before, its answers are in {path}", flush=True)
    if main:
        shutil.rmtree(folder, ignore_errors=True)  # the heads' checkpoint is large, and not needed any more
    return answers


def train_and_test(probe: ProbeRun, training: HeadTraining, folder: Path) -> Answers:
    """Live features or stored ones, as the protocol says; the heads; and what they answer."""
    if probe.config.protocol in ON_FEATURES:
        train, test = probe.train_features(), probe.test_features()
        features = StoredFeatures(training, train, probe.accelerator.device)
    else:
        train, test = probe.data.train, probe.data.test
        features = LiveFeatures(training, train, probe)
    grid = train_heads(probe, training, features, folder)
    correct = correct_answers(probe, grid, features.tested(test), probe.data.test.truth)
    if training.validation is None:
        return Answers(correct, correct.double().mean(1))
    truth = probe.data.train.truth[training.validation]
    held_back = correct_answers(probe, grid, features.tested(train, training.validation), truth)
    return Answers(correct, held_back.double().mean(1))


def train_heads(probe: ProbeRun, training: HeadTraining, features: LiveFeatures | StoredFeatures, folder: Path) -> Grid:
    """Train all heads; the run resumes from the newest checkpoint in the folder if there is one."""
    accelerator, specs, steps = probe.accelerator, training.heads, training.steps
    widths = [features.width(spec.view) for spec in specs]
    grid = Grid(training.recipe, specs, widths, len(probe.data.names), training.seed).to(accelerator.device)
    newest, _ = checkpoints.newest(folder)
    accelerator.wait_for_everyone()
    done = 0
    if newest:
        saved = checkpoints.load(newest)
        restore(grid, grid.optimizer, saved.model, saved.optimizer)
        done = saved.state["step"]
    screen = probe.screen(steps, "step")
    screen.say(
        f"{probe.config.protocol}: {len(specs)} heads of {', '.join(training.views)}, {len(training.rows)} images, "
        f"{steps} steps of {training.batch}, seed {training.seed}" + (f", going on after step {done}" if done else "")
    )
    batches = features.batches(done)
    text = ""
    for step in range(done + 1, steps + 1):
        views, labels = next(batches)
        losses = grid.step(views, labels, (step - 1) / steps)
        if step % _SHOWN_EVERY == 0 or step == steps:
            finite = losses[losses.isfinite()]
            if not len(finite):
                raise UserError("the loss of no head is finite: check the weights, or use --precision no.")
            text = f"best loss {finite.min():.4f}"
        screen.show(step, text)
        if step % probe.config.heads.checkpoint_every == 0 or step == steps:
            model, moments = collect(grid, grid.optimizer, keep=accelerator.is_main_process)
            if accelerator.is_main_process:
                checkpoints.save(folder, step, checkpoints.Saved(model, moments, {"step": step}))
                checkpoints.prune(folder, 1, None)
            accelerator.wait_for_everyone()
    batches.close()
    screen.close()
    return grid


def correct_answers(
    probe: ProbeRun, grid: Grid, tested: Iterable[tuple[np.ndarray, Views]], truth: torch.Tensor
) -> torch.Tensor:
    """Which images each head classifies correctly, (H, n) bool. tested: in each process all images, or its share."""
    device = probe.accelerator.device
    correct = torch.zeros(len(grid.specs), len(truth), device=device)
    for places, views in tested:
        correct[:, places] = grid.correct(views, truth[places].to(device)).float()
    return probe.accelerator.reduce(correct, "sum").cpu() > 0


def best_of_each_view(heads: list[HeadSpec], answers: list[Answers], chosen_on: str | None) -> list[ProbeResult]:
    """Of each view the head with the highest mean score over the seeds; the best view first.

    chosen_on: the images that the scores are of, for the record.
    """
    scores = torch.stack([one.scores for one in answers]).mean(0)
    results = []
    for view in dict.fromkeys(head.view for head in heads):
        best = max((at for at, head in enumerate(heads) if head.view == view), key=lambda at: scores[at].item())
        settings = {"lr": heads[best].lr, "wd": heads[best].weight_decay}
        if chosen_on:
            settings["selected on"] = chosen_on
        results.append((scores[best].item(), ProbeResult(view, [one.correct[best] for one in answers], settings)))
    return [result for _, result in sorted(results, key=lambda pair: -pair[0])]
