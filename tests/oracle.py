"""log E[sigma(beta * delta)] and its derivatives from the references of verify/oracle.py, at both signs of delta.

Each route is compared with another before it judges. mpmath.lerchphi is not used: it returns an exact 0 at k = 25,
rate / delta = 25.
"""

from typing import NamedTuple

import mpmath
from mpmath import mp, mpf

from verify import oracle

DIGITS = 40


class LogE(NamedTuple):
    """log E and its derivatives in delta and in (concentration, rate) or (loc, scale)."""

    value: mpf
    by_delta: mpf
    by_first: mpf
    by_second: mpf


def both_sides(tail: oracle.Tail) -> tuple[LogE, LogE]:
    """At -magnitude and at +magnitude, which share the tail E[sigma(-beta * magnitude)]."""
    return LogE(*oracle.choice(tail, True)), LogE(*oracle.choice(tail, False))


def gamma_series(magnitude: float, concentration: float, rate: float) -> tuple[LogE, LogE]:
    return both_sides(oracle.gamma_series(magnitude, concentration, rate))


def gamma_integral(magnitude: float, concentration: float, rate: float) -> tuple[LogE, LogE]:
    return both_sides(oracle.gamma_quadrature(magnitude, concentration, rate))


def lognormal(magnitude: float, loc: float, scale: float) -> tuple[LogE, LogE]:
    return both_sides(oracle.lognormal_trapezoid(magnitude, loc, scale))


def lognormal_panels(magnitude: float, loc: float, scale: float) -> tuple[LogE, LogE]:
    return both_sides(oracle.lognormal_panels(magnitude, loc, scale))


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
