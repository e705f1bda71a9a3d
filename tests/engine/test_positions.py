import math

import pytest
import torch

from timm_dseq.positions import sincos_positions


@pytest.mark.parametrize(("grid", "dim"), [((14, 14), 192), ((12, 16), 64), ((1, 5), 8), ((7, 3), 384)])
def test_positions_equal_the_definition_of_mae_and_ijepa(grid, dim):
    """Quarter by quarter: sin and cos of the column, sin and cos of the row, frequencies 10000^(-k / (dim / 4))."""
    found = sincos_positions(grid, dim)
    assert found.shape == (grid[0] * grid[1], dim) and found.dtype == torch.float32
    quarter = dim // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[place / 10000 ** (k / quarter) for k in range(quarter)] for place in (column, row)]
            expected = [f(a) for place in angles for f in (math.sin, math.cos) for a in place]
            assert found[row * grid[1] + column].tolist() == pytest.approx(expected, abs=1e-5)
