"""The paper's own evaluation, coded here and nowhere else: Eq. 6 with each Hurwitz series cut after n = 1000 terms.

Together the two cut series are the first 2,000 terms of Eq. 5's alternating series, whose remainder is half the next
term: (rate / (rate + 2000 |delta|))^k / 2 for the tail. That is small when 2000 |delta| >> rate, and 1/2 as
delta -> 0, where every run starts: for delta > 0 the probability tends to 1 and for delta < 0 to 0, instead of 1/2,
and between 0 and about 0.13 it falls as delta grows. At exactly 0 App. C, case 3, is the constant 1/2, whose
gradient is 0. The printed formulas are tested too: Eq. 14, the definitions of Phi and zeta that start at n = 1, and
the condition Re(s) > 1.
"""

from functools import cache

import mpmath as mp
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from verify import oracle, plots
from verify.exact import ExactGamma
from verify.table import Row, at_most, holds, near, reported

K, RATE = 2.0, 16.7
SOURCE = "Sec. 3.3, App. C.1"


def truncated_log_prob(delta: Tensor, concentration: Tensor, rate: Tensor, terms: int = 1000) -> Tensor:
    """log E[sigma(beta delta)] as the paper computes it (Eqs. 4-6, n = 1000, case 3 at 0), in the shape of delta."""
    zero = delta == 0
    magnitude = torch.where(zero, torch.ones_like(delta), delta.abs()).unsqueeze(-1)
    q = 1 + rate / magnitude
    n = torch.arange(terms, dtype=delta.dtype)
    zetas = ((n + q / 2) ** -concentration).sum(-1) - ((n + (q + 1) / 2) ** -concentration).sum(-1)
    tail = (rate / magnitude.squeeze(-1)) ** concentration * 2**-concentration * zetas
    prob = torch.where(delta > 0, 1 - tail, tail)
    return torch.log(torch.where(zero, torch.full_like(prob, 0.5), prob))


def _value_and_slope(delta: float, exact: bool) -> tuple[float, float]:
    """E and d log E / d delta at one delta, in float64."""
    d, k, rate = (torch.tensor(x, dtype=torch.float64) for x in (delta, K, RATE))
    d.requires_grad_()
    log_p = ExactGamma(k, rate).log_choice_prob(d) if exact else truncated_log_prob(d, k, rate)
    return torch.exp(log_p).item(), torch.autograd.grad(log_p, d)[0].item()


@cache
def turning_point() -> float:
    """The delta > 0 above which the truncated probability rises again, by bisection on the sign of its gradient."""
    low, high = 1e-4, 1.0
    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _value_and_slope(middle, exact=False)[1] > 0 else (middle, high)
    return high


def _truncation_rows() -> list[Row]:
    rows = []
    for delta in (1e-3, 1e-2, 0.05, 0.1, 0.3, 1.3, 10.0, 100.0):
        (e, slope), (cut, cut_slope) = _value_and_slope(delta, True), _value_and_slope(delta, False)
        remainder = 0.5 * (RATE / (RATE + 2000 * delta)) ** K
        rows.append(
            near(f"error of E, n = 1000, delta = {delta:g}: exact {e:.5f}, truncated {cut:.5f}",
                 f"{SOURCE}: '2.1e-5'", remainder, cut - e, 0.02 * remainder + 1e-12, "2 % of the predicted remainder")
        )  # fmt: skip
        rows.append(
            reported(f"d log E / d delta, n = 1000, delta = {delta:g}", SOURCE, f"{slope:+.5f}", f"{cut_slope:+.5f}")
        )
    e, _ = _value_and_slope(1.3, True)
    cut, _ = _value_and_slope(1.3, False)
    rows.append(near("the paper's error, 2.1e-5, is that at delta = 1.3", SOURCE, 2.1e-5, cut - e, 0.1e-5))
    grid = np.linspace(1e-6, 0.12, 500)
    wrong = sum(_value_and_slope(s * float(x), False)[1] < 0 for x in grid for s in (1, -1))
    right = sum(_value_and_slope(s * float(x), True)[1] > 0 for x in grid for s in (1, -1))
    rows.append(
        holds("gradient of the truncation points the wrong way for 0 < |delta| < 0.12", SOURCE,
              "1000 of 1000 points (exact form: 0)", f"{wrong} of 1000 (exact form: {1000 - right})",
              wrong == 1000 and right == 1000)
    )  # fmt: skip
    rows.append(near("the delta at which the truncation turns", SOURCE, 0.13, turning_point(), 0.01))
    _, at_zero = _value_and_slope(0.0, False)
    _, exact_at_zero = _value_and_slope(0.0, True)
    rows.append(near("gradient at exactly 0, App. C case 3 (a constant 1/2)", "Eq. 17", 0.0, at_zero, 0.0))
    rows.append(near("gradient at exactly 0, exact form: E[beta] / 2", "Eq. 4", K / RATE / 2, exact_at_zero, 1e-13))
    return rows


def _printed_rows() -> list[Row]:
    """Eq. 14, Phi under (iii), zeta under Eq. 6 and Re(s) > 1, at delta = 1.3, in high precision."""
    with mp.workdps(oracle.DIGITS):
        a, k, rate = mp.mpf(1.3), mp.mpf(K), mp.mpf(RATE)
        ratio = rate / a
        tail = oracle.gamma_series(1.3, K, RATE).value
        phi_at_ratio = (oracle.gamma_series(1.3, K, RATE).value * ratio**-k) * -1 + ratio**-k  # sum from n = 0
        eq14 = 1 + ratio**k * phi_at_ratio
        eq14_from_one = 1 + ratio**k * (phi_at_ratio - ratio**-k)
        from_one = [mp.zeta(k, x) - x**-k for x in ((1 + ratio) / 2, (2 + ratio) / 2)]
        eq6_from_one = 1 - ratio**k * mp.mpf(2) ** -k * (from_one[0] - from_one[1])
        small = oracle.disagreement([oracle.gamma_series(1.3, 0.3, RATE), oracle.gamma_quadrature(1.3, 0.3, RATE)])
        partial = mp.fsum((n + (1 + ratio) / 2) ** mp.mpf(-0.3) for n in range(1000))
        partial_twice = mp.fsum((n + (1 + ratio) / 2) ** mp.mpf(-0.3) for n in range(2000))
    want = float(1 - tail)
    return [
        reported("Eq. 14 as printed, with the standard Phi (n from 0), s = k: E at delta = 1.3", "Eq. 14",
                 f"{want:.6f}", f"{float(eq14):.6f}: wrong, should read 1 - (rate/d)^k Phi(-1, k, 1 + rate/d)"),
        near("Eq. 14 with (iii)'s Phi (n from 1), s = k: E at delta = 1.3", "Eq. 14, (iii)", want, float(eq14_from_one),
             1e-14),
        reported("Eqs. 4 and 6 with zeta 'from n = 1', as printed under Eq. 6: E at delta = 1.3", "Eq. 6",
                 f"{want:.6f}", f"{float(eq6_from_one):.6f}: wrong, zeta starts at n = 0"),
        at_most("Eq. 5 with k = 0.3, below the paper's condition Re(s) > 1: series against quadrature", "Sec. 3.3",
                "converges for k > 0", float(small), 1e-30),
        near("each zeta series of Eq. 6 grows without bound at k = 0.3: 2,000 over 1,000 terms, 2^0.7", "Eq. 6",
             2**0.7, float(partial_twice / partial), 0.02),
    ]  # fmt: skip


def check(full: bool) -> list[Row]:
    return _truncation_rows() + _printed_rows()


def figures(full: bool) -> dict[str, Figure]:
    grid = np.concatenate([-np.logspace(0, -4, 150), np.logspace(-4, 0, 150)])
    exact = np.array([_value_and_slope(float(x), True) for x in grid])
    cut = np.array([_value_and_slope(float(x), False) for x in grid])
    figure, axes = plots.panels(2, width=4.8)
    for axis, column, title in ((axes[0], 0, "E[sigma(beta delta)]"), (axes[1], 1, "d log E / d delta")):
        for side in (grid < 0, grid > 0):
            axis.plot(grid[side], cut[side, column], "--", color=plots.RED, lw=2)
            axis.plot(grid[side], exact[side, column], color=plots.BLUE, lw=2)
        axis.plot([], [], color=plots.BLUE, label="exact")
        axis.plot([], [], "--", color=plots.RED, label="n = 1000 (App. C.1)")
        axis.axvspan(-turning_point(), turning_point(), color=plots.BLACK, alpha=0.07, lw=0)
        axis.set_xlabel("delta (Gamma(2, 16.7)); shaded: gradient of the wrong sign")
        axis.set_title(title)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[1].set_ylim(-3, 1)
    return {"paper_numerics": figure}
