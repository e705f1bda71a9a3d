"""The smallest dense task, as a program: from noise images predict each patch's mean, of ViT-Ti of depth 4."""

import sys
from dataclasses import dataclass, field

import torch
from common.data.order import sample_seed, seeded
from common.dense.backbone import load_dense
from common.dense.run import dense_run
from common.dense.settings import Optim
from common.run.lock import locked
from common.run.resume import Checkpoint
from common.system import launch
from common.system.command_line import Parser
from common.system.computing import System
from common.system.signals import STOPPED, Stop, interruptible
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@dataclass
class Settings:
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    output_dir: str = "runs/brightness"
    resume: str = "auto"
    seed: int = 0
    workers: int = 0
    eval_every: int = 0
    max_steps: int | None = None
    dry_run: bool = False


class Noise(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, key):
        with seeded(sample_seed(0, *key)):
            coarse = torch.rand(1, 3, 4, 4)
        return F.interpolate(coarse, size=(64, 64))[0]


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        args = {"depth": 4, "drop_path_rate": config.optim.drop_path}
        self.backbone, _ = load_dense("dseq_jepa_vit_ti16", [1.0], random=True, args=args, window=3)
        self.head = nn.Conv2d(192, 1, 1)

    def forward(self, images):
        return self.head(self.backbone(images)[3])


class Brightness:
    title = "brightness"
    collate = staticmethod(torch.stack)

    def __init__(self, config, accelerator):
        self.model, self.images, self.accelerator = Model(config), Noise(), accelerator

    def errors(self, model, images):
        return (model(images).float() - F.avg_pool2d(images.mean(1, keepdim=True), 16)).square().mean((1, 2, 3))

    def loss(self, model, batch, seeds, first):
        assert len(seeds) == len(batch)
        squares = self.errors(model, batch).sum()
        return squares, {"squares": squares, "nothing": squares * 0}

    @torch.inference_mode()
    def evaluate(self):
        self.model.eval()
        mine = range(self.accelerator.process_index, 8, self.accelerator.num_processes)
        images = torch.stack([self.images[0, index] for index in mine])
        return {"error": self.accelerator.reduce(self.errors(self.model, images).sum(), "sum").item() / 8}

    def fingerprint(self):
        return "noise"


def main(arguments):
    parser = Parser(prog="brightness")
    parser.add_class_arguments(Settings)
    config, text = parser.settings(Settings, arguments)
    interruptible()
    accelerator = launch.accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    with locked(config.output_dir, accelerator, wanted=not config.dry_run):
        run = dense_run(Brightness(config, accelerator), config, text, accelerator)
        if config.dry_run:
            run.dry_run()
            return 0
        stopped = run.train(Stop())
        return STOPPED if stopped and not run.finished else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
