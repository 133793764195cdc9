"""Cost of the losses relative to DPO, on this machine: the loss alone, and within a step of a small model.

The paper's Fig. 5 gives 1.02 (LogNormal) and 1.1 (Gamma) for whole training steps. A time depends on the machine and on
what else it does, so ratios are medians over interleaved rounds of one run, and no row has a bound. The loss alone is
forward and backward on 64 pairs, where DPO itself is some tens of microseconds of dispatch; the step is a forward and
backward of a random Llama (4 layers, hidden 256, vocabulary 4,096) on 4 pairs of 96 tokens, with the log-probs.
"""

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
from torch import Tensor

import mixdpo
from verify.exact import Strength
from verify.paper_numerics import truncated_log_prob
from verify.table import Row, reported

SOURCE = "Sec. 5.4, Fig. 5"
PAPER = {"LogNormal, K = 16": "1.02 (a step)", "Gamma, n = 1000 as in the paper": "1.1 (a step)"}


class _Truncated(mixdpo.Gamma):
    def log_choice_prob(self, delta_r: Tensor) -> Tensor:
        return truncated_log_prob(delta_r, self.concentration, self.rate)


def _strengths() -> dict[str, Strength]:
    return {
        "PointMass (DPO)": mixdpo.PointMass(),
        "Gamma, closed form": mixdpo.Gamma(),
        "Gamma, n = 1000 as in the paper": _Truncated(),
        "LogNormal, K = 16": mixdpo.LogNormal(),
        "LogNormal, quadrature": mixdpo.LogNormal(estimator="quadrature"),
    }


def _ratios(runs: dict[str, Callable[[], None]], rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of the first, and medians of each over it, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    first, *_ = times.values()
    return median(first), {name: median(t / b for t, b in zip(ts, first, strict=True)) for name, ts in times.items()}


def _alone(pairs: int) -> dict[str, Callable[[], None]]:
    logps = -100 * torch.rand(4, pairs, generator=torch.Generator().manual_seed(0))
    a, b, c, d = (row.requires_grad_() for row in logps)
    return {
        name: lambda s=strength: mixdpo.mixdpo_loss(a, b, c, d, s)[0].mean().backward()  # type: ignore[misc]
        for name, strength in _strengths().items()
    }


@cache
def _model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
    )


def _step() -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4096, (8, 96), generator=generator)
    reference = -800 * torch.rand(2, 4, generator=generator)

    def step(strength: Strength) -> None:
        logits = _model()(ids).logits[:, :-1].float()
        picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        chosen, rejected = picked[:, 48:].sum(-1).chunk(2)
        mixdpo.mixdpo_loss(chosen, rejected, reference[0], reference[1], strength)[0].mean().backward()

    return {name: lambda s=strength: step(s) for name, strength in _strengths().items()}  # type: ignore[misc]


def check(full: bool) -> list[Row]:
    rows = []
    for what, runs, rounds in (
        ("loss alone, 64 pairs", _alone(64), 100),
        ("loss alone, 4,096 pairs", _alone(4096), 7),
        ("step of a small Llama, 4 pairs", _step(), 40 if full else 7),
    ):
        for call in runs.values():
            call()  # the first call allocates
        seconds, ratios = _ratios(runs, rounds)
        rows.append(reported(f"{what}: DPO, milliseconds", SOURCE, "-", seconds * 1e3))
        rows += [
            reported(f"{what}: {name} / DPO", SOURCE, PAPER.get(name, "-"), ratio)
            for name, ratio in list(ratios.items())[1:]
        ]
    return rows
