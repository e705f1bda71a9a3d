"""A signal to a whole job leaves loader workers alone, wherever a run that stops behind a step loads images."""

import os
import signal
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from common.extract import digests_of
from common.probing import Cache
from common.scoring import right_answers
from PIL import Image

DATA = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


class Signalled:
    """Two images; the loader's worker gets both signals while it reads them."""

    name, truth, label = "test", torch.zeros(2, dtype=torch.int64), "label"
    rows = SimpleNamespace(_fingerprint="")
    main = os.getpid()

    def __len__(self):
        return 2

    def picture(self, index):
        assert os.getpid() != self.main
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return Image.new("RGB", (8, 8))

    def fingerprint(self):
        return "signalled"


def test_the_judgement_of_a_classifier_goes_on():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    assert right_answers(model, Signalled(), DATA, Accelerator(cpu=True), workers=1).shape == (2,)


def test_the_search_for_duplicates_goes_on(tmp_path):
    assert digests_of(Signalled(), 1, Cache(folder=str(tmp_path)), Accelerator(cpu=True)).shape == (2, 16)
