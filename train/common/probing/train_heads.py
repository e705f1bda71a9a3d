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

from ..data.digests import data_digest
from ..data.order import Draw, sample_seed
from ..labels.subsets import holdout_mask, select_rows
from ..run import checkpoints
from ..run.results import Measured
from ..run.state import collect, restore
from .answers import Answers, Rows, answers_file, key_of, load_answers, save_answers
from .feeds import Live, Stored, Views
from .heads import RECIPES, TOKENS, Grid, Head, Recipe
from .settings import ON_FEATURES
from .task import Task

HELD_OUT = 0.1  # of the training images, where the choice is not made on the test images
VTAB = 800, 200  # images to train on, and to choose the view on
_SHOWN_EVERY = 50  # steps; reading a loss makes the host wait for the device


def trained(task: Task) -> list[Measured]:
    """dseq, ijepa, dinov2, attentive and the cached forms: the best head of each view."""
    recipe = RECIPES[task.config.protocol.removesuffix("-cached")]
    views = [TOKENS] if TOKENS in recipe.views else task.views(*recipe.views)
    on_test = task.config.heads.select_on == "test"
    answers = []
    for seed in task.config.seeds:
        rows = task.learnt(seed)
        aside = holdout_mask(task.data.train.truth[rows], HELD_OUT, seed).numpy()
        part = Rows(rows, None) if on_test else Rows(rows[~aside], rows[aside])
        answers.append(answers_of(task, recipe, views, part, seed))
    where = "test" if on_test else f"{HELD_OUT:.0%} of train"
    heads = recipe.heads(views)
    return best_of_each_view(heads, answers, where if len(heads) > 1 else None)


def vtab(task: Task) -> list[Measured]:
    """VTAB-1k: 800 images to train on, 200 to choose the view on, drawn by the seed; all of the test split."""
    recipe, answers = RECIPES["vtab"], []
    for seed in task.config.seeds:
        if (images := len(task.learnt(seed))) < sum(VTAB):
            raise UserError(f"vtab takes {sum(VTAB)} training images, and {task.config.data.path} has {images}.")
    views = task.views(*recipe.views)
    for seed in task.config.seeds:
        rows = task.learnt(seed)
        generator = torch.Generator().manual_seed(sample_seed(seed, 0, Draw.VTAB))
        drawn = rows[torch.randperm(len(rows), generator=generator)[: sum(VTAB)].numpy()]
        part = Rows(np.sort(drawn[: VTAB[0]]), np.sort(drawn[VTAB[0] :]))
        answers.append(answers_of(task, recipe, views, part, seed))
    return best_of_each_view(recipe.heads(views), answers, f"{VTAB[1]} of train")[:1]


def answers_of(task: Task, recipe: Recipe, views: list[str], rows: Rows, seed: int) -> Answers:
    """Train all heads for one seed and let them answer; or read what they answered when they were trained before."""
    batch = task.config.heads.batch_size or recipe.batch_size
    steps = recipe.length(len(rows.train), batch, task.config.heads.epochs)
    key = _heads_key(task, views, len(rows.train), batch, steps, seed)
    path, checkpoint = answers_file(task, key, rows), Path(task.config.output_dir) / key
    answers = load_answers(path, task)
    if answers is None:
        answers = _trained_answers(task, recipe, views, rows, seed, batch, steps, checkpoint)
        if task.accelerator.is_main_process:
            save_answers(path, answers)
    else:
        task.screen(0, "step").say(f"{task.config.protocol}, seed {seed}: trained before, answers kept in {path}")
    if task.accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)  # the heads are large, and nobody asks them again
    return answers


def _trained_answers(
    task: Task, recipe: Recipe, views: list[str], rows: Rows, seed: int, batch: int, steps: int, checkpoint: Path
) -> Answers:
    if task.config.protocol in ON_FEATURES:
        train, test = task.train_features(), task.test_features()
        feed = Stored(train, rows.train, views, seed, batch, task.accelerator.device)
    else:
        train, test = task.data.train, task.data.test
        feed = Live(task, select_rows(train, torch.from_numpy(rows.train)), views, seed, batch)
    grid = fit(task, recipe, feed, steps, seed, checkpoint)
    correct = judge(task, grid, feed.judged(test), task.data.test.truth)
    if rows.validation is None:
        return Answers(correct, correct.double().mean(1))
    held_back = judge(task, grid, feed.judged(train, rows.validation), task.data.train.truth[rows.validation])
    return Answers(correct, held_back.double().mean(1))


def fit(task: Task, recipe: Recipe, feed: Live | Stored, steps: int, seed: int, folder: Path) -> Grid:
    """Train all heads, from the newest checkpoint in the folder on if there is one."""
    accelerator, classes = task.accelerator, len(task.data.names)
    specs = recipe.heads(feed.views)
    grid = Grid(recipe, specs, [feed.width(spec.view) for spec in specs], classes, seed).to(accelerator.device)
    newest, _ = checkpoints.newest(folder)
    accelerator.wait_for_everyone()
    done = 0
    if newest:
        saved = checkpoints.load(newest)
        restore(grid, grid.optimizer, saved.model, saved.optimizer)
        done = saved.state["step"]
    screen = task.screen(steps, "step")
    screen.say(
        f"{task.config.protocol}: {len(specs)} heads of {', '.join(feed.views)}, {feed.images} images, {steps} steps "
        f"of {feed.batch}, seed {seed}" + (f", going on after step {done}" if done else "")
    )
    batches = feed.batches(done)
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
        if step % task.config.heads.checkpoint_every == 0 or step == steps:
            model, moments = collect(grid, grid.optimizer, keep=accelerator.is_main_process)
            if accelerator.is_main_process:
                checkpoints.save(folder, step, checkpoints.Saved(model, moments, {"step": step}))
                checkpoints.prune(folder, 1, None)
            accelerator.wait_for_everyone()
    batches.close()
    screen.close()
    return grid


def judge(task: Task, grid: Grid, tested: Iterable[tuple[np.ndarray, Views]], labels: torch.Tensor) -> torch.Tensor:
    """Which images each head gets right, (H, n) bool. A process is given all of them or its share."""
    device = task.accelerator.device
    right = torch.zeros(len(grid.specs), len(labels), device=device)
    for indices, views in tested:
        right[:, indices] = grid.right(views, labels[indices].to(device)).float()
    return task.accelerator.reduce(right, "sum").cpu() > 0


def best_of_each_view(heads: list[Head], answers: list[Answers], chosen_on: str | None) -> list[Measured]:
    """Of each view the head with the highest mean score over seeds; the best view first."""
    scores = torch.stack([one.scores for one in answers]).mean(0)
    found = []
    for view in dict.fromkeys(head.view for head in heads):
        own = [at for at, head in enumerate(heads) if head.view == view]
        best = max(own, key=lambda at: scores[at].item())
        settings = {"lr": heads[best].lr, "wd": heads[best].weight_decay}
        if chosen_on:
            settings["selected on"] = chosen_on
        found.append((scores[best].item(), Measured(view, [one.correct[best] for one in answers], settings)))
    return [measured for _, measured in sorted(found, key=lambda pair: -pair[0])]


def _heads_key(task: Task, views: list[str], images: int, batch: int, steps: int, seed: int) -> str:
    """A run in a few digits: two that share them are the same."""
    config, train = task.config, task.data.train
    return key_of(
        *(config.protocol, task.weights, data_digest(train), train.label, config.data.subset, task.preprocessing),
        *(config.precision, config.cache.dtype, views, images, batch, steps, seed),
    )
