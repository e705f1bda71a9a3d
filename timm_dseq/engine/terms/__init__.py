"""Losses that can be added to the prediction's, by name.

A term is a module made with the encoder's width D. It is called with the mean of each prediction (P, D), the mean of
each target (P, D), their plan, and the shape (K, B): most steps of an image, and images in the batch. It returns one
number, (), that is a mean over the batch. A new term is a class in a file here and a line in `TERMS`.
"""

from collections.abc import Callable, Mapping

from torch import nn

from ...arguments import check_positive
from ...errors import UserError
from .vicreg import Contrastive

TERMS: dict[str, Callable[[int], nn.Module]] = {"contrastive": Contrastive}


AnyTerm = float | tuple[float, Callable]  # a factor; with one's own term beside it


def check_terms(terms: Mapping[str, AnyTerm]) -> None:
    """One line for a term that does not exist."""
    for name, given in terms.items():
        own = isinstance(given, tuple)
        if own and not (len(given) == 2 and callable(given[1])):
            raise UserError(f"terms: {name!r} is {given!r}: give its factor and a function or module")
        check_positive(f"the factor of {name!r}", given[0] if own else given)
        if not own and name not in TERMS:
            raise UserError(f"terms: {name!r} is unknown: choose from {', '.join(TERMS)}, or give (factor, function)")
