"""The share of the device's arithmetic is counted from the tokens that were computed."""

import pytest
import torch
from common.utilisation import Utilisation, matrix_rate
from torch.utils.flop_counter import FlopCounterMode

from timm_dseq import block_masks

from ..tiny import jepa


@pytest.mark.parametrize("objective", ["dseq", "ijepa"])
def test_counted_flops_are_those_torch_counts_but_for_attention_and_padding(objective):
    """torch's own counter sees every product; without padding and attention it would see ours."""
    model = jepa(objective)
    size = model.student.patch_embed.img_size
    images, blocks = torch.randn(6, 3, *size), block_masks(model.student.patch_embed.grid_size, torch.arange(6))
    with FlopCounterMode(display=False) as counter:
        loss, facts = model(images, None, blocks)
        loss.backward()
    ours = Utilisation(model).flops(6, facts["encoder_tokens"], facts["predictor_tokens"])
    products = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    linear = sum(count for op, count in products.items() if "attention" not in op)
    fill = min(facts["encoder_fill"], facts["predictor_fill"])
    assert ours <= linear
    assert ours >= 0.9 * fill * linear


def test_the_matrix_rate_is_one_of_a_computer():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14
