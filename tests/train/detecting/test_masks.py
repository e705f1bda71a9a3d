"""Masks: what has no fault can be decoded, what has one is told by words, and neither takes long or much memory."""

import numpy as np
import pytest
from common.detecting import masks

SIZE = (30, 41)


def codes(count):
    """Bitmaps and their run-length codes, compressed and plain."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        bits = (draw.random(SIZE) < draw.choice([0, 0.01, 0.3, 0.99, 1])).astype(np.uint8)
        code = masks.code(bits)
        flat = bits.T.flatten()
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        plain = [0, *runs] if flat[0] else runs
        yield bits, {"size": list(SIZE), "counts": code["counts"].decode()}, {"size": list(SIZE), "counts": plain}


def test_codes_of_bitmaps_have_no_fault_and_are_decoded():
    for bits, compressed, plain in codes(60):
        for code in (compressed, plain):
            assert masks.fault(code, SIZE) is None
            np.testing.assert_array_equal(masks.bitmap(code, SIZE), bits)
    large = masks.code(np.ones((9000, 9000), np.uint8))["counts"].decode()
    assert masks.fault({"size": [9000, 9000], "counts": large}, (9000, 9000)) is None


def test_damaged_codes_have_a_fault_or_are_masks_all_the_same():
    draw, found = np.random.default_rng(1), 0
    for _, code, _ in codes(400):
        letters = list(code["counts"])
        for _ in range(draw.integers(1, 3)):
            place = int(draw.integers(len(letters)))
            letters[place] = draw.choice([chr(draw.integers(33, 127)), "", "o", "ü", "\\"])
        damaged = {"size": list(SIZE), "counts": "".join(letters)}
        if fault := masks.fault(damaged, SIZE):
            found += 1
            assert fault.startswith("has ") and "\n" not in fault
        else:
            assert masks.bitmap(damaged, SIZE).shape == SIZE
            assert masks.box_around(damaged, SIZE).shape == (4,)
    assert found > 300


@pytest.mark.parametrize("counts", ["", "P", "o", "oooooooooo0", "\ud800", [], [1230, 0.0], [True] * 1230, 5, None])
def test_counts_that_are_none_have_a_fault(counts):
    assert masks.fault({"size": list(SIZE), "counts": counts}, SIZE)


@pytest.mark.parametrize("size", [None, "30", [30], [30.0, 41.0], [41, 30]])
def test_sizes_that_are_none_have_a_fault(size):
    assert masks.fault({"size": size, "counts": [1230]}, SIZE)


def test_polygons_may_leave_their_image_by_its_size_and_no_further():
    def square(low, high):
        return [[low, low, high, low, high, high, low, high]]

    assert masks.bitmap(square(-41, 82), SIZE).all()
    assert masks.bitmap(square(60, 80), SIZE).sum() == 0
    for far in (83, -42, 2e9, 1e30, 10**400, -(10**400), float("inf"), float("nan")):
        assert masks.fault(square(0, 20), SIZE) is None
        assert masks.fault(square(0, far), SIZE) and masks.fault(square(far, 20), SIZE)
