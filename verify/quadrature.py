"""LogNormal quadrature: error of log E against nodes and scale, and the rule that picks nodes.

The reference is the trapezoid sum in 50 digits, confirmed by Gauss-Legendre panels. Claimed in mixdpo.py: 64 nodes
leave less than 1e-11 in log E for scale <= 1 (1e-10 in the class docstring), and 64 * scale nodes above that;
the error falls as exp(-pi^2 / (scale * step)) with step = 16 / (nodes - 1), both tails keep relative accuracy, that
is, an absolute error of log E. Judged for |delta| <= 1e4, loc = -2.3. Beyond, near scale 1, the peak of the integrand
becomes narrower than the rule assumes (its curvature is 1 + W(scale^2 |delta| e^loc), Lambert's W); the error at
|delta| = 1e6, where log E is near -50, is reported.
"""

import math
from functools import cache

import mpmath as mp
import numpy as np
import torch
from matplotlib.figure import Figure

from verify import oracle, plots
from verify.exact import ExactLogNormal
from verify.table import Row, at_most, near, oracle_failed, reported

SOURCE = "mixdpo.py, lognormal_log_tail_quadrature"
LOC = -2.3
MAGNITUDES = (0.0, 1e-3, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e6)
SCALES = (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0)
NODES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256)
JUDGED = 1e4


@cache
def references(scale: float) -> tuple[list[mp.mpf], float]:
    """log T at each magnitude, and the largest disagreement of the two routes."""
    values, apart = [], mp.mpf(0)
    for a in MAGNITUDES:
        tail = oracle.lognormal_trapezoid(a, LOC, scale)
        if a in (0.1, 30.0, 1e3, 1e6):  # the panels are ten times slower
            apart = max(apart, oracle.disagreement([tail, oracle.lognormal_panels(a, LOC, scale)]))
        with mp.workdps(oracle.DIGITS):
            values.append(mp.log(tail.value))
    return values, float(apart)


@cache
def error(scale: float, nodes: int, largest: float = JUDGED) -> float:
    """Largest absolute error of log T over |delta| <= largest: the relative error of T."""
    wanted, _ = references(scale)
    loc, s = torch.tensor(LOC, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    delta = -torch.tensor(MAGNITUDES, dtype=torch.float64)
    got = ExactLogNormal(loc, s, nodes=nodes).log_choice_prob(delta)
    return max(float(abs(g - w)) for a, g, w in zip(MAGNITUDES, got.tolist(), wanted, strict=True) if a <= largest)


def _positive_error(scale: float, nodes: int) -> float:
    """Largest error of log(1 - T) relative to 1 + |log T| where T is above the underflow (see closed_form)."""
    wanted, _ = references(scale)
    loc, s = torch.tensor(LOC, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    got = ExactLogNormal(loc, s, nodes=nodes).log_choice_prob(torch.tensor(MAGNITUDES, dtype=torch.float64))
    worst = 0.0
    with mp.workdps(oracle.DIGITS):
        for a, g, log_t in zip(MAGNITUDES, got.tolist(), wanted, strict=True):
            if log_t > -700 and a <= JUDGED:
                want = mp.log1p(-mp.exp(log_t))
                worst = max(worst, float(abs(g - want) / abs(want) / (1 + abs(log_t))))
    return worst


def check(full: bool) -> list[Row]:
    apart = max(references(scale)[1] for scale in SCALES)
    if not apart < oracle.AGREE:
        return [oracle_failed("LogNormal references agree", "oracle.py", apart, float(oracle.AGREE))]
    rows = [at_most("LogNormal: trapezoid and Gauss-Legendre references agree", "oracle.py", "30 digits", apart, 1e-30)]
    for scale in SCALES:
        nodes = math.ceil(64 * max(1.0, scale))
        # log T near -1e3 is rounded to 1e-13 by itself.
        claim = f"scale {scale:g}, {nodes} nodes: error of log T, |delta| <= 1e4"
        rows.append(at_most(claim, SOURCE, "0", error(scale, nodes), 1e-11))
    rows.append(
        at_most("scale <= 1, 64 nodes, delta > 0: relative error of log(1 - T) over (1 + |log T|)", SOURCE, "0",
                max(_positive_error(s, 64) for s in SCALES if s <= 1), 1e-11)
    )  # fmt: skip
    worst = max(SCALES, key=lambda s: error(s, math.ceil(64 * max(1.0, s)), 1e6))
    rows.append(
        reported("error of log T at |delta| = 1e6, worst scale", SOURCE, "1e-11 if unconditional",
                 f"{error(worst, math.ceil(64 * max(1.0, worst)), 1e6):.1e} at scale {worst:g}")
    )  # fmt: skip
    for scale in (1.0, 2.0, 4.0):
        counts = [n for n in NODES if 1e-12 < error(scale, n, 30.0) < 1e-3]
        x = [math.pi**2 * (n - 1) / (16 * scale) for n in counts]
        slope = np.polyfit(x, [math.log(error(scale, n, 30.0)) for n in counts], 1)[0]
        rows.append(
            near(f"scale {scale:g}: decay of log error per pi^2 / (scale step), {len(counts)} counts", SOURCE, -1.0,
                 slope, 0.15)
        )  # fmt: skip
    return rows


def figures(full: bool) -> dict[str, Figure]:
    figure, (axis,) = plots.panels(1, width=6.2, height=4)
    colours = (plots.BLUE, plots.GREEN, plots.ORANGE, plots.RED, plots.PURPLE)
    for scale, colour, marker in zip((0.3, 0.6, 1.0, 2.0, 4.0), colours, "osv^D", strict=True):
        axis.semilogy(NODES, [max(error(scale, n), 1e-16) for n in NODES], marker=marker, color=colour, ms=4,
                      label=f"scale {scale:g}")  # fmt: skip
        rule = math.ceil(64 * max(1.0, scale))
        axis.plot(rule, 3e-17, marker=marker, color=colour, clip_on=False)
    axis.axhline(1e-11, color=plots.BLACK, lw=1, ls=":")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("nodes (marks at the bottom: the rule, 64 max(1, scale))")
    axis.set_ylabel("largest error of log T, |delta| ≤ 1e4")
    axis.legend()
    return {"quadrature": figure}
