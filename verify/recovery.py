"""Can the distribution of strengths be recovered? Choices simulated from known margins, fitted by maximum likelihood.

50 margins |delta_i|, the quantiles of |N(0, 20^2)| nats (a choice at -delta is the other choice at delta), each with
N / 50 choices; for every choice its own beta is drawn and then the choice. With the margins known the likelihood
depends on counts only, so N = 1e5 costs what 1e3 does. The fit is Fisher scoring in (log mean, v = cv^2), the
derivatives by forward-mode autograd through mixdpo.py; v is bounded below by 1e-6, a point mass. Standard errors are
those of the expected information.

Monte Carlo: the simulated likelihood, log of a mean over K draws, 2,500 sets of draws (10,000 with --full); above that
number several choices share a set, which leaves the expectation, hence the bias, as it is.

Judged, over 200 replications at N = 1e5: bias within 4 standard errors of 0 and coverage of the nominal 95 % interval
within 4 binomial standard errors (0.062) for the exact estimators, and, for choices made with one fixed beta, that the
likelihood ratio test of cv = 0 rejects at its nominal 5 % (asymptotically half chi-squared(1), critical value 2.706).
Smaller N and Monte Carlo are reported: there the asymptotics need not hold, or the bias is the finding.

What is identified: only beta delta enters, so the mean is confounded with the scale of the margins (which training
also changes); cv is not, but it is seen through the curvature of the choice curve alone, from delta^3 on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import jacfwd, vmap

from verify import plots
from verify.exact import ExactGamma, ExactLogNormal
from verify.table import Row, at_most, holds, near, reported

MARGINS, SPREAD, REPLICATIONS = 50, 20.0, 200
MEAN = 0.12
TRUE_CV = {"LogNormal": math.sqrt(math.expm1(0.36)), "Gamma": math.sqrt(0.5)}  # scale 0.6, k = 2
FLOOR = 1e-6
SIZES = (1_000, 10_000, 100_000)
SOURCE = "Sec. 5.3"


def margins(spread: float = SPREAD) -> Tensor:
    quantile = 0.5 + (torch.arange(MARGINS, dtype=torch.float64) + 0.5) / (2 * MARGINS)
    return spread * torch.special.ndtri(quantile)


def log_prob(family: str, theta: Tensor, delta: Tensor, noise: Tensor | None = None) -> Tensor:
    """log E[sigma(beta delta)] with theta = (log mean, cv^2), by mixdpo.py."""
    log_mean, v = theta[0], theta[1]
    if family == "Gamma":
        return ExactGamma(1 / v, torch.exp(-log_mean) / v).log_choice_prob(delta)
    variance = torch.log1p(v)
    loc, scale = log_mean - variance / 2, torch.sqrt(variance)
    if noise is None:
        return ExactLogNormal(loc, scale).log_choice_prob(delta)
    return ExactLogNormal(loc, scale, "monte_carlo", noise.shape[-1]).log_choice_prob(delta, noise=noise)


def simulate(family: str, cv: float, size: int, replications: int, seed: int, most_sets: int = 2_500) -> np.ndarray:
    """Number of choices for the first response at each margin, (replications, MARGINS, sets).

    Choices of one set share the draws of a Monte Carlo fit.
    """
    rng, delta = np.random.default_rng(seed), margins().numpy()
    per_margin, sets = size // MARGINS, min(size, most_sets) // MARGINS
    counts = np.empty((replications, MARGINS, sets), dtype=np.int64)
    for r in range(replications):
        shape = (MARGINS, per_margin)
        if cv == 0:
            beta = np.full(shape, MEAN)
        elif family == "Gamma":
            beta = rng.gamma(cv**-2, MEAN * cv**2, shape)
        else:
            sigma = math.sqrt(math.log1p(cv**2))
            beta = np.exp(math.log(MEAN) - sigma**2 / 2 + sigma * rng.standard_normal(shape))
        chosen = rng.random(shape) < 1 / (1 + np.exp(-beta * delta[:, None]))
        counts[r] = chosen.reshape(MARGINS, sets, -1).sum(-1)
    return counts


@dataclass(frozen=True)
class Fit:
    """Per replication: mean, cv, their standard errors, and the log-likelihood."""

    mean: np.ndarray
    cv: np.ndarray
    mean_se: np.ndarray
    cv_se: np.ndarray
    log_likelihood: np.ndarray


def _scoring(
    step: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], theta: Tensor, free: bool, tolerance: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher scoring for a batch of theta (r, 2) from step(theta) = score (r, 2), information (r, 2, 2), log L (r,)."""
    for _ in range(most):
        score, information, _ = step(theta)
        move = torch.linalg.solve(information, score)
        v = theta[:, 1]
        # Between a quarter and four times the last value: the information changes with v.
        new_v = torch.minimum(torch.maximum(v + move[:, 1], v / 4), 4 * v).clamp(min=FLOOR)
        new_v = new_v if free else v
        bounded = (new_v <= FLOOR) | ~torch.full_like(v, free, dtype=torch.bool)
        alone = score[:, 0] / information[:, 0, 0]
        log_mean = theta[:, 0] + torch.where(bounded, alone, move[:, 0]).clamp(-1, 1)
        new = torch.stack([log_mean, new_v], 1)
        done = (new - theta).abs().max() < tolerance
        theta = new
        if done:
            break
    _, information, log_likelihood = step(theta)
    return theta, information, log_likelihood


def _step(
    family: str, theta: Tensor, delta: Tensor, counts: Tensor, per_row: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, expected information and log-likelihood of one replication; rows of delta with per_row choices each."""

    def twice(t: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_prob(family, t, delta, noise)
        return log_p, log_p

    slope, log_p = jacfwd(twice, has_aux=True)(theta)
    p = torch.exp(log_p).clamp(1e-12, 1 - 1e-7)
    d = p.unsqueeze(-1) * slope
    residual = (counts - per_row * p) / (p * (1 - p))
    score = (residual.unsqueeze(-1) * d).sum(0)
    information = per_row * (d.unsqueeze(-1) * d.unsqueeze(-2) / (p * (1 - p))[:, None, None]).sum(0)
    return score, information, (counts * torch.log(p) + (per_row - counts) * torch.log1p(-p)).sum()


def _collect(theta: Tensor, information: Tensor, log_likelihood: Tensor) -> Fit:
    covariance = torch.linalg.inv(information.double())
    mean, cv = torch.exp(theta[:, 0]), torch.sqrt(theta[:, 1])
    mean_se = mean * torch.sqrt(covariance[:, 0, 0])
    cv_se = torch.sqrt(covariance[:, 1, 1]) / (2 * cv)
    return Fit(*(x.double().numpy() for x in (mean, cv, mean_se, cv_se, log_likelihood)))


def fit_exact(family: str, counts: np.ndarray, size: int, free: bool = True) -> Fit:
    """All replications at once. free=False holds cv at 0 (v at its floor)."""
    delta, y = margins(), torch.from_numpy(counts.sum(-1)).double()
    start = torch.tensor([math.log(0.1), 0.3 if free else FLOOR], dtype=torch.float64).expand(len(y), 2)
    batched = vmap(lambda t, c: _step(family, t, delta, c, size // MARGINS))
    return _collect(*_scoring(lambda theta: batched(theta, y), start, free, 1e-7, 30))


def fit_monte_carlo(counts: np.ndarray, size: int, draws: int, seed: int) -> Fit:
    """In float32, whose rounding is far below the noise of the draws; some replications at a time."""
    delta = margins().float().repeat_interleave(counts.shape[-1])
    per_row = size // len(delta)
    batched = vmap(lambda t, c, e: _step("LogNormal", t, delta, c, per_row, e))
    generator, parts = torch.Generator().manual_seed(seed), []
    for y in torch.from_numpy(counts).float().flatten(1).split(max(1, 2**21 // (len(delta) * draws))):
        noise = torch.randn(len(y), len(delta), draws, generator=generator)

        def step(theta: Tensor, y: Tensor = y, noise: Tensor = noise) -> tuple[Tensor, Tensor, Tensor]:
            score, information, log_likelihood = batched(theta.float(), y, noise)
            return score.double(), information.double(), log_likelihood.double()

        start = torch.tensor([math.log(MEAN), 0.4], dtype=torch.float64).expand(len(y), 2)
        parts.append(_scoring(step, start, True, 1e-3, 12))
    return _collect(*(torch.cat(x) for x in zip(*parts, strict=True)))


@cache
def experiment(name: str, size: int, full: bool) -> Fit:
    """name: 'Gamma', 'LogNormal quadrature' or 'LogNormal K = 16'."""
    family, _, estimator = name.partition(" ")
    replications = REPLICATIONS * (5 if full else 1)
    counts = simulate(family, TRUE_CV[family], size, replications, size, 10_000 if full else 2_500)
    if estimator.startswith("K"):
        return fit_monte_carlo(counts, size, int(estimator.split()[-1]), seed=size + 1)
    return fit_exact(family, counts, size)


@cache
def homogeneous(family: str, size: int) -> tuple[Fit, np.ndarray]:
    """Fits to choices made with one beta, and the likelihood ratio against cv = 0."""
    counts = simulate(family, 0.0, size, REPLICATIONS, seed=size + 2)
    free, fixed = fit_exact(family, counts, size), fit_exact(family, counts, size, free=False)
    return free, 2 * (free.log_likelihood - fixed.log_likelihood)


def _bias(values: np.ndarray, truth: float) -> tuple[float, float]:
    return float(values.mean() - truth), float(values.std(ddof=1) / math.sqrt(len(values)))


def _coverage(values: np.ndarray, se: np.ndarray, truth: float) -> float:
    return float((np.abs(values - truth) <= 1.959964 * se).mean())


def _recovery_rows(full: bool) -> list[Row]:
    rows = []
    names = ["Gamma", "LogNormal quadrature", *(f"LogNormal K = {k}" for k in (4, 16, 64))]
    for name in names:
        truth = TRUE_CV[name.split()[0]]
        for size in SIZES:
            fit = experiment(name, size, full)
            for what, values, se, true in (("mean", fit.mean, fit.mean_se, MEAN), ("cv", fit.cv, fit.cv_se, truth)):
                bias, error = _bias(values, true)
                cover = _coverage(values, se, true)
                label = f"{name}, N = {size:,}: {what}"
                exact = "K" not in name
                if exact and size == SIZES[-1]:
                    n = len(values)
                    rows.append(near(f"{label}, bias over {true:.4g}", SOURCE, 0.0, bias / true, 4 * error / true,
                                     "4 s.e."))  # fmt: skip
                    rows.append(near(f"{label}, coverage of the 95 % interval", SOURCE, 0.95, cover,
                                     4 * math.sqrt(0.95 * 0.05 / n), "4 s.e."))  # fmt: skip
                else:
                    text = (
                        f"{bias / true:+.2%} ± {error / true:.2%} (1 s.e.); sd {values.std() / true:.1%}; {cover:.3f}"
                    )
                    rows.append(reported(f"{label}: bias / {true:.4g}; sd; coverage", SOURCE, "0; -; 0.95", text))
    return rows


def _shrinkage_rows(full: bool) -> list[Row]:
    """Monte Carlo's bias of the log is larger where Var is: it taxes spread, and cv comes out too small."""
    rows = []
    for draws in (4, 16, 64):
        fit = experiment(f"LogNormal K = {draws}", SIZES[-1], full)
        bias, error = _bias(fit.cv, TRUE_CV["LogNormal"])
        claim = f"K = {draws}, N = 100,000: Monte Carlo underestimates cv (bias over its s.e.)"
        text = f"{bias / error:.0f} ({bias / TRUE_CV['LogNormal']:+.1%} of cv)"
        if draws <= 16:
            rows.append(holds(claim, "App. B: 'unbiased'", "< -4", text, bias < -4 * error))
        else:
            rows.append(reported(claim, "App. B: 'unbiased'", "0 if unbiased", text))
    return rows


def _homogeneous_rows() -> list[Row]:
    rows = []
    for family in ("Gamma", "LogNormal"):
        for size in SIZES[1:]:
            fit, ratio = homogeneous(family, size)
            rejected = float((ratio > 2.7055).mean())
            label = f"{family}, choices with one beta, N = {size:,}"
            rows.append(near(f"{label}: cv = 0 rejected at the 5 % level", SOURCE + ": 'collapses'", 0.05, rejected,
                             4 * math.sqrt(0.05 * 0.95 / REPLICATIONS), "4 s.e."))  # fmt: skip
            at_zero = float((fit.cv <= 1.001 * math.sqrt(FLOOR)).mean())
            text = f"{at_zero:.0%}; {np.median(fit.cv):.3f}; {np.quantile(fit.cv, 0.95):.3f}"
            rows.append(reported(f"{label}: share of fits with cv = 0; median; 95 % point of cv", SOURCE,
                                 "about half; falls as N^-1/4", text))  # fmt: skip
            both = experiment("Gamma" if family == "Gamma" else "LogNormal quadrature", size, False)
            overlap = float(np.quantile(fit.cv, 0.95) / both.cv.min())
            claim = f"{label}: 95 % point of cv over the least cv fitted where cv is {TRUE_CV[family]:.2f}"
            if size == SIZES[-1]:
                rows.append(at_most(claim, SOURCE, "< 1: told apart", overlap, 1.0))
            else:
                rows.append(reported(claim, SOURCE, "< 1: told apart", overlap))
    return rows


@cache
def information(family: str, spread: float) -> np.ndarray:
    """Expected information per choice about (log mean, cv^2) at the truth, with margins of this spread."""
    theta = torch.tensor([math.log(MEAN), TRUE_CV[family] ** 2], dtype=torch.float64)
    delta = margins(spread)
    _, matrix, _ = _step(family, theta, delta, torch.zeros_like(delta), 1)
    return (matrix / MARGINS).numpy()


def _cv_error(family: str, spread: float, size: int) -> float:
    return math.sqrt(np.linalg.inv(information(family, spread))[1, 1] / size) / (2 * TRUE_CV[family])


def _identification_rows() -> list[Row]:
    rows = []
    for spread in (2.0, 5.0, 10.0, 20.0, 40.0, 80.0):
        text = ", ".join(f"{f} {_cv_error(f, spread, 55_000):.3f}" for f in ("Gamma", "LogNormal"))
        rows.append(reported(f"standard error of cv from 55,000 choices, margins of sd {spread:g} nats",
                             "identification", "cv 0.71, 0.66", text))  # fmt: skip
    delta = margins()
    gap = 0.0
    for family in ("Gamma", "LogNormal"):
        cv2 = TRUE_CV[family] ** 2
        one = log_prob(family, torch.tensor([math.log(MEAN), cv2], dtype=torch.float64), delta)
        two = log_prob(family, torch.tensor([math.log(MEAN / 3), cv2], dtype=torch.float64), 3 * delta)
        gap = max(gap, (one - two).abs().max().item())
    rows.append(at_most("margins x 3 and mean / 3 give the same choice probabilities: the mean is not identified",
                        "identification", "0", gap, 1e-12))  # fmt: skip
    gamma = log_prob("Gamma", torch.tensor([math.log(MEAN), 0.5], dtype=torch.float64), delta)
    lognormal = log_prob("LogNormal", torch.tensor([math.log(MEAN), 0.5], dtype=torch.float64), delta)
    rows.append(reported("Gamma and LogNormal of equal mean and cv 0.71: largest difference of choice probability",
                         "identification", "-", (gamma.exp() - lognormal.exp()).abs().max().item()))  # fmt: skip
    return rows


def check(full: bool) -> list[Row]:
    return _recovery_rows(full) + _shrinkage_rows(full) + _homogeneous_rows() + _identification_rows()


def figures(full: bool) -> dict[str, Figure]:
    figure, axes = plots.panels(3)
    look = {
        "LogNormal K = 4": (plots.RED, "^"), "LogNormal K = 16": (plots.ORANGE, "v"),
        "LogNormal K = 64": (plots.PURPLE, "D"), "LogNormal quadrature": (plots.GREEN, "o"), "Gamma": (plots.BLUE, "s"),
    }  # fmt: skip
    for shift, (name, (colour, marker)) in enumerate(look.items()):
        truth = TRUE_CV[name.split()[0]]
        ratio = [experiment(name, size, full).cv / truth for size in SIZES]
        x = [size * 1.18 ** (shift - 2) for size in SIZES]
        axes[0].errorbar(
            x, [r.mean() for r in ratio], [r.std() for r in ratio], fmt=marker, ms=4, color=colour, label=name
        )
    axes[0].set_xscale("log")
    axes[0].axhline(1, color=plots.BLACK, lw=1)
    axes[0].set_xlabel("choices N")
    axes[0].set_title("fitted cv / true cv, mean ± sd of replications")
    axes[0].legend(fontsize=8)
    for family, colour in (("Gamma", plots.BLUE), ("LogNormal", plots.GREEN)):
        exact = "Gamma" if family == "Gamma" else "LogNormal quadrature"
        bins = np.linspace(0, 1.2, 49).tolist()
        axes[1].hist(
            homogeneous(family, 10_000)[0].cv, bins, histtype="step", color=colour, label=f"{family}, one beta"
        )
        axes[1].hist(
            experiment(exact, 10_000, full).cv,
            bins,
            alpha=0.5,
            color=colour,
            label=f"{family}, cv {TRUE_CV[family]:.2f}",
        )
        spreads = np.logspace(0, 2.3, 24)
        axes[2].loglog(spreads, [_cv_error(family, float(s), 55_000) for s in spreads], color=colour, label=family)
    axes[1].set_xlabel("fitted cv")
    axes[1].set_title("homogeneous and mixed choices, N = 10,000")
    axes[1].legend(fontsize=8)
    axes[2].axhline(0.7, color=plots.BLACK, lw=1, ls=":")
    axes[2].set_xlabel("sd of the margins (nats), mean beta 0.12")
    axes[2].set_title("standard error of cv from 55,000 choices")
    axes[2].legend()
    return {"recovery": figure}
