"""Tables: published rows where the data set has some, and what repeats said once."""

from common.discovering.published import BOXES, MASKS, published
from common.discovering.table import markdown, over_training


def test_published_rows_stand_beside_their_data_set_only():
    assert published(MASKS, "some/where/ECSSD/test.parquet")["TokenCut, DINO ViT-S/16"] == (80.3, 71.2, 91.8)
    assert published(MASKS, "org/DUT-OMRON") == MASKS["omron"] and published(BOXES, "VOC_2007/x") == BOXES["voc2007"]
    assert published(MASKS, "clevr_like") == {} == published(BOXES, "ecssd")


def test_what_repeats_is_said_once_and_empty_columns_go():
    rows = [["a", "1", ""], ["a", "2", ""], ["b", "3", ""]]
    assert markdown(["model", "x", "y"], rows) == "| model | x |\n| --- | --- |\n| a | 1 |\n|  | 2 |\n| b | 3 |"


def test_checkpoints_are_rows_in_their_order_and_priors_are_none():
    records = [
        {"model": model, "weights": weights, "map": name, "max_f": value}
        for model, weights, name, value in (
            ("step 1", "w", "border", 40.0),
            ("no model", "", "centre", 55.0),
            ("step 2", "v", "border", 60.04),
        )
    ]
    assert over_training(records).splitlines()[2:] == ["| step 1 | 40.0 |", "| step 2 | 60.0 |"]
