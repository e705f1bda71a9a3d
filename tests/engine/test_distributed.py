"""Two processes that share a batch do what one process does with the whole of it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from timm_dseq import view_windows
from timm_dseq.engine.terms.vicreg import Contrastive
from timm_dseq.engine.views.windows import cut

from ..tiny import batch, jepa

VIEWS = 2
SETTINGS = {
    "dseq": {"objective": "dseq"},
    "by step": {"objective": "dseq", "loss": "step"},
    "causal": {"objective": "dseq_causal"},
    "contrastive": {"objective": "dseq", "contrastive": True},
    "views": {"objective": "views", "views": VIEWS},
    "dseq and views": {"objective": "dseq", "views": VIEWS, "views_factor": 0.5},
}
IMAGES = 6


def model_of(setting):
    model = jepa(dtype=torch.float64, **SETTINGS[setting])
    if model.terms:  # the published projector is 3072 wide
        torch.manual_seed(0)
        model.contrastive = Contrastive(model.student.embed_dim, width=32).double()
    return model


def one_step(call, model, part):
    """A step on some of the images: the loss of all, what every parameter learned, and the target after its update."""
    images, coins, blocks = batch(IMAGES, dtype=torch.float64)
    inputs = {"images": images[part], "use_regions": coins[part], "blocks": blocks[part]} if model.predicts else {}
    if model.views:
        windows = view_windows((6, 6), torch.arange(IMAGES * VIEWS), 0.25)
        pixels = cut(images.repeat_interleave(VIEWS, 0), windows, (6, 6))
        inputs |= {"pixels": pixels.unflatten(0, (-1, VIEWS))[part].flatten(0, 1)}
        inputs |= {"windows": windows.unflatten(0, (-1, VIEWS))[part].flatten(0, 1)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss, count, _ = call(**inputs)
    loss.backward()
    both = torch.stack([loss.detach(), torch.tensor(float(count))])
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(both)
    loss, count = both
    for parameter in (p for p in model.parameters() if p.grad is not None):
        parameter.grad /= count / processes  # sums, averaged over processes
    optimizer.step()
    model.update_target(0.9)
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return loss / count, {name: weight.detach().clone() for name, weight in weights.items()}


def share(rank, port, kind, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    part = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    results = {}
    for setting in SETTINGS:
        model = call = model_of(setting)
        if kind == "ddp":
            call = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for block in (*model.student.blocks, *model.target.blocks, *model.predictor.blocks):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        results[setting] = one_step(call, model, part)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def test_the_forward_pass_asks_no_other_process(monkeypatch):
    """But for the statistics of the contrastive term, which are those of the whole batch."""

    def refused(*_):
        raise ConnectionError

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, refused)
    for setting in ("dseq", "by step", "causal"):
        assert model_of(setting)(*batch(IMAGES, dtype=torch.float64))[0].isfinite()
    with pytest.raises(ConnectionError):
        model_of("contrastive")(*batch(IMAGES, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns(kind, tmp_path, unused_port):
    spawn(share, (unused_port, kind, tmp_path / "out.pt"), nprocs=2)
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for setting in SETTINGS:
        model = model_of(setting)
        loss, weights = one_step(model, model, slice(None))
        shared_loss, shared_weights = results[setting]
        assert abs(shared_loss - loss) <= 1e-10 * abs(loss), setting
        assert shared_weights.keys() == weights.keys()
        for name, weight in weights.items():
            assert (shared_weights[name] - weight).abs().max() <= 1e-10, (setting, name)
