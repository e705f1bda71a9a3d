"""Pretraining with defects of the released code brought back, to see what they cost: for study.py, never for use.

    python benchmarks/defects.py lag blind -- --config train/configs/speedrun.yaml --data.path PHOTOS …

They are brought back as far as an engine that computes visible tokens alone can have them. The released predictor, its
attention mask inverted, never sees the context, but sees hidden patches, which are not computed here: `blind` is the
first half of that.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "train"))

import pretrain

from timm_dseq import Plan, Predictor, plan_blocks, plan_regions
from timm_dseq.engine import curriculum
from timm_dseq.engine.target_blocks import Blocks


def lag() -> None:
    """Contexts R1, R1, R1 ∪ R2, … instead of R1, R1 ∪ R2, …"""

    def lagging(*args: object) -> Plan:
        plan = plan_regions(*args)
        first = torch.ones_like(plan.context_image, dtype=torch.bool)  # of its image
        first[1:] = plan.context_image[1:] != plan.context_image[:-1]
        before = (torch.arange(len(first), device=first.device) - (~first).long()).clamp(min=0)
        contexts = plan.contexts.index_select(0, before)
        return Plan(contexts, plan.context_image, plan.targets, plan.target_context, plan.step)

    curriculum.plan_regions = lagging


def blind() -> None:
    """The predictor knows where the context is, but not what is there: the encoder gets no gradient."""
    forward = Predictor.forward
    Predictor.forward = lambda self, tokens, slots, plan: forward(self, tokens * 0.0, slots, plan)


def transposed() -> None:
    """The target blocks of I-JEPA are those of the transposed image, so a context sees a part of them."""

    def plan(blocks: Blocks, *args: object) -> Plan:
        return plan_blocks(Blocks(blocks.context, blocks.targets.mT.contiguous(), blocks.seeds), *args)

    curriculum.plan_blocks = plan


def no_mask_token() -> None:
    """The mask token is not used: predictions start from their position alone."""
    table = Predictor._table

    def without(self: Predictor, tokens: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(len(tokens) + 1, 1, device=tokens.device)
        kept[-1] = 0.0
        return table(self, tokens) * kept

    Predictor._table = without


DEFECTS = {"lag": lag, "blind": blind, "transposed": transposed, "no_mask_token": no_mask_token}


def main(arguments: list[str]) -> int:
    """Bring back what is named before `--`, and train as train/pretrain.py does with what follows."""
    end = arguments.index("--")
    for name in arguments[:end]:
        DEFECTS[name]()
    return pretrain.main(arguments[end + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
