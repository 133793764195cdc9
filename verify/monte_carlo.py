"""The paper's LogNormal estimator, log (1/K) sum_k sigma(beta_k delta): its limit, its bias and its variance.

With p the mean over K draws, mu its expectation and V the variance of one sigma(beta delta),
E[log p] = log mu - V / (2 K mu^2) + (third moment / (3 mu^3) - 3 V^2 / (4 mu^4)) / K^2 + O(K^-3): the log of an
unbiased estimate is biased, and so is its gradient (the derivative of the bias), against "unbiased gradient estimates"
of Sec. 3.3 and App. B. mu and the moments come from 4,000-node quadrature in float64; E[log p] is a mean over many
replications of mixdpo.py's own estimator, with (p - mu) / mu, whose expectation is exactly 0, subtracted. Bounds are
4 standard errors plus, where the leading term is the prediction, twice the next term. For K = 1 the expectation is
E[log sigma], a one-dimensional integral: no expansion is needed.

The other claim of App. B, that the reparameterised gradient of the inner expectation "has lower variance than score
function estimators", is tested for d/d loc and d/d scale, exactly (both variances are integrals), against the plain
score function and against the one with its best constant baseline.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from verify import plots
from verify.exact import ExactLogNormal
from verify.table import Row, at_most, holds, near, reported

LOC, SCALE = -2.3, 0.6
DELTAS = (-30.0, -10.0, 10.0)
DRAWS = (1, 4, 16, 64, 256)
SOURCE = "Sec. 3.3, App. B (Eqs. 7, 8)"


def _nodes() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    return x, torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])


@dataclass(frozen=True)
class Moments:
    """Of sigma(beta delta) for one draw; the bias terms are coefficients of 1 / K and 1 / K^2."""

    mean: float
    variance: float
    log_bias_one: float
    first: float
    second: float
    d_log: float
    d_first: float
    d_one: float


@cache
def moments(delta: float) -> Moments:
    x, w = _nodes()
    d = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    z = torch.exp(LOC + SCALE * x) * d
    sigma = torch.sigmoid(z)
    mean = (w * sigma).sum()
    centred = sigma - mean
    variance, third = (w * centred**2).sum(), (w * centred**3).sum()
    one = (w * torch.nn.functional.logsigmoid(z)).sum()
    first = -variance / (2 * mean**2)
    second = third / (3 * mean**3) - 3 * variance**2 / (4 * mean**4)
    d_log, d_first, d_one = (
        torch.autograd.grad(y, d, retain_graph=True)[0].item() for y in (torch.log(mean), first, one)
    )
    return Moments(
        mean.item(), variance.item(), (one - torch.log(mean)).item(), first.item(), second.item(), d_log, d_first, d_one
    )


def _estimate(delta: float, draws: int, replications: int, seed: int) -> tuple[Tensor, Tensor]:
    """log p and d log p / d delta of mixdpo.py's estimator, one entry per replication."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(replications, draws, generator=generator, dtype=torch.float64)
    d = torch.full((replications,), delta, dtype=torch.float64, requires_grad=True)
    loc, scale = torch.tensor(LOC, dtype=torch.float64), torch.tensor(SCALE, dtype=torch.float64)
    log_p = ExactLogNormal(loc, scale, "monte_carlo", draws).log_choice_prob(d, noise=noise)
    return log_p.detach(), torch.autograd.grad(log_p.sum(), d)[0]


@dataclass(frozen=True)
class Bias:
    value: float
    value_se: float
    gradient: float
    gradient_se: float


@cache
def bias(delta: float, draws: int, full: bool) -> Bias:
    m = moments(delta)
    x, w = _nodes()
    slope = (w * torch.exp(LOC + SCALE * x) * (s := torch.sigmoid(delta * torch.exp(LOC + SCALE * x))) * (1 - s)).sum()
    values, gradients = [], []
    chunks, per_chunk = (40 if full else 4), 2**20 // draws
    for seed in range(chunks):
        log_p, gradient = _estimate(delta, draws, per_chunk, seed)
        p = torch.exp(log_p)
        # Both subtracted terms have expectation 0: (p - mu) / mu, and its derivative in delta.
        values.append(log_p - math.log(m.mean) - (p - m.mean) / m.mean)
        gradients.append(gradient - m.d_log - (p * gradient / m.mean - p * slope / m.mean**2))
    value, gradient = torch.cat(values), torch.cat(gradients)
    root = math.sqrt(len(value))
    return Bias(value.mean().item(), value.std().item() / root, gradient.mean().item(), gradient.std().item() / root)


def _bias_rows(full: bool) -> list[Row]:
    rows = []
    for delta in DELTAS:
        m = moments(delta)
        for draws in DRAWS:
            b = bias(delta, draws, full)
            for what, got, error, one, leading in (
                ("log p", b.value, b.value_se, m.log_bias_one, m.first / draws),
                ("d log p / d delta", b.gradient, b.gradient_se, m.d_one - m.d_log, m.d_first / draws),
            ):
                if draws == 1:
                    expected, slack, why = one, 0.0, "4 s.e."
                else:
                    expected, why = leading, "4 s.e. + 2 next terms"
                    slack = 2 * abs(m.second) / draws**2 if what == "log p" else 2 * _next_gradient(delta) / draws**2
                rows.append(
                    near(f"bias of {what}, K = {draws}, delta = {delta:g}", SOURCE + " say unbiased" * (draws == 16),
                         expected, got, 4 * error + slack, why)
                )  # fmt: skip
    b, m = bias(-30.0, 16, full), moments(-30.0)
    rows.append(
        holds("the gradient at K = 16 is biased: bias over its standard error, delta = -30", "Sec. 3.3: 'unbiased'",
              "|z| > 4", f"{b.gradient / b.gradient_se:.0f} ({b.gradient / m.d_log:+.2%} of the gradient)",
              abs(b.gradient / b.gradient_se) > 4)
    )  # fmt: skip
    return rows


def _next_gradient(delta: float) -> float:
    """Size of the derivative of the 1 / K^2 term, by a central difference."""
    h = 1e-3 * abs(delta)
    return abs(moments(delta + h).second - moments(delta - h).second) / (2 * h)


def _limit_rows(full: bool) -> list[Row]:
    """K to infinity: the estimate tends to the integral, and its rms error times sqrt(K) is sd / mean."""
    rows = []
    for delta in (-30.0, 10.0):
        m = moments(delta)
        sd = math.sqrt(m.variance) / m.mean
        draws = 2**20
        log_p, _ = _estimate(delta, draws, 1, seed=7)
        error = log_p.item() - math.log(m.mean)
        rows.append(near(f"log p - exact at K = 2^20, delta = {delta:g}", SOURCE, 0.0, error, 4 * sd / 1024, "4 s.e."))
        for draws in (64, 1024):
            n = 2**20 // draws * (8 if full else 2)
            p = torch.exp(_estimate(delta, draws, n, seed=11)[0]) / m.mean - 1
            square = p.square() * draws / sd**2
            rms, spread = math.sqrt(square.mean().item()), square.std().item() / math.sqrt(n) / 2
            rows.append(
                near(f"rms relative error x sqrt(K) / (sd / mean), K = {draws}, delta = {delta:g}", SOURCE, 1.0, rms,
                     4 * spread, "4 s.e.")
            )  # fmt: skip
    return rows


@cache
def variances(delta: float) -> dict[str, tuple[float, float, float]]:
    """Per draw: the variance of the reparameterised, the score-function and the best-baseline gradient of E[sigma]."""
    x, w = _nodes()
    z = torch.exp(LOC + SCALE * x) * delta
    sigma = torch.sigmoid(z)
    result = {}
    for name, path, score in (("loc", torch.ones_like(x), x / SCALE), ("scale", x, (x.square() - 1) / SCALE)):
        pathwise = z * sigma * (1 - sigma) * path
        true = (w * pathwise).sum()
        baseline = (w * score.square() * sigma).sum() / (w * score.square()).sum()
        second = [(w * g.square()).sum() for g in (pathwise, sigma * score, (sigma - baseline) * score)]
        plain, scored, based = (float(m - true**2) for m in second)
        result[name] = plain, scored, based
    return result


def _variance_rows() -> list[Row]:
    rows = []
    grid = [sign * 10**e for sign in (-1, 1) for e in np.linspace(-1, 3, 41)]
    for name in ("loc", "scale"):
        plain = [variances(d)[name][1] / variances(d)[name][0] for d in grid]
        best = [variances(d)[name][2] / variances(d)[name][0] for d in grid]
        for label, ratio in (("score function", plain), ("score function with the best constant baseline", best)):
            at = grid[int(np.argmin(ratio))]
            lower = min(ratio) > 1
            claim = f"d/d {name}: reparameterised variance below that of the {label}, 0.1 <= |delta| <= 1000"
            text = f"{min(ratio):.3g} to {max(ratio):.3g}, least at delta = {at:.3g}"
            rows.append(
                holds(claim, "App. B", "variance ratio > 1", text, lower)
                if label == "score function"
                else reported(claim, "App. B", "variance ratio > 1", text)
            )
    # The integrals above, against samples: a wrong formula would show here.
    delta, generator = -10.0, torch.Generator().manual_seed(3)
    eps = torch.randn(2**20, generator=generator, dtype=torch.float64)
    loc = torch.full((2**20,), LOC, dtype=torch.float64, requires_grad=True)
    sigma = torch.sigmoid(torch.exp(loc + SCALE * eps) * delta)
    sample = torch.autograd.grad(sigma.sum(), loc)[0]
    want = variances(delta)["loc"][0]
    centred = (sample - sample.mean()).square()
    rows.append(
        at_most("variance of the reparameterised gradient, samples over integral - 1, in s.e.", "monte_carlo.py", "< 4",
                abs(centred.mean().item() - want) / (centred.std().item() / 2**10), 4.0)
    )  # fmt: skip
    return rows


def check(full: bool) -> list[Row]:
    return _bias_rows(full) + _limit_rows(full) + _variance_rows()


def figures(full: bool) -> dict[str, Figure]:
    figure, axes = plots.panels(3)
    for delta, colour, marker in zip(DELTAS, (plots.RED, plots.ORANGE, plots.BLUE), "osv", strict=True):
        m = moments(delta)
        for axis, attribute, leading in ((axes[0], "value", m.first), (axes[1], "gradient", m.d_first)):
            measured = np.array([getattr(bias(delta, k, full), attribute) for k in DRAWS])
            error = np.array([getattr(bias(delta, k, full), attribute + "_se") for k in DRAWS])
            axis.errorbar(DRAWS, np.abs(measured), 4 * error, fmt=marker, color=colour, label=f"delta = {delta:g}")
            axis.loglog(DRAWS, [abs(leading) / k for k in DRAWS], color=colour, lw=1)
    axes[0].set_title("|bias| of log p; lines: Var / (2 K mean²)")
    axes[1].set_title("|bias| of d log p / d delta; lines: theory")
    for axis in axes[:2]:
        axis.set_xlabel("draws K (paper: 16)")
        axis.legend()
    grid = np.logspace(-1, 3, 81)
    for sign, style in ((-1, "-"), (1, "--")):
        rows = [variances(sign * d)["loc"] for d in grid]
        side = "delta < 0" if sign < 0 else "delta > 0"
        axes[2].loglog(grid, [r[1] / r[0] for r in rows], style, color=plots.BLUE, label=f"score, {side}")
        axes[2].loglog(grid, [r[2] / r[0] for r in rows], style, color=plots.ORANGE, label=f"+ baseline, {side}")
    axes[2].axhline(1, color=plots.BLACK, lw=1)
    axes[2].set_xlabel("|delta|")
    axes[2].set_title("d/d loc: variance over reparameterised")
    axes[2].legend(fontsize=8)
    return {"monte_carlo": figure}
