"""Plain DPO as the limit: PointMass itself, Gamma as k grows and LogNormal as sigma falls, at a fixed mean.

With Var[beta] small, E sigma(beta d) = sigma(m d) + sigma''(m d) d^2 Var / 2 + ..., so the distance to DPO's loss is
proportional to Var = m^2 / k for Gamma and m^2 (exp(sigma^2) - 1) for LogNormal: the rate is 1/k, or sigma^2, and
the constant is known. Measured: the slope in log-log scale and the distance over its prediction at the smallest Var
where it is still well above rounding. Rewards are m r(x, y) and must agree at every k, to rounding.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure

import mixdpo
from verify import plots
from verify.exact import Strength
from verify.table import Row, at_most, holds, near

MEAN = 0.1
CONCENTRATIONS = tuple(10.0**j for j in range(1, 10))
SCALES = tuple(10.0 ** (-j / 2) for j in range(1, 9))


def _log_probs() -> tuple[torch.Tensor, ...]:
    """Four rows of 64 log-probs; delta_r from -60 to 60, and 0 for the first pair."""
    generator = torch.Generator().manual_seed(0)
    reference_chosen, reference_rejected = -200 * torch.rand(2, 64, generator=generator, dtype=torch.float64)
    delta = torch.linspace(-60, 60, 64, dtype=torch.float64)
    delta[0] = 0
    half = torch.randn(64, generator=generator, dtype=torch.float64)
    policy = reference_chosen + delta / 2 + half, reference_rejected - delta / 2 + half
    return *policy, reference_chosen, reference_rejected


def _loss_and_gradients(loss: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Losses, both rewards, and the gradients of the summed loss in the policy's log-probs."""
    chosen, rejected, *reference = _log_probs()
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, chosen_rewards, rejected_rewards = loss(chosen, rejected, *reference)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return losses.detach(), chosen_rewards, rejected_rewards, *gradients


def _dpo() -> tuple[torch.Tensor, ...]:
    return _loss_and_gradients(lambda a, b, c, d: mixdpo.dpo_loss(a, b, c, d, MEAN))


def _mixture(strength: Strength) -> tuple[torch.Tensor, ...]:
    return _loss_and_gradients(lambda a, b, c, d: mixdpo.mixdpo_loss(a, b, c, d, strength))


@cache
def distances(family: str) -> list[tuple[float, float, float, float, float]]:
    """(Var / m^2, loss, gradient, reward distance to DPO, loss distance over its prediction), largest over pairs."""
    dpo, out = _dpo(), []
    chosen, rejected, reference_chosen, reference_rejected = _log_probs()
    delta = (chosen - reference_chosen) - (rejected - reference_rejected)
    p = torch.sigmoid(MEAN * delta)
    curvature = -(p * (1 - p) * (1 - 2 * p)) * delta.square() / 2 / p  # of -log E, per unit of variance
    for x in CONCENTRATIONS if family == "Gamma" else SCALES:
        if family == "Gamma":
            strength: Strength = mixdpo.Gamma(x, x / MEAN, dtype=torch.float64)
            relative_variance = 1 / x
        else:
            loc = math.log(MEAN) - x * x / 2
            strength = mixdpo.LogNormal(loc, x, estimator="quadrature", dtype=torch.float64)
            relative_variance = math.expm1(x * x)
        got = _mixture(strength)
        loss, chosen_reward, rejected_reward, chosen_gradient, rejected_gradient = [
            (g - d).abs().max().item() for g, d in zip(got, dpo, strict=True)
        ]
        predicted = -curvature * MEAN**2 * relative_variance
        ratio = (got[0] - dpo[0]).norm().item() / predicted.norm().item()
        out.append(
            (
                relative_variance,
                loss,
                max(chosen_gradient, rejected_gradient),
                max(chosen_reward, rejected_reward),
                ratio,
            )
        )
    return out


def check(full: bool) -> list[Row]:
    rows = []
    for name, got, want in zip(
        ("loss", "chosen reward", "rejected reward", "gradient (chosen)", "gradient (rejected)"),
        _mixture(mixdpo.PointMass(MEAN, dtype=torch.float64)),
        _dpo(),
        strict=True,
    ):
        same = torch.equal(got, want)
        rows.append(
            holds(f"PointMass(0.1) and dpo_loss(beta=0.1): {name}", "Sec. 2.3", "equal bit by bit",
                  "equal" if same else f"{(got - want).abs().max():.1e} apart", same)
        )  # fmt: skip
    for family, law in (("Gamma", "1/k"), ("LogNormal", "sigma^2")):
        table = distances(family)
        # Between 1e-3, where the next order is below 1 %, and 1e-6, where rounding is.
        inside = [row for row in table if 1e-6 <= row[0] <= 1.1e-3]
        variance = np.log([row[0] for row in inside])
        for column, what in ((1, "loss"), (2, "gradient")):
            slope = np.polyfit(variance, np.log([row[column] for row in inside]), 1)[0]
            rows.append(
                near(f"{family}: {what} - DPO's falls as {law}: slope in Var / mean^2", "Sec. 2.3", 1.0, slope, 0.01)
            )
        closest = min(inside)
        rows.append(
            near(f"{family}: loss - DPO's over sigma'' d^2 Var / (2 sigma), at Var / mean^2 = {closest[0]:.0e}",
                 "Taylor expansion", 1.0, closest[4], 0.01, "next order")
        )  # fmt: skip
        nearest = min(table)
        rows.append(
            at_most(f"{family}: loss - DPO's at Var / mean^2 = {nearest[0]:.0e}", "Sec. 2.3", "0", nearest[1], 1e-6)
        )
        rows.append(
            at_most(f"{family}: rewards - DPO's, largest over all Var", "Eq. 2, E[beta] r", "0",
                    max(row[3] for row in table), 1e-13)
        )  # fmt: skip
    return rows


def figures(full: bool) -> dict[str, Figure]:
    figure, axes = plots.panels(2)
    for axis, family, colour in zip(axes, ("Gamma", "LogNormal"), (plots.BLUE, plots.ORANGE), strict=True):
        table = distances(family)
        variance = [row[0] for row in table]
        axis.loglog(variance, [row[1] for row in table], "o-", color=colour, label="loss")
        axis.loglog(variance, [row[2] for row in table], "s--", color=plots.BLACK, label="gradient")
        axis.set_xlabel("Var[beta] / mean² (1/k or about sigma²)")
        axis.set_ylabel("largest distance to DPO")
        axis.set_title(f"{family}, mean 0.1")
        axis.legend()
    return {"point_mass": figure}
