"""Weights stored in bfloat16 (App. E) cannot take updates of 5e-7.

bfloat16 has 8 significant bits: near |w| = 0.02 neighbours are 1.2e-4 apart, and w - 5e-7 rounds back to w unless half
the spacing is below 5e-7, that is |w| < 2^-12. RMSprop's update is lr times a ratio near 1, so 5e-7 is the size of a
whole step after the first ones. Measured on a million weights of sd 0.02, the initialisation of the models at hand:
the share that one update changes, and how far 860 updates in one direction carry them. Under float32 storage with
bfloat16 compute every weight moves.
"""

import math

import torch

from verify.table import Row, at_most, near, reported

LR, SD, UPDATES = 5e-7, 0.02, 860
SOURCE = "App. E: 'policy parameters are stored in bfloat16'"


def _weights() -> torch.Tensor:
    return SD * torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def _changed(dtype: torch.dtype) -> float:
    w = _weights().to(dtype)
    return (w - torch.tensor(LR, dtype=dtype) != w).float().mean().item()


def _travel(dtype: torch.dtype) -> float:
    """Mean distance after 860 equal updates, over 860 lr."""
    start = _weights().to(dtype)
    w = start.clone()
    step = torch.tensor(LR, dtype=dtype)
    for _ in range(UPDATES):
        w -= step
    return ((start.double() - w.double()).mean() / (UPDATES * LR)).item()


def check(full: bool) -> list[Row]:
    # |w| < 2^-12: below, half the spacing of 2^(e - 7), at most 2^-21, is less than lr = 2^-20.9.
    expected = math.erf(2**-12 / SD / math.sqrt(2))
    se = math.sqrt(expected * (1 - expected) / 2**20)
    # At the edge of a binade the spacing below is half: the one value 2^-12 moves too, 2^-21 wide.
    edge = 2**-20 / SD
    return [
        near("share of bf16-stored weights that one update of 5e-7 changes", SOURCE, expected, _changed(torch.bfloat16),
             4 * se + edge, "4 s.e."),
        near("share of float32-stored weights that it changes", "mixed precision", 1.0, _changed(torch.float32), 0.0),
        at_most("bf16: mean travel in 860 equal updates, over 860 x 5e-7", SOURCE, "about the share above",
                _travel(torch.bfloat16), 0.05),
        near("float32: mean travel in 860 equal updates, over 860 x 5e-7", "mixed precision", 1.0,
             _travel(torch.float32), 1e-3),
        reported("spacing of bfloat16 at 0.02, over the update", SOURCE, "<= 2 for a change",
                 2.0 ** (math.floor(math.log2(0.02)) - 7) / LR),
    ]  # fmt: skip
