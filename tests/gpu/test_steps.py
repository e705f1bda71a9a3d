"""One step on a GPU: the host does not wait, cuDNN's attention stays out, compiled blocks compute the same."""

import re
import warnings

import pytest
import torch
from common.system import launch
from torch.profiler import ProfilerActivity, profile

from .devices import CUDA, DEVICES, NOW, batches_of, training_of

ATTENTION = re.compile(r"flash|fmha|efficient_attention|attention|sdpa", re.IGNORECASE)
HEADS = {"predictor_width": 96}  # three heads of 32


def attention_kernels(names):
    """Those of a profile that compute attention."""
    return sorted({name for name in names if ATTENTION.search(name)})


def is_cudnns(name):
    return "cudnn" in name.lower()


def profiled(run, device):
    """Names of what ran: kernels on a GPU, operations on a CPU."""
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        run()
        if gpu:
            torch.cuda.synchronize()
    return [event.name for event in found.events()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["dseq", "dseq_causal", "ijepa"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_asks_the_device_for_nothing_but_its_one_copy(objective, precision, device, tmp_path):
    """The copy itself goes to pinned memory behind an event, which is no synchronising call."""
    training = training_of(tmp_path, device, precision, model__objective=objective, system__compile="false")
    batches = batches_of(6)
    for _ in range(2):  # constants are made once
        training.step(batches, NOW)
    before = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    numbers = torch.zeros(5, device=device)
    try:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            figures = training.step(batches, NOW, numbers)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    assert figures.fetched is None or figures.fetched.device.type == "cpu"
    assert figures.gradient_norm.isfinite()


@pytest.mark.parametrize("device", [CUDA])
def test_what_synchronises_is_seen(device):
    """The check above can fail."""
    x = torch.ones(3, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("one_row", [False, True], ids=["rows under a mask", "as chosen"])
def test_attention_is_fused_and_never_cudnns(one_row, device, tmp_path):
    if device == "cuda":
        launch.accelerator()
    training = training_of(tmp_path, device, "bf16", model__predictor_width=96, system__compile="false")
    model = training.model
    if device == "cpu":
        model.explicit_attention(False)
    elif not one_row:
        model.varlen = model.predictor.varlen = False
    batches = batches_of(4)
    training.step(batches, NOW)
    found = attention_kernels(profiled(lambda: training.step(batches, NOW), device))
    assert found, "no attention kernel ran"
    assert not [name for name in found if is_cudnns(name)], found


def test_cudnns_kernels_are_known_by_name():
    names = ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "void pytorch_flash::flash_fwd_kernel"]
    names += ["fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "ampere_bf16_s16816gemm"]
    assert len(attention_kernels(names)) == 3
    assert [is_cudnns(name) for name in attention_kernels(names)] == [True, False, False]


def losses(tmp_path, device, compiled, steps=6, **settings):
    """Of some steps of one run, each with other sizes."""
    training = training_of(tmp_path, device, "no", system__compile="false", **settings)
    if compiled:
        torch._dynamo.reset()
        training.model.compile(**({"backend": "aot_eager"} if device == "cpu" else {}))
    found = []
    for images in (8, 8, 6, 8, 5, 7)[:steps]:
        figures = training.step(batches_of(1, images), NOW)
        found.append((figures.loss / figures.total).item())
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_have_the_losses_of_plain_ones_and_few_graphs(device, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = losses(tmp_path, device, False)
        counters = torch._dynamo.utils.counters
        counters.clear()
        compiled = losses(tmp_path, device, True)
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert 0 < counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]


@pytest.mark.parametrize("device", [CUDA])
def test_one_long_row_compiles_where_it_is_chosen(device, tmp_path):
    """bf16, since its kernel knows nothing else."""
    found = {}
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        settings = {"model__predictor_width": 96, "system__compile": compiled}
        training = training_of(tmp_path, device, "bf16", **settings)
        training.model.varlen = training.model.predictor.varlen = True
        batches = batches_of(4)
        figures = [training.step(batches, NOW) for _ in range(4)]
        found[compiled] = [(f.loss / f.total).item() for f in figures]
    assert found["true"] == pytest.approx(found["false"], rel=0.03)
