"""High-precision references for E[sigma(-beta a)], a >= 0, and its derivatives, by routes with nothing in common.

For Gamma(concentration k, rate l), in 50 digits:

  quadrature   the definition, Eq. 9, by the trapezoid rule in y, beta = exp(c + y - e^-y). Both ends then fall off
               double-exponentially, so the rule converges exponentially however small k is. (mpmath.quad was seen to
               be wrong by 1e-9 in far tails of the LogNormal integral without saying so; a trapezoid sum has one
               parameter, the step, and it is checked against the other routes.)
  hurwitz      Eq. 6 with its derivatives, mpmath's Hurwitz zeta (analytically continued for k <= 1), at doubled
               precision, since the difference of two zetas cancels log10(l / a) digits, and k log10(1 + l / a) digits
               more, since mpmath's zeta stops at an absolute tolerance: with 100 digits it was wrong by 1e-10 at
               k = 1000, l / a = 1e6. Used where neither grows beyond reach (see hurwitz_reaches).
  series       Eq. 5 term by term, sum_{n>=1} (-1)^(n-1) (1 + n a / l)^-k, accelerated with 64 terms. It is the raw
               series; mixdpo.py takes a factor out first.

For LogNormal: the trapezoid rule with a step of its own, and Gauss-Legendre panels.
Every route returns a Tail. `disagreement` is the largest relative difference of any of its entries.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mpmath as mp

DIGITS = 50
AGREE = mp.mpf(10) ** -30
_NEGLIGIBLE = mp.mpf(10) ** -48


class Tail(NamedTuple):
    """T = E[sigma(-beta a)] and its derivatives in a and in the two parameters (k and rate, or loc and scale)."""

    value: mp.mpf
    d_magnitude: mp.mpf
    d_first: mp.mpf
    d_second: mp.mpf


def disagreement(routes: Sequence[Tail]) -> mp.mpf:
    """Largest relative difference from the first route, over routes and entries."""
    worst = mp.mpf(0)
    for other in routes[1:]:
        for x, y in zip(routes[0], other, strict=True):
            if x != y:
                worst = max(worst, abs(x - y) / max(abs(x), abs(y)))
    return worst


def choice(tail: Tail, negative: bool) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """log E[sigma(beta delta)] and its derivatives in delta and the two parameters, from the tail at |delta|."""
    with mp.workdps(DIGITS):
        if negative:
            t = tail.value
            return mp.log(t), -tail.d_magnitude / t, tail.d_first / t, tail.d_second / t
        t = 1 - tail.value
        return mp.log1p(-tail.value), -tail.d_magnitude / t, -tail.d_first / t, -tail.d_second / t


# --- Gamma ------------------------------------------------------------------------------------------------------------


def gamma_quadrature(a: float, k: float, rate: float) -> Tail:
    with mp.workdps(DIGITS):
        a, k, rate = mp.mpf(a), mp.mpf(k), mp.mpf(rate)
        centre = mp.log(k / (rate + a))
        # The trapezoid error is exp(-2 pi d / step), d the distance of the poles, near 1, and for large k
        # exp(-2 (pi s / step)^2), s = 0.64 / sqrt(k) the width of the peak.
        step = min(mp.mpf("0.05"), mp.mpf("0.26") / mp.sqrt(k))
        log_norm = k * mp.log(rate) - mp.loggamma(k)
        log_rate_minus_psi = mp.log(rate) - mp.digamma(k)
        # sigma - 1/2 has the same derivatives in k and rate, since the density integrates to 1, and does not cancel.
        shift = mp.mpf("0.5") if a * k < rate else mp.mpf(0)

        def at(y: mp.mpf) -> list[mp.mpf]:
            bend = mp.exp(-y)
            x = centre + y - bend
            beta = mp.exp(x)
            weight = mp.exp(k * x - rate * beta + log_norm) * (1 + bend)
            tail = 1 / (1 + mp.exp(a * beta))
            score_k, score_rate = log_rate_minus_psi + x, k / rate - beta
            shifted = (-mp.tanh(a * beta / 2) / 2 if shift else tail) * weight
            value = tail * weight
            return [value, -beta * value * (1 - tail), shifted * score_k, shifted * score_rate]

        return Tail(*_trapezoid(at, mp.mpf("0.567"), step))


def _trapezoid(at: Callable[[mp.mpf], list[mp.mpf]], start: mp.mpf, step: mp.mpf) -> list[mp.mpf]:
    """step * sum of at(start + j step), j over all integers, cut where every entry has become negligible."""
    total = at(start)
    for sign in (1, -1):
        j = 0
        while True:
            j += 1
            terms = at(start + sign * j * step)
            total = [s + t for s, t in zip(total, terms, strict=True)]
            if all(abs(t) <= _NEGLIGIBLE * abs(s) for s, t in zip(total, terms, strict=True)):
                break
    return [step * s for s in total]


def hurwitz_reaches(a: float, k: float, rate: float) -> bool:
    return a >= 1e-15 * rate and k * math.log10(1 + rate / a) <= 150


def gamma_hurwitz(a: float, k: float, rate: float) -> Tail:
    with mp.workdps(2 * DIGITS + math.ceil(k * math.log10(1 + rate / a))):
        k = mp.mpf(k)
        if k == 1:  # each zeta has a pole there; the mean of both sides is off by the square of the distance
            sides = [_gamma_hurwitz(mp.mpf(a), k + h, mp.mpf(rate)) for h in (mp.mpf("1e-26"), -mp.mpf("1e-26"))]
            return Tail(*[(x + y) / 2 for x, y in zip(*sides, strict=True)])
        return _gamma_hurwitz(mp.mpf(a), k, mp.mpf(rate))


def _gamma_hurwitz(a: mp.mpf, k: mp.mpf, rate: mp.mpf) -> Tail:
    ratio = rate / a
    q = 1 + ratio
    factor = mp.exp(k * mp.log(ratio / 2))
    zetas = mp.zeta(k, q / 2) - mp.zeta(k, (q + 1) / 2)
    d_k = mp.zeta(k, q / 2, 1) - mp.zeta(k, (q + 1) / 2, 1)
    d_q = -k / 2 * (mp.zeta(k + 1, q / 2) - mp.zeta(k + 1, (q + 1) / 2))
    value = factor * zetas
    d_rate = k / rate * value + factor * d_q / a
    return Tail(value, -rate / a * d_rate, mp.log(ratio / 2) * value + factor * d_k, d_rate)


@cache
def alternating_weights(terms: int) -> list[mp.mpf]:
    """Cohen, Rodriguez Villegas, Zagier (2000), Algorithm 1, in floating point as printed there."""
    with mp.workdps(2 * DIGITS):
        d = (3 + mp.sqrt(8)) ** terms
        d = (d + 1 / d) / 2
        b, c, weights = mp.mpf(-1), -d, []
        for n in range(terms):
            c = b - c
            weights.append(c / d)
            b = (n + terms) * (n - terms) * b / ((n + mp.mpf("0.5")) * (n + 1))
        return weights


def gamma_series(a: float, k: float, rate: float, terms: int = 64) -> Tail:
    with mp.workdps(DIGITS):
        a, k, rate = mp.mpf(a), mp.mpf(k), mp.mpf(rate)
        value = d_a = d_k = mp.mpf(0)
        for n, w in enumerate(alternating_weights(terms), start=1):
            log_base = mp.log1p(n * a / rate)
            term = w * mp.exp(-k * log_base)
            value += term
            d_k -= log_base * term
            d_a -= k * n / rate * term * mp.exp(-log_base)
        return Tail(value, d_a, d_k, -a / rate * d_a)


def gamma_routes(a: float, k: float, rate: float) -> list[Tail]:
    routes = [gamma_series(a, k, rate), gamma_quadrature(a, k, rate)]
    if hurwitz_reaches(a, k, rate):
        routes.append(gamma_hurwitz(a, k, rate))
    return routes


def lerch(a: float, k: float, rate: float, digits: int) -> mp.mpf:
    """Eq. 5 with mpmath.lerchphi, which is silently wrong for some arguments: tabulated, never a judge."""
    with mp.workdps(digits):
        ratio = mp.mpf(rate) / mp.mpf(a)
        return ratio ** mp.mpf(k) * mp.lerchphi(-1, mp.mpf(k), 1 + ratio)


# --- LogNormal --------------------------------------------------------------------------------------------------------


def _lognormal_integrand(a: mp.mpf, loc: mp.mpf, scale: mp.mpf) -> Callable[[mp.mpf], list[mp.mpf]]:
    norm = 1 / mp.sqrt(2 * mp.pi)

    def at(x: mp.mpf) -> list[mp.mpf]:
        beta = mp.exp(loc + scale * x)
        tail = 1 / (1 + mp.exp(a * beta))
        value = norm * mp.exp(-x * x / 2) * tail
        slope = -beta * value * (1 - tail)
        return [value, slope, a * slope, a * slope * x]

    return at


def _lognormal_peak(a: mp.mpf, loc: mp.mpf, scale: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Mode and curvature of -log(phi(x) e^-z), z = a exp(loc + scale x): x + scale z = 0 by Lambert's W."""
    w = mp.lambertw(scale**2 * a * mp.exp(loc)).real
    return -w / scale, 1 + w


def lognormal_trapezoid(a: float, loc: float, scale: float) -> Tail:
    with mp.workdps(DIGITS):
        a, loc, scale = mp.mpf(a), mp.mpf(loc), mp.mpf(scale)
        mode, curvature = _lognormal_peak(a, loc, scale)
        # exp(-pi^2 / (scale step)) from the poles of sigma, exp(-2 pi^2 / (curvature step^2)) from the peak: < 1e-43.
        step = min(mp.pi**2 / (100 * scale), mp.mpf("0.22") / mp.sqrt(curvature))
        return Tail(*_trapezoid(_lognormal_integrand(a, loc, scale), mode, step))


def lognormal_panels(a: float, loc: float, scale: float) -> Tail:
    """Gauss-Legendre, 48 nodes each, on panels of width min(1, 1 / scale) over mode ± 15."""
    with mp.workdps(DIGITS):
        a, loc, scale = mp.mpf(a), mp.mpf(loc), mp.mpf(scale)
        at, mode = _lognormal_integrand(a, loc, scale), _lognormal_peak(a, loc, scale)[0]
        half = min(mp.mpf(1), 1 / scale) / 2
        count = int(mp.ceil(15 / half))
        total = [mp.mpf(0)] * 4
        for panel in range(count):
            centre = mode + (2 * panel + 1 - count) * half
            for node, weight in _legendre():
                terms = at(centre + half * node)
                total = [s + half * weight * t for s, t in zip(total, terms, strict=True)]
        return Tail(*total)


@cache
def _legendre() -> list[tuple[mp.mpf, mp.mpf]]:
    return mp.calculus.quadrature.GaussLegendre(mp.mp).calc_nodes(5, 4 * DIGITS)
