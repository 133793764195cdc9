"""What the objective weighs: w(delta) = d log E / d delta, the factor on a pair's gradient, at equal mean strength.

"MixDPO automatically downweights ambiguous or weakly expressed preferences while preserving strong signals" (Sec. 1).

  delta = 0          every w is E[beta] / 2: an ambiguous pair weighs what it weighs in DPO. Not downweighted.
  near 0             w = m/2 - m^2 delta/4 - (E[beta^3] - ...) delta^2/8 ...: a mixture falls below DPO on either side,
                     by an amount of second order in delta
  delta -> -inf      (strongly contradicted by the model) DPO's w tends to beta; Gamma's falls as k / (rate + |delta|),
                     so log E is not concave and such pairs are discounted, as in a robust loss
  delta -> +inf      (already well fitted) DPO's w falls as beta exp(-beta delta), the mixture's only as a power of
                     delta: it keeps pushing. "Preserving strong signals" holds in this sense, beyond the crossing.

References are derivatives of the accelerated series and of the trapezoid sum in 50 digits.
"""

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import torch
from matplotlib.figure import Figure

import mixdpo
from verify import oracle, plots
from verify.exact import Strength
from verify.table import Row, at_most, holds, near, oracle_failed

K, RATE = 2.0, 16.7
SCALE = 0.6
SOURCE = "Sec. 1: 'downweights ambiguous ...'"


def strengths() -> dict[str, Strength]:
    """Three losses at the mean of Gamma(2, 16.7)."""
    mean = K / RATE
    return {
        "DPO": mixdpo.PointMass(mean, dtype=torch.float64),
        "LogNormal": mixdpo.LogNormal(
            math.log(mean) - SCALE**2 / 2, SCALE, estimator="quadrature", dtype=torch.float64
        ),
        "Gamma": mixdpo.Gamma(K, RATE, dtype=torch.float64),
    }


def weight(strength: Strength, delta: np.ndarray | list[float]) -> np.ndarray:
    d = torch.tensor(np.asarray(delta), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(strength.log_choice_prob(d).sum(), d)[0].numpy()


def _reference(name: str, delta: float) -> tuple[float, float]:
    """w and the disagreement of two routes."""
    if name == "DPO":
        mean = mp.mpf(K / RATE)
        return float(mean / (1 + mp.exp(mean * mp.mpf(delta)))), 0.0
    if name == "Gamma":
        tails = oracle.gamma_routes(abs(delta), K, RATE)
    else:
        loc = math.log(K / RATE) - SCALE**2 / 2
        tails = [f(abs(delta), loc, SCALE) for f in (oracle.lognormal_trapezoid, oracle.lognormal_panels)]
    return float(oracle.choice(tails[0], delta < 0)[1]), float(oracle.disagreement(tails))


def crossing(first: Strength, second: Strength, low: float, high: float) -> float:
    """The delta in (low, high) where the weights are equal, by bisection."""

    def gap(d: float) -> float:
        return float(weight(first, [d])[0] - weight(second, [d])[0])

    start = gap(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) * start > 0 else (low, middle)
    return high


def check(full: bool) -> list[Row]:
    models, rows, apart = strengths(), [], 0.0
    grid = (-300.0, -30.0, -10.0, -1.0, 0.0, 1.0, 10.0, 30.0, 300.0)
    for name, model in models.items():
        got, worst = weight(model, list(grid)), 0.0
        for delta, w in zip(grid, got, strict=True):
            want, gap = _reference(name, delta)
            apart = max(apart, gap)
            worst = max(worst, abs(w / want - 1))
        rows.append(at_most(f"{name}: w at delta = 0, ±1, ±10, ±30, ±300 against the reference", "Eq. 3",
                            "relative error", worst, 1e-10))  # fmt: skip
    if not apart < oracle.AGREE:
        return [oracle_failed("references of w agree", "oracle.py", apart, float(oracle.AGREE))]
    mean = models["Gamma"].mean.item()
    for name, model in models.items():
        rows.append(near(f"{name}: w(0) = E[beta] / 2, an ambiguous pair weighs as in DPO", SOURCE, mean / 2,
                         float(weight(model, [0.0])[0]), 1e-12))  # fmt: skip
    for delta, dpo, gamma in ((-30.0, 0.117, 0.040), (30.0, 0.0032, 0.0043)):
        for name, want in (("DPO", dpo), ("Gamma", gamma)):
            digit = 0.0005 if want > 0.01 else 0.00005
            rows.append(near(f"{name}: w({delta:g})", SOURCE, want, float(weight(models[name], [delta])[0]), digit,
                             "printed digits"))  # fmt: skip
    far = np.array([-1e3, -1e4, -1e5])
    ratio = weight(models["Gamma"], far) * (RATE - far) / K
    rows.append(
        near("Gamma: w(delta) (rate + |delta|) / k at delta = -1e5: contradicted pairs are discounted", SOURCE, 1.0,
             float(ratio[-1]), 1e-3)
    )  # fmt: skip
    rows.append(near("DPO: w(-1e5) / beta: contradicted pairs keep full weight", SOURCE, 1.0,
                     float(weight(models["DPO"], [-1e5])[0]) / mean, 1e-12))  # fmt: skip
    for name in ("Gamma", "LogNormal"):
        at = crossing(models[name], models["DPO"], 0.5, 100.0)

        def excess(low: float, high: float, model: Strength = models[name]) -> np.ndarray:
            line = np.linspace(low, high, 200)
            return weight(model, line) - weight(models["DPO"], line)

        ordered = bool(
            (excess(-100, -0.5) < 0).all() and (excess(0.5, at - 1) < 0).all() and (excess(at + 1, 300) > 0).all()
        )
        rows.append(
            holds(f"{name}: w below DPO's for all delta < 0 and for 0 < delta < crossing, above beyond it", SOURCE,
                  "one crossing at delta > 0", f"crossing at delta = {at:.3f}",
                  ordered)
        )  # fmt: skip
        # d log E falls with delta wherever log E is concave.
        left = weight(models[name], np.linspace(-300, 0, 3001))
        peak = float(np.linspace(-300, 0, 3001)[left.argmax()])
        rows.append(
            holds(f"{name}: log E is not concave, w has its maximum at a finite delta < 0", SOURCE,
                  "maximum inside (-300, 0)", f"w = {left.max():.4f} at delta = {peak:.1f}", -299 < peak < -0.1)
        )  # fmt: skip
    verdict = (
        "equal to DPO at 0, and below it near 0 by second order only: ambiguous pairs are not singled out; "
        "contradicted pairs are downweighted; "
        "well-fitted pairs, beyond the crossing, keep more weight than in DPO"
    )
    rows.append(Row("in plain words", SOURCE, "the claim", verdict, "none", "reported"))
    return rows


def figures(full: bool) -> dict[str, Figure]:
    models = strengths()
    look: dict[str, tuple[str, str]] = {
        "DPO": (plots.BLACK, ":"), "LogNormal": (plots.ORANGE, "--"), "Gamma": (plots.BLUE, "-")
    }  # fmt: skip
    figure, (choice, *axes) = plots.panels(3, width=4.2)
    line = np.linspace(-60, 60, 601)
    for name, model in models.items():
        colour, style = look[name]
        with torch.no_grad():
            chosen = model.log_choice_prob(torch.from_numpy(line)).exp()
        choice.plot(line, chosen, style, color=colour, lw=2, label=name)
    choice.set(xlabel="delta (nats)", ylabel="E[sigma(beta delta)]", title="probability of the choice")
    choice.legend()
    plotters: list[Callable[..., list]] = [axes[0].plot, axes[1].semilogy]
    for axis, plot, grid in zip(axes, plotters, (np.linspace(-100, 60, 801), np.linspace(0, 150, 601)), strict=True):
        for name, model in models.items():
            colour, style = look[name]
            plot(grid, weight(model, grid), style, color=colour, lw=2, label=name)
        for name in ("LogNormal", "Gamma"):
            at = crossing(models[name], models["DPO"], 0.5, 100.0)
            axis.plot(at, weight(models[name], [at])[0], "o", color=look[name][0], mec=plots.BLACK, zorder=3)
            if axis is axes[1]:
                axis.annotate(
                    f"{at:.1f}",
                    (at, weight(models[name], [at])[0]),
                    (6, 6) if name == "Gamma" else (-28, -14),
                    textcoords="offset points",
                )
        axis.set_xlabel("delta (nats)")
        axis.set_ylabel("w = d log E / d delta")
    middle = axes[0].plot(0, K / RATE / 2, "s", color=plots.BLACK, label="E[beta] / 2 at 0")
    axes[0].set_title("weight of a pair in the gradient")
    axes[1].set_title("of fitted pairs; dots: crossings with DPO")
    axes[0].legend(handles=middle, loc="lower left")
    return {"weights": figure}
