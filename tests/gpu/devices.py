"""The devices that checks run on, and tiny runs there."""

import os
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from common.pretraining.model import build
from common.pretraining.precision import Precision
from common.pretraining.schedule import Now
from common.pretraining.settings import parse
from common.pretraining.training import Training

from ..train.runs import options

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
)
DEVICES = ["cpu", CUDA]
NOW = Now(lr=1e-3, weight_decay=0.05, momentum=0.9, regions=0.5)


@contextmanager
def exact_products():
    """float32 is float32: TF32 would hide what differs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allowed


def training_of(tmp_path, device, precision="no", **settings):
    """A tiny run's model and step, on a device."""
    config, _ = parse(options(tmp_path, **settings))
    return Training(build(config), config, Precision(precision, torch.device(device)), Accelerator(cpu=device == "cpu"))


def batches_of(count, images=8, size=48):
    """The same batches every time, of (images) photos that are noise."""
    draw = torch.Generator().manual_seed(0)
    shape = (images, 3, size, size)
    for step in range(count):
        samples = torch.tensor([[0, step * images + i] for i in range(images)])
        yield {"images": torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)}, samples, []


def placed(device):
    """The environment of a run on this device."""
    return {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {"ACCELERATE_USE_CPU": "false"}


def one_of_one(device, port):
    """The environment of the only process of a group."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**placed(device), **told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": os.environ["PATH"]}
