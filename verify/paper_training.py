"""What the n = 1000 truncation does to training, beside the exact form: same data, same start, same optimiser.

A policy small enough to be read here: one log-ratio per pair, delta_i, either free (a table) or linear in 20 features,
delta = X theta, trained by RMSprop for one epoch from the reference, delta = 0, as every DPO run does. Labels are
drawn from sigma(beta delta*) with beta ~ Gamma(2, 16.7) and known delta*. Two starts: exactly 0, where case 3 of
App. C has no gradient at all, and noise of sd 0.05 in delta, what a bfloat16 policy against a float32 reference has
at step 0. The objective is a function delta -> log E, so that any other loop can be given the same two. Everything is
in float64: rounding is not the subject.
"""

from collections.abc import Callable
from functools import cache

import torch
from matplotlib.figure import Figure
from torch import Tensor

from verify import plots
from verify.exact import ExactGamma
from verify.paper_numerics import truncated_log_prob
from verify.table import Row, at_most, holds, near, reported

LogProb = Callable[[Tensor], Tensor]
FEATURES, PAIRS, BATCH = 20, 8_192, 64
SOURCE = "Sec. 3.3, App. C.1"


def objectives() -> dict[str, LogProb]:
    k, rate = torch.tensor(2.0, dtype=torch.float64), torch.tensor(16.7, dtype=torch.float64)
    return {"exact": ExactGamma(k, rate).log_choice_prob, "n = 1000": lambda delta: truncated_log_prob(delta, k, rate)}


@cache
def _data() -> tuple[Tensor, Tensor, Tensor]:
    """Features signed so that the first response is the chosen one, training and held-out rows; and theta*."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PAIRS * 4 // 3, FEATURES, generator=generator, dtype=torch.float64)
    theta = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    theta *= 30 / theta.norm()
    exponential = -torch.log(torch.rand(2, len(x), generator=generator)).sum(0)  # Gamma(2, 1)
    chosen = torch.rand(len(x), generator=generator) < torch.sigmoid(exponential / 16.7 * (x @ theta))
    x = torch.where(chosen.unsqueeze(-1), x, -x)
    return x[:PAIRS], x[PAIRS:], theta


def train(log_prob: LogProb, noise: float, lr: float) -> dict[str, list[float]]:
    """One epoch of a linear policy; accuracy on held-out pairs, share of right signs and loss, by update."""
    x, held_out, _ = _data()
    offset = noise * torch.randn(PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([theta], lr=lr)
    history: dict[str, list[float]] = {"accuracy": [], "right": [], "loss": []}
    for step in range(PAIRS // BATCH):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        delta = x[rows] @ theta + offset[rows]
        delta.retain_grad()
        loss = -log_prob(delta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert delta.grad is not None
        history["right"].append((delta.grad < 0).float().mean().item())  # descent raises the chosen one's margin
        margin = held_out @ theta.detach()
        history["accuracy"].append((0.5 + 0.5 * margin.sign()).mean().item())  # ties count half
        history["loss"].append(loss.item())
    return history


def table_policy(log_prob: LogProb, steps: int = 400) -> Tensor:
    """Free delta per pair, 64 pairs, all labels agreeing, started at ±0.05 noise: where they are after `steps` updates.

    RMSprop moves each delta by about its lr, so 400 updates at 1e-3 carry it from 0.05 of noise to beyond 0.4.
    """
    delta = 0.05 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    delta.requires_grad_()
    optimizer = torch.optim.RMSprop([delta], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_prob(delta).sum()).backward()
        optimizer.step()
    return delta.detach()


@cache
def runs(lr: float) -> dict[tuple[str, float], dict[str, list[float]]]:
    return {(name, noise): train(f, noise, lr) for name, f in objectives().items() for noise in (0.0, 0.05)}


def check(full: bool) -> list[Row]:
    _, held_out, theta = _data()
    best = ((held_out @ theta) > 0).float().mean().item()
    se = (best * (1 - best) / len(held_out)) ** 0.5
    rows = []
    for lr in (1e-3, 0.1):
        table = runs(lr)
        for (name, noise), history in table.items():
            start = "delta = 0" if noise == 0 else "delta = 0 + noise, sd 0.05"
            first, last = history["right"][0], history["accuracy"][-1]
            label = f"{name}, {start}, lr {lr:g}"
            if name == "exact":
                rows.append(
                    near(f"{label}: share of pairs whose first update goes the right way", "Eq. 3", 1.0, first, 0.0)
                )
                if lr > 0.01:
                    rows.append(near(f"{label}: held-out accuracy beside that of the true margins", "Eq. 3", best, last,
                                     0.01 + 4 * se, "1 % + 4 s.e."))  # fmt: skip
            else:
                # 1.3 % of the noise lies beyond the turning points at ±0.124, where the sign is right.
                rows.append(
                    at_most(f"{label}: share of pairs whose first update goes the right way", SOURCE, "0", first, 0.05)
                )
            rows.append(reported(f"{label}: held-out accuracy after one epoch ({PAIRS // BATCH} updates)", SOURCE,
                                 f"{best:.3f} (true margins)", f"{last:.3f}{' (ties)' * (last == 0.5)}"))  # fmt: skip
        frozen = len(set(table["n = 1000", 0.0]["loss"])) == 1
        rows.append(
            holds(f"n = 1000 from delta = 0 exactly, lr {lr:g}: the loss never changes", "Eq. 17", "log 2, constant",
                  "constant" if frozen else "changes", frozen)
        )  # fmt: skip
    for name, f in objectives().items():
        delta = table_policy(f)
        text = f"{(delta > 0.2).float().mean():.0%} above 0.2, {(delta < 0).float().mean():.0%} below 0"
        ok = bool((delta > 0.2).all()) == (name == "exact")
        rows.append(
            holds(f"table of 64 margins from noise of sd 0.05, 400 updates, lr 1e-3, {name}: margins", SOURCE,
                  "all above 0.2" if name == "exact" else "not all: traps on either side of 0", text, ok)
        )  # fmt: skip
    return rows


def figures(full: bool) -> dict[str, Figure]:
    figure, axes = plots.panels(2, width=4.8)
    for axis, lr in zip(axes, (1e-3, 0.1), strict=True):
        for (name, noise), history in runs(lr).items():
            colour = plots.BLUE if name == "exact" else plots.RED
            label = f"{name}, " + ("from 0" if noise == 0 else "from noise 0.05")
            axis.plot(history["accuracy"], "-" if noise == 0 else "--", color=colour, label=label)
        axis.set_xlabel("update")
        axis.set_ylabel("held-out accuracy")
        axis.set_title(f"linear policy, RMSprop, lr {lr:g}")
        axis.set_ylim(0, 1)
        axis.legend()
    return {"paper_training": figure}
