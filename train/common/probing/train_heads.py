"""The protocols that train heads: the published ones on fresh augmentations, their cached forms, and VTAB's."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from timm_dseq import UserError

from ..data.digests import data_digest
from ..data.order import Draw, sample_seed
from ..labels.labelled import held_out, taken
from ..run import checkpoints
from ..run.results import Measured
from ..run.state import collect, restore
from .feeds import Live, Stored, Views
from .heads import RECIPES, TOKENS, Grid, Head, Recipe
from .task import Task

HELD_OUT = 0.1
VTAB = 800, 200  # images that are learnt from, and that the choice is made on
_LOOK = 50  # steps between looks at the losses


def trained(task: Task) -> list[Measured]:
    """dseq, ijepa, dinov2, attentive and the cached forms: the best head of each view."""
    name, cached = task.config.protocol.removesuffix("-cached"), task.config.protocol.endswith("-cached")
    recipe = RECIPES[name]
    batch = task.config.heads.batch_size or recipe.batch_size
    views = [TOKENS] if TOKENS in recipe.views else task.views(*recipe.views)
    on_test = task.config.heads.select_on == "test"
    rights, scores = [], []
    for seed in task.config.seeds:
        rows = task.learnt(seed)
        aside = held_out(task.data.train.truth[rows], HELD_OUT, seed).numpy()
        kept = rows if on_test else rows[~aside]
        if cached:
            train, test = task.train_features(), task.test_features()
            feed = Stored(train, kept, views, seed, batch, task.accelerator.device)
        else:
            feed = Live(task, taken(task.data.train, torch.from_numpy(kept)), views, seed, batch)
        grid = fit(task, recipe, feed, seed)
        if cached:
            right = judge(task, grid, feed.judged(test, np.arange(len(test.rows))), test.labels, shared=False)
        else:
            right = judge(task, grid, feed.judged(task.data.test), task.data.test.truth)
        rights.append(right)
        if on_test:
            scores.append(right.double().mean(1))
        elif cached:
            labels = train.labels[rows[aside]]
            scores.append(judge(task, grid, feed.judged(train, rows[aside]), labels, shared=False).double().mean(1))
        else:
            source = taken(task.data.train, torch.from_numpy(rows[aside]))
            scores.append(judge(task, grid, feed.judged(source), source.truth).double().mean(1))
    where = "test" if on_test else f"{HELD_OUT:.0%} of train"
    return best_of_each_view(grid.specs, rights, torch.stack(scores).mean(0), where)


def vtab(task: Task) -> list[Measured]:
    """VTAB-1k: 800 images to learn from, 200 to choose the view on, drawn by the seed; all of the test split."""
    recipe, rights, scores = RECIPES["vtab"], [], []
    for seed in task.config.seeds:
        if (images := len(task.learnt(seed))) < sum(VTAB):
            raise UserError(f"vtab takes {sum(VTAB)} training images, and {task.config.data.path} has {images}.")
    train, test, views = task.train_features(), task.test_features(), task.views(*recipe.views)
    for seed in task.config.seeds:
        rows = task.learnt(seed)
        generator = torch.Generator().manual_seed(sample_seed(seed, 0, Draw.VTAB))
        drawn = rows[torch.randperm(len(rows), generator=generator)[: sum(VTAB)].numpy()]
        kept, aside = np.sort(drawn[: VTAB[0]]), np.sort(drawn[VTAB[0] :])
        batch = task.config.heads.batch_size or recipe.batch_size
        feed = Stored(train, kept, views, seed, batch, task.accelerator.device)
        grid = fit(task, recipe, feed, seed)
        rights.append(judge(task, grid, feed.judged(test, np.arange(len(test.rows))), test.labels, shared=False))
        chosen = judge(task, grid, feed.judged(train, aside), train.labels[aside], shared=False)
        scores.append(chosen.double().mean(1))
    score = torch.stack(scores).mean(0)
    best = int(score.argmax())
    settings = {"lr": grid.specs[best].lr, "wd": grid.specs[best].weight_decay, "selected on": "200 of train"}
    return [Measured(grid.specs[best].view, [right[best] for right in rights], settings)]


def fit(task: Task, recipe: Recipe, feed: Live | Stored, seed: int) -> Grid:
    """Train all heads, from the newest checkpoint on if there is one."""
    accelerator, classes = task.accelerator, len(task.data.names)
    specs = recipe.heads(feed.views)
    grid = Grid(recipe, specs, [feed.width(spec.view) for spec in specs], classes, seed).to(accelerator.device)
    steps = recipe.length(feed.images, feed.batch, task.config.heads.epochs)
    folder = Path(task.config.output_dir) / _key(task, feed, steps, seed)
    task.leftovers.append(folder)
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
        if step % _LOOK == 0 or step == steps:
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


def judge(
    task: Task, grid: Grid, looked: Iterator[tuple[np.ndarray, Views]], labels: torch.Tensor, shared: bool = True
) -> torch.Tensor:
    """Which images each head gets right, (H, n) bool. shared: each process looks at a part of them."""
    device = task.accelerator.device
    right = torch.zeros(len(grid.specs), len(labels), device=device)
    for indices, views in looked:
        right[:, indices] = grid.right(views, labels[indices].to(device)).float()
    return (task.accelerator.reduce(right, "sum") if shared else right).cpu() > 0


def best_of_each_view(
    specs: list[Head], rights: list[torch.Tensor], scores: torch.Tensor, where: str
) -> list[Measured]:
    """Of each view the head with the highest mean score over seeds; the best view first."""
    found = []
    for view in dict.fromkeys(spec.view for spec in specs):
        own = [at for at, spec in enumerate(specs) if spec.view == view]
        best = max(own, key=lambda at: scores[at].item())
        settings = {"lr": specs[best].lr, "wd": specs[best].weight_decay}
        if len(specs) > 1:
            settings["selected on"] = where
        found.append((scores[best].item(), Measured(view, [right[best] for right in rights], settings)))
    return [measured for _, measured in sorted(found, key=lambda pair: -pair[0])]


def _key(task: Task, feed: Live | Stored, steps: int, seed: int) -> str:
    """A run in a few digits: two that share them are the same."""
    config = task.config
    about = [config.protocol, task.weights, data_digest(task.data.train), task.data.train.label, config.data.subset]
    about += [
        task.preprocessing,
        config.precision,
        config.cache.dtype,
        feed.views,
        feed.images,
        feed.batch,
        steps,
        seed,
    ]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
