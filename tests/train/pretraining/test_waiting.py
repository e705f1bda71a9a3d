"""Nothing waits: how often a step's numbers cross back from the device, and what the host does for each image."""

import pytest
import torch
from accelerate import Accelerator
from common.labels.labelled import open_labelled
from common.pretraining import schedule
from common.pretraining.model import build
from common.pretraining.precision import Precision
from common.pretraining.settings import parse
from common.pretraining.training import Training
from common.tuning import settings as tuning
from common.tuning.run import seed_run

from ...far import Event, FarDevice
from ...tiny import lines_run
from ..runs import options
from ..tunings import colours
from ..tunings import options as finetuning


def training_of(tmp_path, **settings):
    config, _ = parse(options(tmp_path, **settings))
    accelerator = Accelerator(cpu=True)
    training = Training(build(config), config, Precision("no", accelerator.device), accelerator)
    return training, schedule.at(config, 80, 8192, 160)


COLOURS = {"data__color_jitter": 0.4, "data__hue": 0.1, "data__gray": 0.2, "data__solarize": 0.1}
VIEWS = {"views": {"model__objective": "views", "model__views": 2, **COLOURS}}


def batch_of(images, first=0, views=0):
    generator = torch.Generator().manual_seed(0)
    name, shape = ("pixels", (images * views, 3, 8 * 8, 8)) if views else ("images", (images, 3, 48, 48))
    pixels = {name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}
    return iter([(pixels, torch.stack([torch.zeros(images, dtype=torch.long), first + torch.arange(images)], 1), [])])


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("objective", ["dseq", "dseq_causal", "ijepa", "views"])
def test_a_step_copies_once_from_the_device_and_waits_for_nothing_it_sends(objective, varlen, tmp_path, monkeypatch):
    training, now = training_of(tmp_path, **VIEWS.get(objective, {"model__objective": objective}))
    model = training.model
    views = model.views
    if varlen:
        monkeypatch.setattr("timm_dseq.engine.attention.attend", lambda q, k, v, **_: v)  # its kernel is CUDA's
        model.varlen = model.predictor.varlen = True
    training.step(batch_of(8, views=views), now)  # constants are made once
    device = FarDevice()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(training.accelerator.state, "device", torch.device("cuda"))
    monkeypatch.setattr(training.optimizer, "step", lambda: None)  # torch's own, which sees through the disguise
    device.put(*model.parameters(), *model.buffers())
    before = torch.zeros(5)
    device.put(before)
    ((pixels, *others),) = batch_of(8, 8, views)
    with device:
        pixels = {name: own.pin_memory() for name, own in pixels.items()}
        figures = training.step(iter([(pixels, *others)]), now, before)  # as the loader gives them
    assert not device.waits, device.waits
    assert len(device.crossings) == 1, device.crossings
    assert "copy_ in __init__: self._host = " in device.crossings[0]  # of `Fetch`
    assert torch.equal(figures.fetched, torch.zeros(5))


def test_the_far_device_sees_what_comes_back():
    device = FarDevice()
    x = torch.arange(4.0)
    device.put(x)
    with device:
        y = x * 2
        assert y.device.type == "cuda" and torch.zeros(2, device=y.device).device.type == "cuda"
        assert not device.crossings
        y.cpu(), y.sum().item(), bool(y[0] > 0), y[y > 2], (y > 2).nonzero(), torch.empty(4).copy_(y)
        assert len(device.crossings) == 6 and not device.waits
        torch.ones(3).pin_memory().to(y.device), y[torch.tensor([1]).pin_memory().to(y.device)]
        assert not device.waits
        torch.ones(3).to(y.device), torch.tensor(2.0, device=y.device), y[torch.tensor([1])]
    assert len(device.waits) == 3 and len(device.crossings) == 6


@pytest.mark.parametrize("objective", ["dseq", "ijepa"])
def test_the_host_does_no_more_for_more_images(objective, tmp_path):
    """The lines of Python that a step runs, at four times the images: packing looks once at each size of a token set,
    and 384 images have most of them."""
    training, now = training_of(tmp_path, model__objective=objective)
    few, many = (lines_run(lambda n=n: training.step(batch_of(n), now)) for n in (384, 1536))
    assert many < 1.6 * few, (few, many)


def test_a_step_of_fine_tuning_waits_for_no_copy(tmp_path, monkeypatch):
    data = colours(tmp_path / "data")
    config, text = tuning.parse(finetuning(tmp_path / "run", data, args='{"depth": 2}', optim__drop_path=0.1))
    accelerator = Accelerator(cpu=True)
    task, run = seed_run(config, text, open_labelled(config.data), accelerator)
    training, model = run.training, task.model

    def labelled(images=8):
        samples = torch.stack([torch.zeros(images, dtype=torch.long), torch.arange(images)], 1)
        return iter([(samples, [torch.randn(images, 3, 32, 32), torch.arange(images) % 3])])

    training.step(labelled(), 1, 0.01)
    device = FarDevice()
    monkeypatch.setattr(accelerator.state, "device", torch.device("cuda"))
    monkeypatch.setattr(training.optimizer, "step", lambda: None)
    device.put(*model.parameters(), *model.buffers())
    ((samples, inputs),) = labelled()
    with device:
        training.step(iter([(samples, [each.pin_memory() for each in inputs])]), 2, 0.01)
    assert not device.crossings and not device.waits, device.waits
