"""Gamma.log_choice_prob and its gradients in delta, concentration and rate against three mpmath routes.

For delta < 0 the quantity is log T, T the tail, and every figure is a relative error. For delta >= 0 it is
log(1 - T), close to -T for large delta: a relative error of -T is an absolute error of log T, so rounding log T to
the nearest double already costs |log T| eps (2e-14 at T = 1e-40). That is not a defect of a formula but of having
log T as an intermediate, and there the error is measured over (1 + |log T|).
Where the reference is below the normal range of the dtype the result has to be as small.

The bounds are worst cases of rounding to first order. With unit roundoff u and weights w_n a
term w_n (1 + n u)^-k is off by at most 8 u |w_n| (1 for the weight, 1.9 for exp(-z), z rounded by 4 z u, 5 for a
pairwise sum), F >= 1/2 and |log T| >= log 2: 23 u sum |w_n| for the value. In a derivative the terms carry a factor
n at worst, which F does not divide out: 32 u sum n |w_n|. (The acceleration itself is below this: series_bound.)

The points: k in [1e-2, 1e3], rate in [1e-1, 1e3], |delta| in [1e-9, 1e5], both signs, drawn log-uniformly and
representable in float32, so that one reference serves both dtypes; then 0, -0.0, the denormal and the huge.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import mpmath as mp
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from verify import plots
from verify.exact import ExactGamma
from verify.oracle import AGREE, Tail, alternating_weights, choice, disagreement, gamma_routes, lerch
from verify.table import Row, at_most, near, oracle_failed, reported

CONCENTRATIONS = (0.01, 0.03, 0.1, 0.3, 0.7, 1.0, 2.0, 5.0, 25.0, 100.0, 300.0, 1000.0)
RATES = (0.1, 1.0, 5.3, 16.7, 100.0, 1000.0)
QUANTITIES = ("value", "d/d delta", "d/d concentration", "d/d rate")
TERMS = {torch.float64: 22, torch.float32: 12}
EXTREMES = {
    torch.float64: (0.0, 5e-324, 1e-310, 1e-200, 1e200, 1e308),
    torch.float32: (0.0, 1e-45, 1e-40, 1e-30, 1e30, 3e38),
}
REFERENCE = (  # E for delta > 0, (k, rate / delta), published with the project
    (2.5, 10, "0.56170728963269808052"),
    (25, 25, "0.72924825154611351268"),
    (100, 10, "0.99992744635474108747"),
    (0.5, 1000, "0.50012499996093756152"),
)


@dataclass
class Errors:
    """One entry per point: its parameters, log T, and the relative errors of the four quantities."""

    k: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)
    log_t: list[float] = field(default_factory=list)
    relative: list[list[float]] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(np.array(x) for x in (self.k, self.rate, self.delta, self.log_t, self.relative))


def rounding_bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Rounding bounds of the value and of a first derivative, relative (module docstring)."""
    unit = torch.finfo(dtype).eps / 2
    weights = [abs(float(w)) for w in alternating_weights(TERMS[dtype])]
    return 23 * unit * sum(weights), 32 * unit * sum(n * w for n, w in enumerate(weights))


def _single(x: float) -> float:
    return float(np.float32(x))


def _grid(full: bool) -> Iterator[tuple[float, float, list[float]]]:
    rng = np.random.default_rng(0)
    for k in CONCENTRATIONS:
        for rate in RATES:
            yield _single(k), _single(rate), [_single(x) for x in 10 ** rng.uniform(-9, 5, 80 if full else 16)]


@cache
def references(full: bool) -> tuple[dict[tuple[float, float, float], Tail], mp.mpf, int]:
    """The tail at every point, the worst disagreement between routes, and the number of points with all three."""
    tails, worst, three = {}, mp.mpf(0), 0
    extreme = sorted({_single(x) if 1e-44 < x < 1e38 else x for dtype in EXTREMES for x in EXTREMES[dtype]})
    extreme_points = [(k, _single(16.7), extreme) for k in (_single(0.01), 2.0, 1000.0)]
    for k, rate, magnitudes in [*_grid(full), *extreme_points]:
        for a in magnitudes:
            routes = gamma_routes(a, k, rate)
            worst = max(worst, disagreement(routes))
            three += len(routes) == 3
            tails[k, rate, a] = routes[0]
    return tails, worst, three


def _evaluate(k: float, rate: float, deltas: list[float], dtype: torch.dtype) -> list[list[float]]:
    """Rows (log E, d/d delta, d/dk, d/d rate), one per delta."""
    rows = []
    for value in deltas:
        delta, c, r = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (value, k, rate))
        log_p = ExactGamma(c, r).log_choice_prob(delta)
        rows.append([log_p.item(), *(g.item() for g in torch.autograd.grad(log_p, (delta, c, r)))])
    return rows


def _relative(got: float, want: mp.mpf, tiny: float) -> float:
    if abs(want) < tiny:
        return 0.0 if abs(got) <= 2 * tiny else math.inf
    return float(abs(mp.mpf(got) - want) / abs(want)) if math.isfinite(got) else math.inf


@cache
def measure(full: bool, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    tails, _, _ = references(full)
    tiny = torch.finfo(dtype).tiny * 4
    errors = Errors()
    for k, rate, magnitudes in _grid(full):
        deltas = [sign * a for a in magnitudes for sign in (-1, 1)]
        for delta, got in zip(deltas, _evaluate(k, rate, deltas, dtype), strict=True):
            tail = tails[k, rate, abs(delta)]
            want = choice(tail, delta < 0)
            errors.k.append(k)
            errors.rate.append(rate)
            errors.delta.append(delta)
            errors.log_t.append(float(mp.log(tail.value)))
            errors.relative.append([_relative(g, w, tiny) for g, w in zip(got, want, strict=True)])
    return errors.arrays()


def _extreme_rows(full: bool, dtype: torch.dtype) -> Row:
    tails, _, _ = references(full)
    worst, tiny = 0.0, torch.finfo(dtype).tiny * 4
    for k, rate in ((_single(0.01), _single(16.7)), (2.0, _single(16.7)), (1000.0, _single(16.7))):
        for a in EXTREMES[dtype]:
            a = _single(a) if dtype == torch.float32 else a
            tail = tails.get((k, rate, a)) or gamma_routes(a, k, rate)[0]
            for delta in (a, -a):
                negative = math.copysign(1, delta) < 0 and a > 0
                got = _evaluate(k, rate, [delta], dtype)[0]
                scale = 1 + (0 if negative else abs(float(mp.log(tail.value))))
                for g, w in zip(got, choice(tail, negative), strict=True):
                    worst = max(worst, _relative(g, w, tiny) / scale)
    name = str(dtype).removeprefix("torch.")
    smallest, largest = EXTREMES[dtype][1], EXTREMES[dtype][-1]
    return at_most(
        f"{name}: value and gradients at delta = 0, -0.0, ±{smallest:.0e} ... ±{largest:.0e}, k = 0.01, 2, 1000",
        "mixdpo.py, header",
        "relative error",
        worst,
        rounding_bounds(dtype)[1],
    )


def _lerch_row(digits: int) -> Row:
    """mpmath.lerchphi beside the agreed references: how often it is wrong, and where it returns an exact 0."""
    wrong, zero, count = 0, [], 0
    for k in (0.5, 2.0, 2.5, 25.0, 100.0):
        for ratio in (0.1, 1.0, 10.0, 25.0, 100.0):
            count += 1
            value = lerch(1.0, k, ratio, digits)
            if abs(value / gamma_routes(1.0, k, ratio)[0].value - 1) > 1e-10:
                wrong += 1
                if value == 0:
                    zero.append(f"({k:g}, {ratio:g})")
    return reported(
        f"mpmath {mp.__version__} lerchphi at {digits} digits, 5 x 5 (k, rate/delta): silently wrong by > 1e-10",
        "Eqs. 4, 5 as a library call",
        "0",
        f"{wrong} of {count}; exactly 0 at {', '.join(zero)}" if wrong else f"0 of {count}",
    )


def check(full: bool) -> list[Row]:
    tails, worst, three = references(full)
    if not worst < AGREE:
        return [oracle_failed("quadrature, Hurwitz and series agree", "oracle.py", float(worst), float(AGREE))]
    rows = []
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        _, _, delta, log_t, relative = measure(full, dtype)
        eps = torch.finfo(dtype).eps
        negative = delta < 0
        scale = eps * (1 + np.abs(log_t))
        for j, quantity in enumerate(QUANTITIES):
            bound = rounding_bounds(dtype)[j > 0]
            rows.append(
                at_most(
                    f"{name}: {quantity} of log E, delta < 0, {negative.sum()} points",
                    "Eqs. 4-6; mixdpo.py, gamma_log_tail",
                    "relative error",
                    relative[negative, j].max(),
                    bound,
                )
            )
            rows.append(
                at_most(
                    f"{name}: {quantity} of log E, delta > 0, {(~negative).sum()} points, over (1 + |log T|)",
                    "Eqs. 4-6; mixdpo.py, gamma_log_tail",
                    "relative error / (1 + |log T|)",
                    (relative[~negative, j] / scale[~negative]).max() * eps,
                    bound,
                )
            )
        rows.append(_extreme_rows(full, dtype))
    rows.append(
        at_most(
            f"three references agree with each other ({len(tails)} points, {three} by all three, the rest by two)",
            "oracle.py",
            "30 digits",
            float(worst),
            float(AGREE),
        )
    )
    for k, ratio, text in REFERENCE:
        want = mp.mpf(text)
        got = math.exp(_evaluate(float(k), float(ratio), [1.0], torch.float64)[0][0])
        rows.append(near(f"E at k = {k}, rate/delta = {ratio}", "reference value", float(want), got, 4e-16, "2 ulp"))
    return rows + [_lerch_row(digits) for digits in (15, 30, 50)]


def figures(full: bool) -> dict[str, Figure]:
    figure, axes = plots.panels(2, width=5.4, height=4.2)
    for axis, dtype in zip(axes, (torch.float64, torch.float32), strict=True):
        k, rate, delta, log_t, relative = measure(full, dtype)
        eps = torch.finfo(dtype).eps
        error = relative.max(1) / np.where(delta < 0, 1, 1 + np.abs(log_t)) / eps
        signed = np.sign(delta) * (np.log10(np.abs(delta) / rate) + 13)
        order = np.argsort(error)
        dots = axis.scatter(
            signed[order],
            k[order],
            c=np.maximum(error[order], 0.1),
            s=9,
            rasterized=True,
            cmap="cividis",
            norm=LogNorm(0.1, 1e3),
        )
        axis.set_yscale("log")
        ticks = (-9, -3, 3)
        axis.set_xticks([-(t + 13) for t in ticks] + [t + 13 for t in ticks])
        axis.set_xticklabels([f"$-10^{{{t}}}$" for t in ticks] + [f"$10^{{{t}}}$" for t in ticks])
        axis.set_xlabel("delta / rate (signed logarithm)")
        axis.set_ylabel("concentration k")
        axis.set_title(f"{str(dtype).removeprefix('torch.')}: worst of value and 3 gradients, in eps = {eps:.1e}")
        figure.colorbar(dots, ax=axis, label="relative error / eps (delta > 0: / (1 + |log T|))")
    return {"closed_form": figure}
