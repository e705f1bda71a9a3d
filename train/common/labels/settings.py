"""Which labelled images a program learns from, and which it is tested on."""

from dataclasses import dataclass

from ..system.numbers import Count


@dataclass
class Labels:
    """Labelled images.

    Args:
        path: an alias (labels/aliases.py), ALIAS:FOLDER, a data set of the Hub, a folder, a Parquet file, or `scenes`
        config: the data set's configuration, where it has several
        image: column of the images (found if not given)
        label: column of the classes (found if not given); with scenes, count or distance
        train: the split that is learnt from (default: train)
        test: the split, or a Parquet file, that is tested on (default: validation, else test)
        classes: how many there have to be
        subset: what of the training split is used: 1%, 10%, 5-per-class, or a file of row or image names, one a line
        scenes: column that holds CLEVR's scenes as JSON, from which labels are computed
    """

    path: str
    config: str | None = None
    image: str | None = None
    label: str | None = None
    train: str | None = None
    test: str | None = None
    classes: Count | None = None
    subset: str | None = None
    scenes: str | None = None
