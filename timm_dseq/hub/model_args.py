"""Arguments of timm.create_model that somebody has written: what makes no model is one line that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError

# What commands set themselves, and what is no argument of a model but of timm.create_model.
_ELSEWHERE = ("name", "model_name", "img_size", "num_classes", "random", "seed")
_NOT_THE_MODELS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
# Whole numbers from 1 on. Beyond these, making the model takes all memory, or never ends.
_MOST = {
    "depth": 1000,
    "num_heads": 1000,
    "embed_dim": 65_536,
    "patch_size": 16_384,
    "in_chans": 1000,
    "img_size": 65_536,
    "reg_tokens": 65_536,
}


def check_args(args: dict[str, Any], setting: str) -> None:
    """Refuse arguments that are given elsewhere, or of a size that no model has. setting: where they were written."""
    for name in args:
        if name in (*_ELSEWHERE, *_NOT_THE_MODELS):
            mend = "it has a setting of its own" if name in _ELSEWHERE else "name the weights instead"
            raise UserError(f"{setting}.{name} is no argument of a model: leave it out, {mend}.")
    if args.get("in_chans", 3) != 3:
        raise UserError(f"{setting}.in_chans={args['in_chans']!r:.80}: images here have 3 channels, leave it out.")
    if fault := misfit(args):
        raise UserError(f"{setting}.{fault}.")


def not_the_models(args: dict[str, Any]) -> str | None:
    """The first of these that is no model's but timm.create_model's: it would open files, or the network."""
    return next((name for name in _NOT_THE_MODELS if name in args), None)


def misfit(args: dict[str, Any]) -> str | None:
    """Which size among the arguments no model has; None if there is none. null stands for the default."""
    for name, most in _MOST.items():
        value = args.get(name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        sizes = all(type(number) is int and 1 <= number <= most for number in numbers)
        if value is not None and (not sizes or (name in ("patch_size", "img_size") and len(numbers) > 2)):
            return f"{name}={value!r:.80}: give a whole number from 1 to {most}"
    return None


@contextmanager
def making(what: str) -> Iterator[None]:
    """What timm raises on a name, a size or arguments that make no model, as one line."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} cannot be made ({reason:.300}): check its name, size and arguments.") from error
