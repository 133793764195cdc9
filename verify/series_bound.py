"""The accelerated alternating series against its bound, 2 (3 + sqrt 8)^-N, for N = 4 .. 24.

F(u, k) = sum_n (-1)^n (1 + n u)^-k is summed with the weights that mixdpo.py uses, in 50 digits, so that only the
truncation and the rounding of the N weights to float64 remain; the latter, at most 2^-53 sum |w_n| (1 + n u)^-k, is
added to the bound (it matters from N = 19 on). The reference is the series with 64 terms (closed_form judges that).
"""

from functools import cache

import mpmath as mp
from matplotlib.figure import Figure

import mixdpo
from verify import oracle, plots
from verify.table import Row, at_most, holds

SOURCE = "mixdpo.py, _alternating_weights"
RATIOS = (0.0, 1e-9, 1e-3, 0.03, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0)
CONCENTRATIONS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 25.0, 100.0, 1000.0)


def _sum(weights: list[mp.mpf], u: float, k: float) -> mp.mpf:
    return mp.fsum(w * mp.exp(-k * mp.log1p(n * mp.mpf(u))) for n, w in enumerate(weights))


@cache
def measure() -> dict[int, tuple[float, float]]:
    """N -> (largest relative error over u and k, largest ratio of the error to the bound with the rounding)."""
    result = {}
    with mp.workdps(oracle.DIGITS):
        exact = {(u, k): _sum(oracle.alternating_weights(64), u, k) for u in RATIOS for k in CONCENTRATIONS}
        for terms in range(4, 25):
            weights = [mp.mpf(w) for w in mixdpo._alternating_weights(terms)]
            bound = 2 * (3 + mp.sqrt(8)) ** -terms
            worst = ratio = mp.mpf(0)
            for (u, k), want in exact.items():
                error = abs(_sum(weights, u, k) - want) / want
                rounding = mp.mpf(2) ** -53 * _sum([abs(w) for w in weights], u, k) / want
                worst, ratio = max(worst, error), max(ratio, error / (bound + rounding))
            result[terms] = (float(worst), float(ratio))
    return result


def check(full: bool) -> list[Row]:
    errors = measure()
    worst = max(ratio for _, ratio in errors.values())
    rows = [at_most("error / bound, worst of N = 4 .. 24, all u and k", SOURCE, "< 1", worst, 1.0)]
    for terms in (4, 8, 12, 16, 20, 24):
        # Terms are at most 1 and F at least 1/2.
        rounding = 2**-52 * sum(map(abs, mixdpo._alternating_weights(terms)))
        bound = 2 * (3 + 8**0.5) ** -terms + rounding
        claim = f"relative error with N = {terms} terms, worst of all u and k"
        expected = f"2 (3 + sqrt 8)^-{terms} + {rounding:.0e}"
        rows.append(at_most(claim, SOURCE, expected, errors[terms][0], bound))
    with mp.workdps(2 * oracle.DIGITS):
        off = [
            n
            for terms in (12, 22)
            for n, (w, exact) in enumerate(
                zip(mixdpo._alternating_weights(terms), oracle.alternating_weights(terms), strict=True)
            )
            if w != float(exact)
        ]
    rows.append(
        holds("the 12 and 22 weights are correctly rounded", SOURCE, "all 34", f"{34 - len(off)} of 34", not off)
    )
    return rows


def figures(full: bool) -> dict[str, Figure]:
    errors = measure()
    figure, (axis,) = plots.panels(1, width=5.2)
    terms = list(errors)
    axis.semilogy(terms, [2 * (3 + 8**0.5) ** -n for n in terms], color=plots.BLACK, label="bound 2 (3 + √8)^-N")
    axis.semilogy(terms, [errors[n][0] for n in terms], "o", color=plots.BLUE, label="measured, worst over u and k")
    axis.axhline(2**-53, color=plots.ORANGE, ls="--", label="float64 unit roundoff")
    axis.axhline(2**-24, color=plots.RED, ls=":", label="float32 unit roundoff")
    axis.set_xlabel("terms N")
    axis.set_ylabel("relative error of F")
    axis.legend()
    return {"series_bound": figure}
