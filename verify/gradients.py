"""Gradients as a training loop takes them: through softplus, in delta and in the raw parameters.

gradcheck and gradgradcheck (central differences in float64, tolerance 1e-6 relative) see that autograd differentiates
the function that is computed, at points that include delta = 0. That the function is the right one to the last digits
is judged against central differences in 50 digits of the references, taken in the raw parameter: with step 1e-12 and
an error of step^2 / 6 times the third derivative they hold 20 digits. d log E / d raw is small wherever softplus is,
so errors are relative to each derivative.
"""

from collections.abc import Callable

import mpmath as mp
import torch
from torch import Tensor
from torch.func import functional_call

import mixdpo
from verify import oracle
from verify.closed_form import rounding_bounds
from verify.exact import Strength
from verify.table import Row, at_most, holds, oracle_failed

DELTAS = (-40.0, -3.0, -0.2, 0.0, 1e-3, 0.7, 5.0, 60.0)
GAMMAS = ((2.0, 16.7), (0.3, 1.0), (25.0, 200.0))
LOGNORMALS = ((-2.3, 0.6), (-1.0, 0.2), (-2.3, 1.0))
STEP = mp.mpf("1e-12")


def _functional(strength: Strength, **kwargs: Tensor) -> Callable[..., Tensor]:
    """log_choice_prob as a function of delta and the raw parameters."""
    names = [name for name, _ in strength.named_parameters()]

    class Choice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength = strength

        def forward(self, delta: Tensor) -> Tensor:
            return self.strength.log_choice_prob(delta, **kwargs)

    choice = Choice()
    return lambda delta, *raw: functional_call(
        choice, {f"strength.{name}": value for name, value in zip(names, raw, strict=True)}, (delta,)
    )


def _automatic(second: bool) -> list[Row]:
    delta = torch.tensor(DELTAS, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(len(DELTAS), 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cases: list[tuple[str, Strength, dict[str, Tensor]]] = [
        (f"Gamma({k:g}, {r:g})", mixdpo.Gamma(k, r, dtype=torch.float64), {}) for k, r in GAMMAS
    ]
    cases += [
        (
            f"LogNormal({loc:g}, {s:g}), quadrature",
            mixdpo.LogNormal(loc, s, estimator="quadrature", dtype=torch.float64),
            {},
        )
        for loc, s in LOGNORMALS
    ]
    cases += [("LogNormal(-2.3, 0.6), Monte Carlo", mixdpo.LogNormal(dtype=torch.float64), {"noise": noise})]
    test, name = (torch.autograd.gradgradcheck, "gradgradcheck") if second else (torch.autograd.gradcheck, "gradcheck")
    bad = []
    for label, strength, kwargs in cases:
        raw = [p.detach().clone().requires_grad_() for p in strength.parameters()]
        ok = test(_functional(strength, **kwargs), (delta, *raw), atol=1e-7, rtol=1e-6, raise_exception=False)
        if not ok:
            bad.append(label)
    chosen = (-50 * torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).requires_grad_()
    if not test(lambda x: mixdpo.dpo_loss(x[0], x[1], x[2], x[3], 0.1, 0.1)[0], (chosen,), raise_exception=False):
        bad.append("dpo_loss")
    measured = f"wrong for {', '.join(bad)}" if bad else f"{len(cases) + 1} of {len(cases) + 1}"
    claim = f"{name} in float64: delta (0 among them) and raw parameters of {len(cases)} distributions; dpo_loss"
    return [holds(claim, "mixdpo.py, log_choice_prob", f"{len(cases) + 1} of {len(cases) + 1}", measured, not bad)]


def _softplus(raw: mp.mpf) -> mp.mpf:
    return mp.log1p(mp.exp(raw))


def _gamma_log_p(delta: mp.mpf, raw_k: mp.mpf, raw_rate: mp.mpf) -> mp.mpf:
    tail = oracle.gamma_series(abs(delta), _softplus(raw_k), _softplus(raw_rate))
    return oracle.choice(tail, delta < 0)[0]


def _lognormal_log_p(delta: mp.mpf, raw_loc: mp.mpf, raw_scale: mp.mpf) -> mp.mpf:
    tail = oracle.lognormal_trapezoid(abs(delta), raw_loc, _softplus(raw_scale))
    return oracle.choice(tail, delta < 0)[0]


def _central(log_p: Callable[..., mp.mpf], at: list[mp.mpf], j: int) -> mp.mpf:
    up = [x + STEP * (i == j) for i, x in enumerate(at)]
    down = [x - STEP * (i == j) for i, x in enumerate(at)]
    return (log_p(*up) - log_p(*down)) / (2 * STEP)


def _against_references(family: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error of torch's gradients in (delta, raw, raw), and the references' disagreement.

    The second figure compares the central differences with the exact derivatives of the other route.
    """
    worst = apart = 0.0
    reference = _gamma_log_p if family == "Gamma" else _lognormal_log_p
    for parameters in GAMMAS if family == "Gamma" else LOGNORMALS:
        if family == "Gamma":
            strength: Strength = mixdpo.Gamma(*parameters, dtype=dtype)
        else:
            strength = mixdpo.LogNormal(*parameters, estimator="quadrature", dtype=dtype)
        raw = list(strength.parameters())
        for value in DELTAS:
            delta = torch.tensor(value, dtype=dtype, requires_grad=True)
            got = torch.autograd.grad(strength.log_choice_prob(delta), (delta, *raw))
            with mp.workdps(oracle.DIGITS):
                at = [mp.mpf(delta.item()), *(mp.mpf(p.item()) for p in raw)]
                want = [_central(reference, at, j) for j in range(3)]
                apart = max(apart, _disagreement(family, at, want))
                for g, w in zip(got, want, strict=True):
                    # At delta = 0 the parameters have no effect, and differences leave 1e-38 of rounding: absolute.
                    scale = abs(w) if abs(w) > 1e-25 else 1
                    worst = max(worst, float(abs(g.item() - w) / scale))
    return worst, apart


def _disagreement(family: str, at: list[mp.mpf], want: list[mp.mpf]) -> float:
    delta, first, second = at
    if family == "Gamma":
        other = oracle.gamma_quadrature(abs(delta), _softplus(first), _softplus(second))
        chain = (1, 1 / (1 + mp.exp(-first)), 1 / (1 + mp.exp(-second)))
    else:
        other = oracle.lognormal_panels(abs(delta), first, _softplus(second))
        chain = (1, 1, 1 / (1 + mp.exp(-second)))
    exact = oracle.choice(other, delta < 0)[1:]
    gaps = [abs(w - c * e) / max(abs(w), mp.mpf("1e-8")) for w, c, e in zip(want, chain, exact, strict=True)]
    return float(max(gaps))


def check(full: bool) -> list[Row]:
    rows = _automatic(second=False) + _automatic(second=True)
    for family in ("Gamma", "LogNormal"):
        for dtype in (torch.float64, torch.float32):
            error, apart = _against_references(family, dtype)
            name = str(dtype).removeprefix("torch.")
            source = f"mixdpo.py, {family}"
            if not apart < 1e-18:
                rows.append(oracle_failed(f"{family}: two references of the gradients agree", source, apart, 1e-18))
                continue
            # The quadrature with 64 nodes is exact to 1e-11 (see quadrature), in float32 to rounding.
            bound = rounding_bounds(dtype)[1]
            if family == "LogNormal" and dtype == torch.float64:
                bound = 1e-9
            claim = f"{family}, {name}: gradients in delta and raw parameters against central differences, 50 digits"
            rows.append(at_most(claim, source, "relative error", error, bound))
    return rows
