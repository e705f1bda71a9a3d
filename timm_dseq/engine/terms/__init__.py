"""Losses that can be added to the prediction's, by name.

A term is a module made with the encoder's width D. It is called with the mean of each prediction (P, D), the mean of
each target (P, D), their plan, and the shape (K, B): most steps of an image, and images in the batch. It returns one
number, (), that is a mean over the batch. A new term is a class in a file here and a line in `TERMS`.
"""

from collections.abc import Callable, Mapping

from torch import nn

from ...errors import UserError
from .vicreg import Contrastive

TERMS: dict[str, Callable[[int], nn.Module]] = {"contrastive": Contrastive}


def check_terms(terms: Mapping[str, float]) -> None:
    """One line for a term that does not exist."""
    for name in terms:
        if name not in TERMS:
            raise UserError(f"terms: {name!r} is unknown: choose from {', '.join(TERMS)}")
