"""Functions of the library are given nonsense: one line that names the argument; and sense, which they take."""

import math

import pytest
import timm
import torch

from timm_dseq import DSeqJEPA, UserError, block_masks, rank_regions, saliency_map, view_windows
from timm_dseq.engine.plans import plan_blocks, plan_regions
from timm_dseq.engine.saliency import saliency_from_tokens

SIZE = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
GRID = (6, 6)


def vit(**args):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SIZE, "no_embed_class": True, "global_pool": "avg", **args})


@pytest.fixture(scope="module")
def model():
    return DSeqJEPA(vit(), predictor_width=24, predictor_depth=1)


def images(count=3, channels=3, height=48, width=48):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def blocks(count=3, grid=GRID):
    return block_masks(grid, torch.arange(count))


def nan():
    found = images()
    found[1, 0, 3, 3] = math.nan
    return found


PICTURES = {
    "a list": (lambda: [1, 2], "images is a list: give a tensor"),
    "None": (lambda: None, "images is a NoneType"),
    "three dimensions": (lambda: images()[0], r"images has the shape \(3, 48, 48\): give \(B, C, H, W\)"),
    "no image": (lambda: images(0), r"images has the shape \(0, 3"),
    "one channel": (lambda: images(channels=1), r"images has the shape \(3, 1, 48, 48\)"),
    "another size": (lambda: images(height=64), r"images has the shape .*here \(any, 3, 48, 48\)"),
    "bytes": (lambda: images().byte(), "images is of type torch.uint8: give fractions"),
    "half precision": (lambda: images().half(), "images are of type torch.float16 and the model of torch.float32"),
    "another device": (lambda: images().to("meta"), "images are on meta and the model is on cpu"),
    "not a number": (nan, "images hold numbers that are not finite"),
    "without end": (lambda: images() * math.inf, "images hold numbers that are not finite"),
}


@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize("call", ["saliency_map", "forward", "predict", "features"])
def test_images(case, call, model):
    make, says = PICTURES[case]
    calls = {
        "saliency_map": lambda x: saliency_map(model.student, x),
        "forward": lambda x: model(x, None, blocks()),
        "predict": lambda x: model.predict(x, plan_blocks(blocks())),
        "features": lambda x: model.features_and_saliency(x),
    }
    with pytest.raises(UserError, match=says):
        calls[call](make())
    calls[call](images())  # the control: what fits is taken


SEEDS = {
    "fractions": (torch.tensor([0.5, 1.5]), "seeds is of type torch.float32: give whole numbers"),
    "not a number": (torch.tensor([math.nan]), "seeds is of type"),
    "one number": (torch.tensor(3), r"seeds has the shape \(\)"),
    "none": (torch.zeros(0, dtype=torch.int64), r"seeds has the shape \(0,\)"),
    "a list": ([1, 2], "seeds is a list"),
    "truth values": (torch.tensor([True]), "seeds is of type torch.bool"),
}


@pytest.mark.parametrize("case", SEEDS)
def test_seeds_of_blocks(case):
    with pytest.raises(UserError, match=SEEDS[case][1]):
        block_masks(GRID, SEEDS[case][0])


@pytest.mark.parametrize("grid", [(0, 6), (6,), 6, (6.0, 6), (6, -1), "66", None, (True, 6)])
def test_a_grid_that_is_none(grid):
    with pytest.raises(UserError, match=r"grid=.* is none: give"):
        block_masks(grid, torch.arange(2))


@pytest.mark.parametrize("name", ["context_scale", "target_scale", "target_aspect"])
@pytest.mark.parametrize("span", [(0.5, 0.2), (0, 0.5), (-1, 0.5), (math.nan, 1), 0.5, ("a", "b"), (0.1, math.nan)])
def test_a_span_that_is_none(name, span):
    with pytest.raises(UserError, match=f"{name}=.* is none: give"):
        block_masks(GRID, torch.arange(2), **{name: span})


@pytest.mark.parametrize("name", ["context_scale", "target_scale"])
def test_a_scale_above_one(name):
    with pytest.raises(UserError, match=f"{name}=.* up to 1"):
        block_masks(GRID, torch.arange(2), **{name: (0.5, 1.5)})


@pytest.mark.parametrize(("name", "value"), [("num_targets", 0), ("num_targets", 2.5), ("min_context", -1)])
def test_counts_of_blocks(name, value):
    with pytest.raises(UserError, match=f"{name}={value}: give a whole number"):
        block_masks(GRID, torch.arange(2), **{name: value})


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        (torch.rand(6, 6), r"saliency has the shape \(6, 6\): give \(B, h, w\)"),
        (torch.rand(0, 6, 6), r"saliency has the shape"),
        (torch.ones(1, 6, 6, dtype=torch.int64), "saliency is of type torch.int64"),
        ("map", "saliency is a str"),
    ],
)
def test_maps(maps, says):
    with pytest.raises(UserError, match=says):
        rank_regions(maps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_regions": 2.5}, "num_regions=2.5: give a whole number"),
        ({"num_regions": True}, "num_regions=True: give a whole number"),
        ({"stop_after": 2.0}, "stop_after=2.0: give a whole number"),
        ({"order": "random", "seeds": torch.arange(2)}, r"seeds has the shape \(2,\): give .* here \(3\)"),
        ({"order": "random", "seeds": torch.rand(3)}, "seeds is of type torch.float32"),
    ],
)
def test_options_of_regions(options, says):
    with pytest.raises(UserError, match=says):
        rank_regions(torch.rand(3, 6, 6), **options)


@pytest.mark.parametrize(
    ("tokens", "grid", "says"),
    [
        (torch.randn(2, 37, 24), (3, 6), r"tokens has the shape \(2, 37, 24\): give .* grid of 3×6"),
        (torch.randn(2, 36, 24), None, "tokens has the shape"),
        (torch.randn(2, 37, 12), None, "tokens has the shape"),
        (torch.randn(37, 24), None, "tokens has the shape"),
        (torch.randn(2, 37, 24), (0, 6), "grid="),
    ],
)
def test_tokens_are_not_cut_into_other_images(tokens, grid, says, model):
    with pytest.raises(UserError, match=says):
        saliency_from_tokens(model.student, tokens, grid=grid)
    assert saliency_from_tokens(model.student, torch.randn(2, 37, 24)).shape == (2, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, blocks(3, (4, 9))), r"blocks.context has the shape \(3, 4, 9\)"),
        ((None, blocks(2)), "blocks are missing: give one for each image|blocks.context has the shape"),
        ((torch.tensor([0.9, 0.1, 1.0]), blocks()), "use_regions is of type torch.float32: give truth values"),
        ((torch.tensor([1, 0, 1]), blocks()), "use_regions is of type torch.int64"),
        ((torch.tensor([True]), blocks()), r"use_regions has the shape \(1,\)"),
        (([True] * 3, blocks()), "use_regions is a list"),
    ],
)
def test_coins_and_blocks(arguments, says, model):
    with pytest.raises(UserError, match=says):
        model(images(), *arguments)


def test_other_sizes_of_a_vit_that_takes_any_are_not_predicted_in():
    model = DSeqJEPA(vit(dynamic_img_size=True), predictor_width=24, predictor_depth=1)
    with pytest.raises(UserError, match=r"images of \(8, 6\) patches: this model predicts in \(6, 6\)"):
        model(images(height=64), None, blocks(3, (8, 6)))
    assert saliency_map(model.student, images(height=64)).shape == (3, 8, 6)  # looked at they may be


@pytest.mark.parametrize("momentum", [2.0, -0.1, math.nan, "0.9", None])
def test_a_momentum_that_would_ruin_the_target(momentum, model):
    with pytest.raises(UserError, match=r"momentum=.* is no share"):
        model.update_target(momentum)


@pytest.mark.parametrize(
    "options",
    [{"predictor_depth": 0}, {"predictor_depth": -1}, {"predictor_width": 0}, {"views": 2.5}, {"num_regions": 2.5}],
)
def test_options_of_the_model(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f"{name}={value}: give a whole number"):
        DSeqJEPA(vit(), **options)


def test_areas_of_another_batch_make_no_plan():
    regions, other = (rank_regions(torch.rand(count, 6, 6)) for count in (3, 4))
    with pytest.raises(UserError, match="area has the shape"):
        plan_regions(regions, area=other.area)
    with pytest.raises(UserError, match="area has the shape"):
        plan_blocks(blocks(3), area=other.area)


@pytest.mark.parametrize(
    ("pixels", "windows", "says"),
    [
        (torch.randn(4, 3, 32, 8), torch.rand(4, 4), "windows is of type torch.float32"),
        (torch.randn(3, 3, 32, 8), torch.zeros(4, 4, dtype=torch.int64), r"pixels has the shape \(3, 3, 32, 8\)"),
        (torch.randn(4, 3, 32), torch.zeros(4, 4, dtype=torch.int64), "pixels has the shape"),
    ],
)
def test_views(pixels, windows, says):
    model = DSeqJEPA(vit(), "views", views=2, predictor_width=24, predictor_depth=1)
    with pytest.raises(UserError, match=says):
        model(pixels=pixels, windows=windows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((6, torch.arange(4), 0.5), "grid=6 is none"),
        (((6, 6, 6), torch.arange(4), 0.5), "grid=.* is none"),
        ((("6", 6), torch.arange(4), 0.5), "grid=.* is none"),
        ((GRID, [1, 2], 0.5), "seeds is a list"),
        ((GRID, torch.tensor(3), 0.5), "seeds has the shape"),
        ((GRID, torch.rand(4), 0.5), "seeds is of type"),
        ((GRID, torch.arange(4), math.nan), "share=nan is no share"),
        ((GRID, torch.arange(4), math.inf), "share=inf is no share"),
        ((GRID, torch.arange(4), -1), "share=-1 is no share"),
        ((GRID, torch.arange(4), 5), "share=5 is no share"),
        ((GRID, torch.arange(4), "0.5"), "share='0.5' is no share"),
    ],
)
def test_windows_of_views(arguments, says):
    with pytest.raises(UserError, match=says):
        view_windows(*arguments)


@pytest.mark.parametrize("block", ["a", None, math.nan, True, 1.5, 7, -1, math.inf])
def test_a_block_that_is_none(block, model):
    with pytest.raises(UserError, match="block="):
        saliency_map(model.student, images(), block=block)


@pytest.mark.parametrize("query", [[], 3, None, "best"])
def test_a_query_that_is_none(query, model):
    with pytest.raises(UserError, match=r"query=.* is unknown"):
        saliency_map(model.student, images(), query)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"views": 2, "temperature": 0}, "temperature=0: give a number above 0"),
        ({"views": 2, "temperature": "a"}, "temperature='a': give a number above 0"),
        ({"views": 2, "views_factor": math.nan}, "views_factor=nan: give a number above 0"),
        ({"min_area": "a"}, "min_area='a' is a share"),
    ],
)
def test_numbers_of_the_model(options, says):
    with pytest.raises(UserError, match=says):
        DSeqJEPA(vit(), **options)


def test_things_in_the_place_of_blocks_and_plans(model):
    with pytest.raises(UserError, match="blocks and plan are those of"):
        model(images(), None, "b")
    with pytest.raises(UserError, match="blocks and plan are those of"):
        model(images(), plan="x")
    with pytest.raises(UserError, match="encode='z': give 'target' or 'student'"):
        model(images(), encode="z")
    with pytest.raises(UserError, match="regions is a int"):
        plan_regions(1)
    with pytest.raises(UserError, match="blocks is a int"):
        plan_blocks(1)
    with pytest.raises(UserError, match="grid="):
        saliency_from_tokens(model.student, torch.randn(2, 37, 24), grid=6)
