"""E[sigma(beta * delta)] and its derivatives in mpmath, to 25 digits and more.

Every function returns a pair, at -magnitude and at +magnitude, which share one tail T = E[sigma(-beta * magnitude)].

Gamma has two routes that share no formula: the series of Eq. 5, accelerated, and the integral over beta. The tests
compare them before either judges. mpmath.lerchphi is not used: it returns an exact 0 at k = 25, rate / delta = 25. Nor
is mpmath.quad over a fixed range, which misses the peak of far tails; equally spaced sums over analytic integrands
that decay at both ends converge exponentially.
"""

from typing import NamedTuple

import mpmath
from mpmath import mp, mpf

DIGITS = 40
TERMS = 56  # of the accelerated series: 2 * 5.83^-56 = 3e-43


class LogE(NamedTuple):
    """log E and its derivatives in delta and in (concentration, rate) or (loc, scale)."""

    value: mpf
    by_delta: mpf
    by_first: mpf
    by_second: mpf


def _both_sides(log_tail: mpf, by_magnitude: mpf, by_first: mpf, by_second: mpf) -> tuple[LogE, LogE]:
    tail = mpmath.exp(log_tail)
    factor = -tail / (1 - tail)
    negative = LogE(log_tail, -by_magnitude, by_first, by_second)
    positive = LogE(mpmath.log1p(-tail), factor * by_magnitude, factor * by_first, factor * by_second)
    return negative, positive


def _alternating_weights() -> list[mpf]:
    """Algorithm 1 of Cohen, Rodriguez Villegas and Zagier (2000), as printed there."""
    with mp.workdps(2 * DIGITS):
        d = (3 + mpmath.sqrt(8)) ** TERMS
        d = (d + 1 / d) / 2
        b, c, weights = mpf(-1), -d, []
        for n in range(TERMS):
            c = b - c
            weights.append(c / d)
            b = b * (n + TERMS) * (n - TERMS) / ((n + mpf(1) / 2) * (n + 1))
    return weights


_WEIGHTS = _alternating_weights()


def gamma_series(magnitude: float, concentration: float, rate: float) -> tuple[LogE, LogE]:
    """beta ~ Gamma(concentration, rate), by Eq. 5; the series is differentiated term by term."""
    with mp.workdps(DIGITS):
        a, k, r = mpf(magnitude), mpf(concentration), mpf(rate)
        u = a / (r + a)
        total = by_k = by_u = mpf(0)
        for n, weight in enumerate(_WEIGHTS):
            log_base = mpmath.log(1 + n * u)
            term = weight * mpmath.exp(-k * log_base)
            total += term
            by_k -= term * log_base
            by_u -= term * k * n / (1 + n * u)
        by_u /= total
        return _both_sides(
            -k * mpmath.log1p(a / r) + mpmath.log(total),
            -k / (r + a) + by_u * r / (r + a) ** 2,
            -mpmath.log1p(a / r) + by_k / total,
            k * a / (r * (r + a)) - by_u * a / (r + a) ** 2,
        )


def gamma_integral(magnitude: float, concentration: float, rate: float) -> tuple[LogE, LogE]:
    """The same from int sigma(-beta a) p(beta) dbeta, by equal steps in x = log beta; derivatives by the score of p."""
    with mp.workdps(DIGITS + 10):
        a, k, r = mpf(magnitude), mpf(concentration), mpf(rate)
        # On the line Im x = y < pi / 2 the integrand has grown by cos(y)^-k at most, and a step h leaves
        # exp(-2 pi y / h) of it: with these steps that is 1e-36 or less at the best y.
        step = min(mpf(1) / 10, 1 / (4 * mpmath.sqrt(k)))
        norm, digamma = k * mpmath.log(r) - mpmath.loggamma(k), mpmath.digamma(k)
        # A small k reaches down to beta = e^(-90 / k), where sigma is 1/2: that constant is integrated by hand.
        constant = mpf(1) / 2 if k < 1 else mpf(0)

        def integrands(x: mpf) -> list[mpf]:
            beta = mpmath.exp(x)
            density = mpmath.exp(norm + k * x - r * beta)
            choice = -mpmath.tanh(beta * a / 2) / 2 if constant else 1 / (1 + mpmath.exp(beta * a))
            slope = -beta / (2 + 2 * mpmath.cosh(beta * a))
            weighted = density * choice
            return [weighted, density * slope, weighted * (mpmath.log(r) + x - digamma), weighted * (k / r - beta)]

        sums = [mpf(0)] * 4
        for direction in (1, -1):
            x = mpmath.log(k / (r + a)) + (step if direction == 1 else 0)
            small = 0
            while small < 10:
                terms = integrands(x)
                sums = [s + t for s, t in zip(sums, terms, strict=True)]
                negligible = all(abs(t) <= abs(s) * mpf(10) ** -DIGITS for t, s in zip(terms, sums, strict=True))
                small = small + 1 if negligible else 0
                x += direction * step
        sums = [s * step for s in sums]
        tail = sums[0] + constant
        return _both_sides(mpmath.log(tail), *(s / tail for s in sums[1:]))


def lognormal(magnitude: float, loc: float, scale: float, step: float = 0.1) -> tuple[LogE, LogE]:
    """beta = exp(loc + scale x), x ~ N(0, 1), by equal steps over mode +- 14, which leaves out exp(-98)."""
    with mp.workdps(DIGITS):
        a, m, s = mpf(magnitude), mpf(loc), mpf(scale)
        h = mpf(step) / max(s, 1)  # the strip of analyticity is pi / (2 s): exp(-pi^2 / (s h)) = 1e-43
        mode = -mpmath.lambertw(s**2 * mpmath.exp(m) * a).real / s
        sums = [mpf(0)] * 4
        for i in range(int(-14 / h), int(14 / h) + 1):
            x = mode + i * h
            beta = mpmath.exp(m + s * x)
            density = mpmath.npdf(x) * h
            slope = -density * beta / (2 + 2 * mpmath.cosh(beta * a))
            terms = density / (1 + mpmath.exp(beta * a)), slope, slope * a, slope * a * x
            sums = [old + new for old, new in zip(sums, terms, strict=True)]
        return _both_sides(mpmath.log(sums[0]), *(v / sums[0] for v in sums[1:]))


def lognormal_posterior_mean(delta: float, loc: float, scale: float) -> mpf:
    """E[beta sigma(beta delta)] / E[sigma(beta delta)], both integrals directly."""
    with mp.workdps(DIGITS):
        d, m, s, h = mpf(delta), mpf(loc), mpf(scale), mpf(1) / 10
        lowest = -mpmath.lambertw(s**2 * mpmath.exp(m) * max(-d, 0)).real / s - 14
        before = after = mpf(0)
        for i in range(int((14 + s - lowest) / h) + 1):
            x = lowest + i * h
            beta = mpmath.exp(m + s * x)
            weight = mpmath.npdf(x) / (1 + mpmath.exp(-beta * d))
            before += weight
            after += weight * beta
        return after / before
