"""What one step costs, for four sizes of ViT: DSeq packed, beside I-JEPA packed and stacked and a dense masked pass.

    python benchmarks/step.py --only s16 --rounds 1                          # on the CPU; all four take ten minutes
    python benchmarks/step.py --json step.json                               # on a GPU, if there is one
    python benchmarks/step.py --only b16 --precision bf16 --batch 256 --compile false

A step is the run's own: forward, backward, AdamW and EMA on images that lie ready on the device. All contenders take
turns within each round, and a figure is the least of its rounds. FLOPs are those of the tokens and pairs of tokens that
a way has to compute; the peak is what a large product of random numbers reaches in the same run. The device waits
while no kernel runs, told by a profile; a CPU has no such figure, and its memory is what is kept for the backward pass.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure  # before torch, whose threads and memory it sets
import torch
from common.pretraining.model import build
from common.pretraining.precision import Precision, chosen
from common.pretraining.schedule import Now
from common.pretraining.training import Training
from common.pretraining.utilisation import Utilisation, matrix_rate
from common.run.update import update
from common.system import launch
from rivals import Dense, Stacked, equal_blocks, saved_bytes

from timm_dseq import block_masks, rank_regions
from timm_dseq.engine.packing import attention_rule, pack, scatter_to_slots, slots_of
from timm_dseq.engine.plans import plan_regions

PROFILES = {"one region": [0.51], "two regions": [0.25, 0.15], "four regions": [0.15] * 4}  # the remainder not counted
NOW = Now(lr=1e-4, weight_decay=0.05, momentum=0.996, regions=1.0)
PROFILED, WARM = 3, 3


@dataclass
class Contender:
    """One way to compute a step."""

    run: Callable[[], Any]  # a whole step
    forward: Callable[[], torch.Tensor]  # its loss, with gradients
    images: int
    work: Callable[[], dict[str, float]]  # tokens and pairs of the last run
    fill: Callable[[], list[float]] | None = None


class Bench:
    """The contenders of one size, on one batch that lies on the device."""

    def __init__(self, size: measure.Size, args: argparse.Namespace, accelerator) -> None:
        self.device = device = accelerator.device
        self.batch = args.batch or size.batch[device.type]
        config = size.config(self.batch, args.precision)
        config.system.compile = {"auto": "auto", "true": True, "false": False}[args.compile]
        self.model = model = build(config).to(device)
        name, _ = chosen(args.precision, model, size.img_size, device)
        self.precision = Precision(name, device)
        self.training = Training(model, config, self.precision, accelerator)
        side, self.grid = size.img_size, model.student.patch_embed.grid_size
        draw = torch.Generator().manual_seed(0)
        shape = (self.batch, 3, side, side)
        self.pixels = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).to(device)
        self.images = torch.randn(self.batch, 3, side, side, generator=draw).to(device)
        self.samples = torch.tensor([[0, i] for i in range(self.batch)])
        self.maps: torch.Tensor | None = None  # stand in for the saliency once it was computed
        real = model._saliency
        model._saliency = lambda *inputs: self._seen(real(*inputs))

    def _seen(self, found: torch.Tensor) -> torch.Tensor:
        return found if self.maps is None else self.maps[: len(found)].to(found)

    def contenders(self) -> dict[str, Contender]:
        found = {}
        for name, areas in PROFILES.items():
            maps = profile_maps(areas, self.grid, self.batch).to(self.device)
            found[f"dseq, {name}"] = self.engine("dseq", maps)
        found["dseq, block-causal, two regions"] = self.engine(
            "dseq_causal", profile_maps(PROFILES["two regions"], self.grid, self.batch).to(self.device)
        )
        found["I-JEPA packed"] = self.engine("ijepa", None)
        stacked, equal = Stacked(self.model), equal_blocks(self.grid, self.batch, self.device)
        packed = self.direct("ijepa", equal)
        found["I-JEPA stacked, equal blocks"] = self.rival(lambda: stacked(self.images, equal), self.batch, packed)
        few = max(1, self.batch // 4)  # as many copies as the others have images
        maps = profile_maps(PROFILES["two regions"], self.grid, few).to(self.device)
        dense, plan = Dense(self.model), plan_regions(rank_regions(maps))
        found["dense, N-1 copies"] = self.rival(lambda: dense(self.images[:few], plan), few, lambda: dense.work(few))
        return found

    def engine(self, objective: str, maps: torch.Tensor | None) -> Contender:
        """The run's own step."""
        facts: dict = {}

        def run() -> None:
            self.model.objective, self.maps = objective, maps
            figures = self.training.step(iter([({"images": self.pixels}, self.samples, [])]), NOW)
            facts.update(work=figures.work, fill=list(figures.fill[-1]))

        def forward() -> torch.Tensor:
            self.model.objective, self.maps = objective, maps
            blocks = block_masks(self.grid, torch.arange(self.batch, device=self.device))
            loss, count, _ = self.model(self.images, None, blocks)
            return loss / count

        return Contender(run, forward, self.batch, lambda: facts["work"], lambda: facts["fill"])

    def rival(self, loss_of: Callable[[], torch.Tensor], images: int, work: Callable[[], dict]) -> Contender:
        """Another way, with the run's optimiser and EMA."""

        def run() -> None:
            with self.precision.autocast():
                loss = loss_of()
            loss.backward()
            update(self.training.wrapped.parameters(), self.training.optimizer, 1.0, None)
            self.model.update_target(NOW.momentum)

        return Contender(run, loss_of, images, work)

    def direct(self, objective: str, blocks) -> Callable[[], dict]:
        """The work of a pass over given blocks, counted once."""

        @torch.no_grad()
        def work() -> dict:
            self.model.objective, self.maps = objective, None
            with self.precision.autocast():
                return self.model(self.images, None, blocks)[2]

        return work

    def gaps(self) -> dict[str, float]:
        """How far the student's gradients of two ways of the same step are apart, as shares of their norm."""
        few = max(1, self.batch // 4)
        maps = profile_maps(PROFILES["two regions"], self.grid, few).to(self.device)
        equal = equal_blocks(self.grid, few, self.device)
        images, model = self.images[:few], self.model
        plan = plan_regions(rank_regions(maps))

        def gradients(loss_of: Callable[[], torch.Tensor], objective: str) -> torch.Tensor:
            model.objective, self.maps = objective, maps
            with self.precision.autocast():
                loss = loss_of()
            loss.backward()
            found = torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None])
            model.zero_grad(set_to_none=True)
            return found

        def packed() -> torch.Tensor:
            loss, count, _ = model(images, None, equal)
            return loss / count

        dense, stacked = Dense(model), Stacked(model)
        pairs = {
            "dense": (gradients(packed, "dseq"), gradients(lambda: dense(images, plan), "dseq")),
            "stacked": (gradients(packed, "ijepa"), gradients(lambda: stacked(images, equal), "ijepa")),
        }
        return {name: ((a - b).norm() / a.norm()).item() for name, (a, b) in pairs.items()}


def profile_maps(areas: list[float], grid: tuple[int, int], batch: int) -> torch.Tensor:
    """Maps (batch, h, w) whose regions have these areas: bands of patches, row by row, an empty patch between them."""
    h, w = grid
    one = torch.zeros(h * w)
    at = 0
    for rank, area in enumerate(areas):
        patches = min(round(area * h * w), h * w - at)
        one[at : at + patches] = 1 - 0.05 * rank
        # two bands may not touch, not even by their corners
        at = (-(-(at + patches) // w) + 1) * w
    return one.view(1, h, w).expand(batch, -1, -1).clone()


def measured(name: str, size: measure.Size, args: argparse.Namespace, accelerator) -> tuple[list[dict], dict]:
    """Rows of one size, and what is to be known beside them."""
    device = accelerator.device
    bench = Bench(size, args, accelerator)
    rate = matrix_rate(device, bench.precision.product_dtype)
    utilisation = Utilisation(bench.model)
    wanted = args.contenders or [""]
    contenders = {row: c for row, c in bench.contenders().items() if any(part in row for part in wanted)}
    gaps = bench.gaps()
    print(f"{name}: dense and stacked give the packed gradients within {gaps['dense']:.1e} and {gaps['stacked']:.1e}")
    about = {"matrix_tflops": rate / 1e12, "precision": bench.precision.name, "gaps": gaps, "kernels": {}}
    about["attention"] = bench.training.attention
    about["compiled"] = bench.model.student.blocks[0]._compiled_call_impl is not None
    least, rows = dict.fromkeys(contenders, float("inf")), {}
    begun = time.perf_counter()
    for row, contender in list(contenders.items()):
        rows[row] = {"size": name, "row": row, "device": device.type, "batch": contender.images}
        try:
            for _ in range(WARM if device.type == "cuda" else 1):
                contender.run()
        except torch.OutOfMemoryError:
            rows[row]["error"] = "out of memory"
            del contenders[row]
    about["warm_seconds"] = time.perf_counter() - begun
    for _ in range(args.rounds):
        for row, contender in contenders.items():
            least[row] = min(least[row], measure.seconds(contender.run, args.steps, device))
    for row, contender in contenders.items():
        flops = utilisation.flops(contender.images, contender.work())
        found = {
            "images_per_second": contender.images / least[row],
            "ms": least[row] * 1e3,
            "gflop": flops / contender.images / 1e9,
            "peak_share": flops / least[row] / rate,
            "fill": contender.fill() if contender.fill else None,
            "waiting_share": None,
        }
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            profile = measure.profiled(contender.run, PROFILED, device)
            found |= {
                "waiting_share": profile.waiting(least[row]),
                "memory_mib": torch.cuda.max_memory_allocated() / 2**20,
            }
            about["kernels"][row] = profile.kernels
        else:
            with bench.precision.autocast():
                found["memory_mib"] = saved_bytes(contender.forward, bench.model) / 2**20
            if row == measure.MAIN:
                about["kernels"][row] = measure.profiled(contender.run, 1, device).kernels
        rows[row] |= found
    if "dseq" in str(list(contenders)):
        about["planning_ms"] = planning(bench) * 1e3
    return list(rows.values()), about


def planning(bench: Bench, rounds: int = 5) -> float:
    """Seconds from a batch's maps to where every token lies: regions, plan, packing, attention rule."""
    device, model, (h, w) = bench.device, bench.model, bench.grid
    maps = profile_maps(PROFILES["two regions"], bench.grid, bench.batch).to(device)
    least = float("inf")
    for _ in range(rounds):
        measure.sync(device)
        begun = time.perf_counter()
        plan = plan_regions(rank_regions(maps))
        encoder, predictor = plan.sizes[0] + 1, plan.sizes[1] + plan.sizes[2]
        for sizes, width, masks in (
            (encoder, model.student.embed_dim, plan.contexts),
            (predictor, model.predictor.width, plan.visible() | plan.targets),
        ):
            layout = pack(sizes, h * w + 1, width)
            slots = slots_of(layout, masks)
            scatter_to_slots(layout, slots, torch.arange(h * w, device=device), 0)
            attention_rule(layout, slots)
        measure.sync(device)
        least = min(least, time.perf_counter() - begun)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(measure.SIZES), help="sizes, by commas")
    parser.add_argument("--contenders", nargs="*", help="only those whose names hold one of these")
    parser.add_argument("--batch", type=int, help="images (default: by size and device)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="in a round (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--precision", default="auto", choices=["auto", "no", "bf16"])
    parser.add_argument("--compile", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no size after so many seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    accelerator = launch.accelerator(cpu=args.cpu)
    args.steps = args.steps or (8 if accelerator.device.type == "cuda" else 1)
    settings = {name: str(value) for name, value in vars(args).items()}
    record = {"made_by": "benchmarks/step.py", **measure.environment(accelerator.device), "settings": settings}
    record |= {"sizes": {}, "rows": []}
    begun = time.perf_counter()
    for name in args.only.split(","):
        if time.perf_counter() - begun > args.seconds:
            print(f"{name}: not measured, the time is over")
            continue
        # compiled graphs are those of one size
        torch._dynamo.reset()
        rows, about = measured(name, measure.SIZES[name], args, accelerator)
        accelerator.free_memory()
        record["sizes"][name] = {**about, "seconds": time.perf_counter() - begun}
        record["rows"] += rows
        record["goals"] = measure.judged(record["rows"])
        measure.write(args.json, record)
        measure.print_rows(rows)
        print(f"       peak {about['matrix_tflops']:.2f} TFLOP/s in {about['precision']}, ", end="")
        print(f"planning {about.get('planning_ms', float('nan')):.1f} ms, {time.perf_counter() - begun:.0f} s so far\n")
    print(f"{record['name']}, {record['versions']}")
    measure.print_goals(measure.judged(record["rows"]))


if __name__ == "__main__":
    main()
