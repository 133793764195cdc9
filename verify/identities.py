"""Identities that hold for every mixture, tested on the public methods in float64 and float32.

symmetry    p(d) + p(-d) = 1, to 2 eps: one tail serves both signs; p(0) = 1/2, to 16 eps, what a sum of 16 to 64
            terms may round off (at 0 one branch serves both 0 and -0.0, so that their sum is 2 p(0))
monotone    d log E / d delta = E[beta (1 - sigma) sigma] / E > 0, so log E never falls (by more than rounding)
origin      d log E / d delta = E[beta] / 2 at exactly 0 and -0.0, where every pair starts, to the rounding of a
            derivative (closed_form)
posterior   E[beta | choice] = k / rate - d log E / d rate (Gamma: the score of the rate is k / rate - beta), and
            against the high-precision reference for LogNormal
scaling     (c delta, c rate), or (c delta, loc - log c), leave E as it is: only beta delta enters
"""

import math

import mpmath as mp
import numpy as np
import torch
from torch import Tensor

import mixdpo
from verify import oracle
from verify.closed_form import rounding_bounds
from verify.exact import ExactGamma, ExactLogNormal, Strength
from verify.table import Row, at_most, oracle_failed

DTYPES = (torch.float64, torch.float32)


def _grid(dtype: torch.dtype) -> Tensor:
    positive = torch.logspace(-8, 4, 600, dtype=torch.float64)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive]).to(dtype)


def _strengths(dtype: torch.dtype) -> dict[str, Strength]:
    return {
        "PointMass": mixdpo.PointMass(0.1, dtype=dtype),
        "Gamma(2, 16.7)": mixdpo.Gamma(2.0, 16.7, dtype=dtype),
        "Gamma(0.05, 1)": mixdpo.Gamma(0.05, 1.0, dtype=dtype),
        "Gamma(300, 3000)": mixdpo.Gamma(300.0, 3000.0, dtype=dtype),
        "LogNormal quadrature": mixdpo.LogNormal(estimator="quadrature", dtype=dtype),
        "LogNormal Monte Carlo": mixdpo.LogNormal(samples=16, dtype=dtype),
    }


def _log_p(strength: Strength, delta: Tensor) -> Tensor:
    """With one set of draws for all pairs where the estimator draws: the identities hold for any fixed draws."""
    if isinstance(strength, mixdpo.LogNormal) and strength.estimator == "monte_carlo":
        noise = torch.randn(strength.samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return strength.log_choice_prob(delta, noise=noise.to(delta.dtype).expand(*delta.shape, -1))
    return strength.log_choice_prob(delta)


def _symmetry(dtype: torch.dtype) -> float:
    delta = _grid(dtype)
    delta = delta[delta != 0]
    return max(
        (torch.exp(_log_p(s, delta)) + torch.exp(_log_p(s, -delta)) - 1).abs().max().item()
        for s in _strengths(dtype).values()
    )


def _half(dtype: torch.dtype) -> float:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    return max((torch.exp(_log_p(s, zeros)) - 0.5).abs().max().item() for s in _strengths(dtype).values())


def _largest_fall(dtype: torch.dtype) -> float:
    """Largest fall of log E between neighbours, relative to log E; and of its negative tail, in one figure."""
    worst = 0.0
    for strength in _strengths(dtype).values():
        log_p = _log_p(strength, _grid(dtype)).detach()
        fall = (log_p[:-1] - log_p[1:]).clamp(min=0) / log_p[1:].abs().clamp(min=torch.finfo(dtype).tiny)
        # log(1 - T) carries the rounding of log T: see closed_form.
        worst = max(worst, (fall[log_p[1:].abs() > torch.finfo(dtype).tiny] / _slack(log_p, dtype)).max().item())
    return worst * torch.finfo(dtype).eps


def _slack(log_p: Tensor, dtype: torch.dtype) -> Tensor:
    kept = log_p[1:][log_p[1:].abs() > torch.finfo(dtype).tiny]
    return torch.finfo(dtype).eps * (1 + torch.log(-torch.expm1(kept)).abs() * (kept > -math.log(2)))


def _origin(dtype: torch.dtype, zero: float) -> float:
    worst = 0.0
    for name, strength in _strengths(dtype).items():
        delta = torch.tensor([zero], dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(_log_p(strength, delta), delta)
        want = strength.mean.item() / 2
        if "Monte Carlo" in name and isinstance(strength, mixdpo.LogNormal):  # half the mean of its own sixteen draws
            noise = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            want = torch.exp(strength.loc + strength.scale * noise).mean().item() / 2
        worst = max(worst, abs(slope.item() / want - 1))
    return worst


def _posterior_gamma(dtype: torch.dtype) -> float:
    """|posterior_mean - (k / rate - d log E / d rate)| over k / rate: the difference cancels, its scale is k / rate."""
    worst, delta = 0.0, _grid(dtype)
    for k, rate in ((2.0, 16.7), (0.05, 1.0), (300.0, 3000.0)):
        c = torch.tensor(k, dtype=dtype)
        for part in delta.split(200):
            r = torch.full_like(part, rate, requires_grad=True)
            # One rate per pair, so that one backward pass gives one derivative per pair.
            log_p = torch.stack([ExactGamma(c, r[i]).log_choice_prob(part[i]) for i in range(0, len(part), 8)])
            (slope,) = torch.autograd.grad(log_p.sum(), r)
            want = (c / r - slope).detach()[::8]
            got = ExactGamma(c, torch.tensor(rate, dtype=dtype)).posterior_mean(part[::8])
            worst = max(worst, ((got - want).abs() / (k / rate)).max().item())
    return worst


def _posterior_lognormal() -> tuple[float, float]:
    """Relative error against E[beta sigma] / E[sigma] from the references, and the references' disagreement.

    The code shifts loc by scale^2 to absorb beta into the density; the reference integrates beta sigma as it stands.
    """
    worst, apart = 0.0, 0.0
    for loc, scale in ((-2.3, 0.6), (-2.3, 1.0), (0.5, 0.2)):
        strength = ExactLogNormal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
        for delta in (-300.0, -10.0, -0.1, 0.0, 0.1, 10.0, 300.0):
            with mp.workdps(oracle.DIGITS):
                sums = _weighted(delta, loc, scale, mp.mpf(1)), _weighted(delta, loc, scale, mp.mpf("0.73"))
                apart = max(apart, float(abs(sums[0] / sums[1] - 1)))
                got = strength.posterior_mean(torch.tensor(delta, dtype=torch.float64)).item()
                worst = max(worst, float(abs(got / sums[0] - 1)))
    return worst, apart


def _weighted(delta: float, loc: float, scale: float, stretch: mp.mpf) -> mp.mpf:
    """E[beta sigma(beta delta)] / E[sigma(beta delta)] by the trapezoid rule; `stretch` changes its step."""
    step = stretch / (20 * mp.mpf(scale) + 20)
    top = bottom = mp.mpf(0)
    for j in range(-int(24 / step), int(24 / step) + 1):
        x = j * step
        beta = mp.exp(mp.mpf(loc) + mp.mpf(scale) * x)
        weight = mp.exp(-x * x / 2) / (1 + mp.exp(-mp.mpf(delta) * beta))
        top, bottom = top + beta * weight, bottom + weight
    return top / bottom


def _scaling(dtype: torch.dtype) -> float:
    """Relative difference of log E, over 1 + |log T| for delta >= 0 (see closed_form)."""
    worst, delta = 0.0, _grid(dtype)
    for c in (1e-3, 0.3, 7.0, 1e3):
        k, rate = torch.tensor(2.0, dtype=dtype), torch.tensor(16.7, dtype=dtype)
        loc, scale = torch.tensor(-2.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
        plain, scaled = ExactGamma(k, rate), ExactGamma(k, rate * c)
        worst = max(worst, _apart(plain.log_choice_prob(delta), scaled.log_choice_prob(delta * c)))
        if dtype == torch.float64:
            normal, shifted = ExactLogNormal(loc, scale), ExactLogNormal(loc - math.log(c), scale)
            worst = max(worst, _apart(normal.log_choice_prob(delta), shifted.log_choice_prob(delta * c)))
    return worst


def _apart(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    log_t = np.log(-np.expm1(x.numpy()))
    slack = 1 + np.where(x.numpy() > -math.log(2), np.abs(log_t), 0)
    return float((((x - y) / x).abs().numpy() / slack).max())


def check(full: bool) -> list[Row]:
    rows = []
    for dtype in DTYPES:
        name, eps = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
        rows += [
            at_most(f"{name}: p(d) + p(-d) = 1, 6 distributions", "mixdpo.py, _log_choice_prob", "0",
                    _symmetry(dtype), 2 * eps),
            at_most(f"{name}: p(0) = p(-0.0) = 1/2", "Eq. 17", "0", _half(dtype), 16 * eps),
            at_most(f"{name}: log E never falls as d grows (relative fall between neighbours)", "Eq. 3", "0",
                    _largest_fall(dtype), 16 * eps),
            at_most(f"{name}: d log E / d delta = E[beta] / 2 at 0", "mixdpo.py, _log_choice_prob", "E[beta] / 2",
                    _origin(dtype, 0.0), rounding_bounds(dtype)[1]),
            at_most(f"{name}: d log E / d delta = E[beta] / 2 at -0.0", "mixdpo.py, _log_choice_prob", "E[beta] / 2",
                    _origin(dtype, -0.0), rounding_bounds(dtype)[1]),
            at_most(f"{name}: posterior_mean = k / rate - d log E / d rate", "mixdpo.py, Gamma.posterior_mean",
                    "0, over k / rate", _posterior_gamma(dtype), 512 * eps),
            at_most(f"{name}: (c delta, c rate) leaves log E", "Eq. 3", "0", _scaling(dtype), 64 * eps),
        ]  # fmt: skip
    error, apart = _posterior_lognormal()
    if apart > 1e-30:
        return [*rows, oracle_failed("references of the posterior mean agree", "identities.py", apart, 1e-30)]
    source = "mixdpo.py, LogNormal.posterior_mean"
    return [*rows, at_most("LogNormal: posterior_mean, |delta| <= 300", source, "relative error", error, 1e-10)]
