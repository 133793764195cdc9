"""mixdpo.py against mpmath, hand-computed rows and identities, and under the transformations people apply to it."""

import ast
import copy
import functools
import itertools
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixdpo
from mixdpo import Gamma, LogNormal, PointMass, dpo_loss, mixdpo_loss
from tests import oracle

f32, f64 = torch.float32, torch.float64

FAMILIES = {
    "point_mass": PointMass,
    "gamma": Gamma,
    "quadrature": functools.partial(LogNormal, estimator="quadrature"),
    "monte_carlo": LogNormal,
}
MIXTURES = [family for family in FAMILIES if family != "point_mass"]


def log_choice_prob(strength: nn.Module, delta: Tensor) -> Tensor:
    """As a function of delta and the parameters alone: Monte Carlo gets the same draws at every call."""
    if isinstance(strength, LogNormal) and strength.estimator == "monte_carlo":
        quantiles = (torch.arange(strength.samples, dtype=f64, device=delta.device) + 0.5) / strength.samples
        return strength.log_choice_prob(delta, noise=torch.special.ndtri(quantiles).expand(*delta.shape, -1))
    return strength.log_choice_prob(delta)


def worst_relative_error(got: Tensor, expected: Tensor) -> float:
    """Where the true value is below the smallest normal number, it only has to be as small."""
    tiny = torch.finfo(got.dtype).tiny
    got = got.detach().cpu().double()
    below = expected.abs() < tiny
    assert (got[below].abs() <= 2 * tiny).all()
    return ((got - expected) / expected)[~below].abs().max().item()


def agree_to(digits: int, left: oracle.LogE, right: oracle.LogE) -> bool:
    with mpmath.workdps(oracle.DIGITS):
        unit = mpmath.mpf(10) ** -digits  # absolute only where the truth is 0, and a sum leaves 1e-40 of it
        return all(abs(x - y) <= unit * max(abs(y), 1e-10) for x, y in zip(left, right, strict=True))


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the oracles ------------------------------------------------------------------------------------------------------


def log_uniform_points(count: int, seed: int) -> np.ndarray:
    """(|delta|, concentration, rate) over the whole domain."""
    low, high = np.log([1e-9, 1e-2, 1e-1]), np.log([1e5, 1e3, 1e3])
    return np.exp(np.random.default_rng(seed).uniform(low, high, (count, 3)))


def test_series_and_integral_agree_for_gamma():
    corners = itertools.product([0.0, 1e-9, 1e5], [1e-2, 1e3], [1e-1, 1e3])
    for point in [*corners, *log_uniform_points(24, seed=1).tolist()]:
        for series, integral in zip(oracle.gamma_series(*point), oracle.gamma_integral(*point), strict=True):
            assert agree_to(25, series, integral), point


def test_series_gives_the_reference_digits():
    for (concentration, ratio), digits in REFERENCE_VALUES.items():
        _, positive = oracle.gamma_series(1.0, concentration, ratio)
        with mpmath.workdps(oracle.DIGITS):
            assert abs(mpmath.exp(positive.value) - mpmath.mpf(digits)) < 1e-20


def test_equal_steps_panels_and_adaptive_quadrature_agree_for_lognormal():
    for point in [(0.0, -2.3, 0.6), (1e5, -2.3, 0.1), (1e5, -2.3, 1.0), (30.0, 0.0, 3.0), (300.0, 0.0, 0.3)]:
        for sums, panels in zip(oracle.lognormal(*point), oracle.lognormal_panels(*point), strict=True):
            assert agree_to(25, sums, panels), point
    with mpmath.workdps(30):
        a, loc, scale = mpmath.mpf(1000), mpmath.mpf(-2.3), mpmath.mpf(0.6)
        integral = mpmath.quad(
            lambda x: mpmath.npdf(x) / (1 + mpmath.exp(a * mpmath.exp(loc + scale * x))), [*range(-16, 5)]
        )
        assert abs(mpmath.log(integral) - oracle.lognormal(a, loc, scale)[0].value) < 1e-22


# --- Gamma ------------------------------------------------------------------------------------------------------------

# E for delta > 0 at (concentration, rate / delta).
REFERENCE_VALUES = {
    (2.5, 10.0): "0.56170728963269808052",
    (25.0, 25.0): "0.72924825154611351268",
    (100.0, 10.0): "0.99992744635474108747",
    (0.5, 1000.0): "0.50012499996093756152",
}


@functools.cache
def gamma_grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Points (n, 3), rounded to dtype, and the truth at both signs of delta: (2, n, value and three derivatives)."""
    lattice = itertools.product(
        [0.0, *np.geomspace(1e-9, 1e5, 15)], np.geomspace(1e-2, 1e3, 11), np.geomspace(1e-1, 1e3, 9)
    )
    points = torch.tensor([*lattice, *log_uniform_points(400, seed=2).tolist()], dtype=dtype)
    truth = [[[float(x) for x in side] for side in oracle.gamma_series(*point)] for point in points.tolist()]
    return points, torch.tensor(truth, dtype=f64).transpose(0, 1)


@pytest.mark.parametrize(("dtype", "value_bound", "gradient_bound"), [(f64, 1e-12, 1e-11), (f32, 2e-5, 1e-3)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_gamma_is_exact_over_decades_of_everything(sign, dtype, value_bound, gradient_bound, device):
    points, truth = gamma_grid(dtype)
    magnitude, concentration, rate = points.to(device).unbind(-1)

    def log_e(delta: Tensor, concentration: Tensor, rate: Tensor) -> Tensor:
        return mixdpo._log_choice_prob(delta, lambda a: mixdpo.gamma_log_tail(a, concentration, rate))

    gradients, value = torch.func.vmap(torch.func.grad_and_value(log_e, argnums=(0, 1, 2)))(
        sign * magnitude, concentration, rate
    )
    # At delta = 0, also at the -0.0 that sign = -1 makes, both one-sided forms hold; 0 counts as positive.
    expected = torch.where((magnitude.cpu() == 0).unsqueeze(-1), truth[1], truth[(sign + 1) // 2])
    assert worst_relative_error(value, expected[:, 0]) < value_bound
    for i, gradient in enumerate(gradients, 1):
        assert worst_relative_error(gradient, expected[:, i]) < gradient_bound


def test_gamma_gives_the_reference_digits():
    for (concentration, ratio), digits in REFERENCE_VALUES.items():
        log_e = Gamma(concentration, 3 * ratio, dtype=f64).log_choice_prob(torch.tensor(3.0))
        assert math.exp(log_e.item()) == pytest.approx(float(digits), rel=1e-15, abs=0)


def test_gamma_gradients_reach_the_raw_parameters():
    strength = Gamma(0.7, 16.7, dtype=f64)
    concentration, rate = strength.concentration.item(), strength.rate.item()
    delta = torch.tensor([-40.0, -1.0, 0.3, 25.0], dtype=f64, requires_grad=True)
    strength.log_choice_prob(delta).sum().backward()
    truth = [oracle.gamma_series(abs(d), concentration, rate)[d > 0] for d in delta.tolist()]
    assert delta.grad.tolist() == pytest.approx([float(t.by_delta) for t in truth], rel=1e-12)
    for raw, value, name in [
        (strength.raw_concentration, concentration, "by_first"),
        (strength.raw_rate, rate, "by_second"),
    ]:
        by_value = float(sum(getattr(t, name) for t in truth))
        assert raw.grad.item() == pytest.approx(by_value * -math.expm1(-value), rel=1e-12)  # d softplus = 1 - e^-value


@pytest.mark.parametrize(("terms", "bound"), [(12, 1.4e-9), (22, 4e-16)])
def test_alternating_weights_keep_their_error_bound(terms, bound):
    weights = mixdpo._alternating_weights(terms)
    for a, limit in [
        (lambda n: 1 / (n + 1), math.log(2)),
        (lambda n: 1.0, 0.5),
        (lambda n: (n + 1) ** -0.01, float(mpmath.altzeta(0.01))),
        (lambda n: float(n == 0), 1.0),
    ]:
        assert math.fsum(w * a(n) for n, w in enumerate(weights)) == pytest.approx(limit, rel=bound)


def test_gamma_tends_to_the_point_mass_as_one_over_concentration():
    beta, delta = 0.1, torch.tensor([-60.0, -10.0, -1.0, 1.0, 10.0, 60.0], dtype=f64)
    limit = F.logsigmoid(beta * delta)
    s = torch.sigmoid(beta * delta)
    leading = (beta * delta).square() / 2 * (1 - s) * (1 - 2 * s)  # Var(beta) delta^2 / 2 * sigma'' / sigma, times k
    for concentration in (1e4, 1e6):
        strength = Gamma(concentration, concentration / beta, dtype=f64)
        torch.testing.assert_close(
            concentration * (strength.log_choice_prob(delta) - limit), leading, rtol=100 / concentration, atol=1e-6
        )


# --- delta = 0, where every pair of a run starts ----------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize(("dtype", "bound"), [(f64, 1e-13), (f32, 2e-6)])
@pytest.mark.parametrize(
    ("strength", "mean"),
    [
        (PointMass(0.3, dtype=f64), 0.3),
        (Gamma(0.4, 16.7, dtype=f64), 0.4 / 16.7),
        (Gamma(250.0, 2.0, dtype=f64), 125.0),
        (LogNormal(-2.3, 0.6, "quadrature", dtype=f64), math.exp(-2.3 + 0.18)),
        (LogNormal(0.5, 1.0, "quadrature", dtype=f64), math.e),
    ],
    ids=repr,
)
def test_gradient_at_zero_is_half_the_mean(strength, mean, dtype, bound, zero, device):
    strength = copy.deepcopy(strength).to(device, dtype)
    delta = torch.tensor(zero, dtype=dtype, device=device, requires_grad=True)
    log_e = strength.log_choice_prob(delta)
    log_e.backward()
    assert log_e.item() == pytest.approx(-math.log(2), rel=bound)
    assert delta.grad.item() == pytest.approx(mean / 2, rel=bound)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_monte_carlo_gradient_at_zero_is_half_the_mean_of_the_draws(zero):
    noise = torch.randn(3, 16, dtype=f64)
    delta = torch.full((3,), zero, dtype=f64, requires_grad=True)
    LogNormal(-2.3, 0.6, dtype=f64).log_choice_prob(delta, noise=noise).sum().backward()
    torch.testing.assert_close(delta.grad, torch.exp(-2.3 + 0.6 * noise).mean(-1) / 2, rtol=1e-13, atol=0)


# --- LogNormal --------------------------------------------------------------------------------------------------------


@functools.cache
def lognormal_truth(magnitudes: tuple[float, ...], loc: float, scale: float) -> Tensor:
    """(value and three derivatives, 2 * len(magnitudes)): first at -magnitudes, then at +magnitudes."""
    pairs = [oracle.lognormal(a, loc, scale) for a in magnitudes]
    return torch.tensor([[float(x) for x in pair[side]] for side in (0, 1) for pair in pairs], dtype=f64).T


def lognormal_results(strength: LogNormal, magnitudes: tuple[float, ...]) -> tuple[Tensor, ...]:
    """log E and its derivatives in delta, loc and scale at -magnitudes, then at +magnitudes."""
    loc, scale = strength.loc.detach(), strength.scale.detach()
    magnitude = torch.tensor(magnitudes, dtype=loc.dtype, device=loc.device)

    def log_e(delta: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return mixdpo._log_choice_prob(
            delta, lambda a: mixdpo.lognormal_log_tail_quadrature(a, loc, scale, strength.nodes)
        )

    delta = torch.cat([-magnitude, magnitude])
    gradients, value = torch.func.vmap(torch.func.grad_and_value(log_e, argnums=(0, 1, 2)), in_dims=(0, None, None))(
        delta, loc, scale
    )
    torch.testing.assert_close(strength.log_choice_prob(delta), value)
    return value, *gradients


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("loc", [-4.0, -2.3, 0.0])
def test_quadrature_error_is_below_1e_10_with_default_nodes(loc, scale, device):
    magnitudes = (0.0, 1e-6, 0.1, 1.0, 10.0, 100.0, 300.0)
    strength = LogNormal(loc, scale, "quadrature", dtype=f64, device=device)
    value, *gradients = lognormal_results(strength, magnitudes)
    truth = lognormal_truth(magnitudes, loc, strength.scale.item())
    assert (value.cpu() - truth[0]).abs().max() < 1e-10
    for gradient, expected in zip(gradients, truth[1:], strict=True):
        assert (gradient.cpu() - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("dtype", "value_bound", "gradient_bound"), [(f64, 1e-10, 1e-9), (f32, 2e-6, 1e-3)])
@pytest.mark.parametrize("scale", [0.1, 0.6, 1.0])
def test_quadrature_keeps_relative_accuracy_in_the_far_tails(scale, dtype, value_bound, gradient_bound):
    magnitudes = (1e3, 1e5)
    strength = LogNormal(-2.3, scale, "quadrature", dtype=dtype)
    got = lognormal_results(strength, magnitudes)
    truth = lognormal_truth(magnitudes, strength.loc.item(), strength.scale.item())
    for result, expected, bound in zip(got, truth, [value_bound] + [gradient_bound] * 3, strict=True):
        assert worst_relative_error(result[:2], expected[:2]) < bound


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_quadrature_needs_64_nodes_per_unit_of_scale(scale):
    magnitudes = (0.0, 1.0, 30.0, 300.0)
    errors = {}
    for nodes in (64, int(64 * scale)):
        strength = LogNormal(-2.3, scale, "quadrature", nodes=nodes, dtype=f64)
        truth = lognormal_truth(magnitudes, -2.3, strength.scale.item())
        errors[nodes] = (lognormal_results(strength, magnitudes)[0] - truth[0]).abs().max()
    assert errors[int(64 * scale)] < 1e-12 < 1e-10 < errors[64]


def test_monte_carlo_is_the_log_of_the_mean_over_the_given_draws():
    noise = torch.randn(2, 5, 7, dtype=f64)
    delta = torch.tensor([[-90.0, -2.0, -0.0, 0.4, 80.0], [3.0, -5.0, 0.0, 11.0, -30.0]], dtype=f64)
    strength = LogNormal(-1.1, 0.8, samples=7, dtype=f64)
    by_hand = torch.sigmoid(delta.unsqueeze(-1) * torch.exp(-1.1 + 0.8 * noise)).mean(-1).log()
    torch.testing.assert_close(strength.log_choice_prob(delta, noise=noise), by_hand, rtol=1e-12, atol=1e-15)


def test_monte_carlo_keeps_relative_accuracy_in_both_tails():
    draws = [-1.5, 0.0, 1.5]
    strength = LogNormal(-2.3, 0.6, samples=3, dtype=f64)
    scale = strength.scale.item()
    for delta in (-1e5, -3e3, 300.0, 3e3):
        with mpmath.workdps(300):
            betas = [mpmath.exp(mpmath.mpf(-2.3) + mpmath.mpf(scale) * x) for x in draws]
            truth = float(mpmath.log(sum(1 / (1 + mpmath.exp(-b * mpmath.mpf(delta))) for b in betas) / 3))
        got = strength.log_choice_prob(torch.tensor(delta, dtype=f64), noise=torch.tensor(draws, dtype=f64))
        assert got.item() == pytest.approx(truth, rel=1e-12, abs=0)


def test_monte_carlo_draws_are_fresh_per_pair_and_call_and_follow_the_seed():
    strength, delta = LogNormal(), torch.full((50,), 12.0)
    torch.manual_seed(3)
    first, second = strength.log_choice_prob(delta), strength.log_choice_prob(delta)
    assert len(set(first.tolist()) | set(second.tolist())) > 90
    torch.manual_seed(3)
    assert torch.equal(strength.log_choice_prob(delta), first)


def test_monte_carlo_tends_to_quadrature():
    torch.manual_seed(0)
    delta = torch.tensor([-30.0, 10.0])
    monte_carlo = LogNormal(samples=200_000).log_choice_prob(delta)
    torch.testing.assert_close(monte_carlo, LogNormal(estimator="quadrature").log_choice_prob(delta), rtol=5e-3, atol=0)


# --- identities -------------------------------------------------------------------------------------------------------

identity = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


deltas = st.one_of(st.just(0.0), decades(-9, 5)).flatmap(lambda a: st.sampled_from([a, -a]))
strengths = st.one_of(
    st.builds(functools.partial(Gamma, dtype=f64), decades(-2, 3), decades(-1, 3)),
    st.builds(functools.partial(LogNormal, dtype=f64), st.floats(-4, 1), decades(-1, 0)),
    st.builds(functools.partial(LogNormal, estimator="quadrature", dtype=f64), st.floats(-4, 1), decades(-1, 0)),
    st.builds(functools.partial(PointMass, dtype=f64), decades(-3, 1)),
)


@identity
@given(strengths, deltas)
def test_both_orders_of_a_pair_have_probability_one(strength, delta):
    both = log_choice_prob(strength, torch.tensor([delta, -delta], dtype=f64)).exp()
    assert both.sum().item() == pytest.approx(1, abs=1e-14)


@identity
@given(strengths, deltas, st.floats(1e-9, 2))
def test_probability_rises_with_delta(strength, delta, step):
    higher = delta + step * abs(delta)
    ends = torch.tensor([delta, higher], dtype=f64, requires_grad=True)
    log_p = log_choice_prob(strength, ends)
    # The slack is the rounding of the value, 7e-14 relative at concentration 1000.
    assert log_p[1] - log_p[0] >= -2e-13 * log_p[0].abs()
    (slope,) = torch.autograd.grad(log_p.sum(), ends)
    assert (slope >= 0).all()


@identity
@given(decades(-2, 2), decades(-1, 2), deltas, decades(-3, 3))
def test_gamma_depends_on_delta_over_rate_alone(concentration, rate, delta, factor):
    one = Gamma(concentration, rate, dtype=f64).log_choice_prob(torch.tensor(delta, dtype=f64))
    other = Gamma(concentration, factor * rate, dtype=f64).log_choice_prob(torch.tensor(factor * delta, dtype=f64))
    # Either tail moves by concentration times the rounding of the rate, which softplus keeps to 1e-15.
    assert other.item() == pytest.approx(one.item(), rel=1e-12, abs=1e-300)


@identity
@given(st.floats(-4, 1), decades(-1, 0), st.floats(-300, 300), decades(-3, 3))
def test_lognormal_depends_on_delta_times_exp_loc_alone(loc, scale, delta, factor):
    for estimator in ("quadrature", "monte_carlo"):
        one = LogNormal(loc, scale, estimator, dtype=f64)
        other = LogNormal(loc - math.log(factor), scale, estimator, dtype=f64)
        expected = log_choice_prob(one, torch.tensor(delta, dtype=f64)).item()
        got = log_choice_prob(other, torch.tensor(factor * delta, dtype=f64)).item()
        assert got == pytest.approx(expected, rel=1e-11, abs=1e-300)


@identity
@given(decades(-2, 3), decades(-1, 3), deltas)
def test_gamma_posterior_mean_is_the_mean_less_the_slope_in_the_rate(concentration, rate, delta):
    strength = Gamma(concentration, rate, dtype=f64)
    k, r = strength.concentration.item(), strength.rate.item()
    by_rate = oracle.gamma_series(abs(delta), k, r)[delta >= 0].by_second
    with mpmath.workdps(oracle.DIGITS):
        expected = float(mpmath.mpf(k) / mpmath.mpf(r) - by_rate)
    got = strength.posterior_mean(torch.tensor([delta], dtype=f64))
    # exp of a difference of two logarithms of up to 14,000: 1e-16 of either is 1e-12.
    assert got.item() == pytest.approx(expected, rel=1e-11, abs=0)


@pytest.mark.parametrize(("loc", "scale"), [(-2.3, 0.6), (0.0, 1.0), (-4.0, 0.1)])
@pytest.mark.parametrize("estimator", ["monte_carlo", "quadrature"])
def test_lognormal_posterior_mean_is_the_ratio_of_two_integrals(loc, scale, estimator):
    strength = LogNormal(loc, scale, estimator, dtype=f64)
    deltas = [-300.0, -10.0, -0.5, 0.0, 0.5, 10.0, 300.0]
    expected = [float(oracle.lognormal_posterior_mean(d, loc, strength.scale.item())) for d in deltas]
    assert strength.posterior_mean(torch.tensor(deltas, dtype=f64)).tolist() == pytest.approx(expected, rel=1e-9)


def test_point_mass_posterior_mean_is_beta():
    assert PointMass(0.25).posterior_mean(torch.tensor([[-9.0, 0.0, 1e9]])).tolist() == [[0.25, 0.25, 0.25]]


@given(decades(-2, 3), decades(-1, 3))
@identity
def test_moments_are_those_of_torch_distributions(first, second):
    scale = min(first, 2.0)
    for strength, known in [
        (Gamma(first, second, dtype=f64), torch.distributions.Gamma(torch.tensor(first, dtype=f64), second)),
        (
            LogNormal(second / 100, scale, dtype=f64),
            torch.distributions.LogNormal(torch.tensor(second / 100, dtype=f64), scale),
        ),
    ]:
        assert strength.mean.item() == pytest.approx(known.mean.item(), rel=1e-13)
        assert strength.variance.item() == pytest.approx(known.variance.item(), rel=1e-11)
        assert strength.cv.item() == pytest.approx((known.stddev / known.mean).item(), rel=1e-11)
    point = PointMass(second, dtype=f64)
    assert (point.mean.item(), point.variance.item(), point.cv.item()) == (second, 0, 0)


# --- losses -----------------------------------------------------------------------------------------------------------

# Two pairs: implicit rewards (1, -0.5) and (-2, 1), so delta_r = 1.5 and -3.
ROWS = ([-10.0, -22.0], [-12.0, -19.0], [-11.0, -20.0], [-11.5, -20.0])


def rows(dtype: torch.dtype = f64, requires_grad: bool = False) -> list[Tensor]:
    return [torch.tensor(row, dtype=dtype, requires_grad=requires_grad) for row in ROWS]


def test_dpo_loss_on_hand_computed_rows():
    losses, chosen, rejected = dpo_loss(*rows(), beta=0.1)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.15)), math.log1p(math.exp(0.3))], rel=1e-14)
    assert chosen.tolist() == pytest.approx([0.1, -0.2])
    assert rejected.tolist() == pytest.approx([-0.05, 0.1])


def test_label_smoothing_mixes_both_labels():
    losses, *_ = dpo_loss(*rows(), beta=0.1, label_smoothing=0.2)
    expected = [0.8 * math.log1p(math.exp(-x)) + 0.2 * math.log1p(math.exp(x)) for x in (0.15, -0.3)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32, f64])
def test_point_mass_is_plain_dpo(dtype):
    same = f64 if dtype == f64 else f32
    mixed, plain = mixdpo_loss(*rows(dtype), PointMass(0.3, dtype=same)), dpo_loss(*rows(dtype), beta=0.3)
    for got, expected in zip(mixed, plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixdpo_loss_is_minus_log_choice_prob_of_the_reward_difference(family):
    strength = FAMILIES[family](dtype=f64)
    delta = torch.tensor([1.5, -3.0], dtype=f64)
    given_noise = {"noise": torch.randn(2, 16, dtype=f64)} if family == "monte_carlo" else {}
    losses, chosen, rejected = mixdpo_loss(*rows(), strength, **given_noise)
    assert torch.equal(losses, -strength.log_choice_prob(delta, **given_noise))
    torch.testing.assert_close(chosen, strength.mean * torch.tensor([1.0, -2.0], dtype=f64))
    torch.testing.assert_close(rejected, strength.mean * torch.tensor([-0.5, 1.0], dtype=f64))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_carry_gradients_and_rewards_none(family):
    strength, logps = FAMILIES[family](dtype=f64), rows(requires_grad=True)
    for losses, chosen, rejected in (dpo_loss(*logps), mixdpo_loss(*logps, strength)):
        assert losses.requires_grad
        assert not chosen.requires_grad
        assert not rejected.requires_grad
        by_policy_chosen, by_policy_rejected, *_ = torch.autograd.grad(losses.sum(), logps)
        assert (by_policy_chosen < 0).all()
        assert torch.equal(by_policy_rejected, -by_policy_chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32, f64])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, f32, f64])
@pytest.mark.parametrize("family", FAMILIES)
def test_computation_is_in_the_widest_dtype(family, parameter_dtype, dtype):
    strength = FAMILIES[family](dtype=parameter_dtype)
    wide = f64 if f64 in (dtype, parameter_dtype) else f32
    assert mixdpo_loss(*rows(dtype), strength)[0].dtype == wide
    delta = torch.tensor([-3.0, 0.1, 7.0], dtype=dtype)
    narrow = log_choice_prob(strength, delta)
    assert narrow.dtype == strength.posterior_mean(delta).dtype == wide
    assert torch.equal(narrow, log_choice_prob(strength, delta.to(wide)))
    assert strength.mean.dtype == strength.variance.dtype == strength.cv.dtype
    assert strength.mean.dtype == torch.promote_types(f32, parameter_dtype)


def test_log_probs_are_widened_before_they_are_subtracted():
    logps = [torch.tensor([x], dtype=torch.bfloat16) for x in (-256.0, -2.0, -1.5, -2.0)]
    chosen = dpo_loss(*logps, beta=0.5)[1]
    assert chosen.item() == -127.25  # of -254.5, which bfloat16 would round to -254


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_come_in_the_widest_dtype_too(family):
    assert mixdpo_loss(*rows(f32), FAMILIES[family](dtype=f64))[1].dtype == f64


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape(family, shape):
    strength = FAMILIES[family](dtype=f64)
    delta = torch.linspace(-5, 9, math.prod(shape), dtype=f64).view(shape)
    got = log_choice_prob(strength, delta)
    one_by_one = [log_choice_prob(strength, d).item() for d in delta.flatten()]
    assert got.shape == strength.posterior_mean(delta).shape == shape
    torch.testing.assert_close(got.flatten(), torch.tensor(one_by_one, dtype=f64), rtol=1e-14, atol=0)
    for results in (mixdpo_loss(*[delta] * 4, strength), dpo_loss(*[delta] * 4)):
        assert [r.shape for r in results] == [shape] * 3


# --- transformations --------------------------------------------------------------------------------------------------


class Curve(nn.Module):
    """What functional_call and compile are given: the strength as a submodule of a user's module."""

    def __init__(self, strength: nn.Module) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, delta: Tensor) -> Tensor:
        return log_choice_prob(self.strength, delta)


DELTAS = (-40.0, -1.0, -0.0, 0.0, 1e-3, 2.0, 55.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_func_grad_vmap_and_jacrev_agree_with_autograd(family):
    curve = Curve(FAMILIES[family](dtype=f64))
    delta = torch.tensor(DELTAS, dtype=f64, requires_grad=True)
    value = curve(delta)
    (by_delta,) = torch.autograd.grad(value.sum(), delta)
    each = delta.detach()
    torch.testing.assert_close(torch.func.vmap(curve)(each), value.detach())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(curve))(each), by_delta)
    torch.testing.assert_close(torch.func.jacrev(curve)(each), torch.diag(by_delta))


@pytest.mark.parametrize("family", MIXTURES)
def test_functional_call_differentiates_the_parameters(family):
    curve = Curve(FAMILIES[family](dtype=f64))
    delta = torch.tensor(DELTAS, dtype=f64)
    parameters = {name: p.detach() for name, p in curve.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(curve, p, (delta,)))(parameters)
    curve(delta).sum().backward()
    for name, parameter in curve.named_parameters():
        torch.testing.assert_close(jacobian[name].sum(0), parameter.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_and_second_derivatives_match_differences(family):
    curve = Curve(FAMILIES[family](dtype=f64))
    names = [name for name, _ in curve.named_parameters()]
    inputs = [torch.tensor(DELTAS, dtype=f64, requires_grad=True), *curve.parameters()]

    def log_e(delta: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(curve, dict(zip(names, parameters, strict=True)), (delta,))

    assert torch.autograd.gradcheck(log_e, inputs)
    assert torch.autograd.gradgradcheck(log_e, inputs)


def assert_compiles_to_the_same(curve: nn.Module, backend: str) -> None:
    """The same values and gradients, from one graph."""
    torch.compiler.reset()
    delta = torch.tensor(DELTAS, dtype=f64, requires_grad=True)
    inputs = [delta, *curve.parameters()]
    got, expected = torch.compile(curve, fullgraph=True, backend=backend)(delta), curve(delta)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), rtol=1e-11, atol=1e-15
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_compile_captures_one_graph(family):
    assert_compiles_to_the_same(Curve(FAMILIES[family](dtype=f64)), "aot_eager")


class AllCurves(nn.Module):
    """Every family in one graph, since a run of the C++ compiler takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.curves = nn.ModuleList(Curve(build(dtype=f64)) for build in FAMILIES.values())

    def forward(self, delta: Tensor) -> Tensor:
        return torch.stack([curve(delta) for curve in self.curves])


@pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="no g++ or no Python.h, which Inductor needs",
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_torch_compile_generates_the_same_numbers():
    assert_compiles_to_the_same(AllCurves(), "inductor")


# --- extreme input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(
    "build",
    [
        *FAMILIES.values(),
        # With beta above 1, beta * delta overflows.
        functools.partial(Gamma, 5.0, 0.2),
        functools.partial(LogNormal, 4.0, 1.0),
        functools.partial(LogNormal, 4.0, 1.0, "quadrature"),
    ],
    ids=[*FAMILIES, "strong_gamma", "strong_monte_carlo", "strong_quadrature"],
)
def test_every_input_but_nan_has_finite_gradients(build, dtype, device):
    strength = build(dtype=dtype, device=device)
    smallest, largest = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    magnitude = torch.tensor([0.0, smallest, 1e-30, 1e30, 3e38, largest, math.inf], dtype=dtype, device=device)
    delta = torch.cat([magnitude, -magnitude]).requires_grad_()
    value = log_choice_prob(strength, delta)
    assert (value <= 0).all()
    assert value[:-1].isfinite().all()
    assert value[6] == 0
    assert value[-1] == -math.inf
    for gradient in torch.autograd.grad(value.sum(), [delta, *strength.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("family", MIXTURES)
def test_gradient_at_infinity_is_zero(family):
    delta = torch.tensor([math.inf, -math.inf], requires_grad=True)
    log_choice_prob(FAMILIES[family](), delta).sum().backward()
    assert delta.grad.tolist() == [0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_stays_in_its_row(family):
    delta = torch.tensor([1.0, math.nan, -1.0], requires_grad=True)
    value = log_choice_prob(FAMILIES[family](), delta)
    assert value.isnan().tolist() == [False, True, False]
    value.nansum().backward()
    assert delta.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [f32, f64])
def test_parameters_driven_to_the_ends_keep_finite_values_and_gradients(dtype):
    delta = torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30], dtype=dtype, requires_grad=True)
    for raw in itertools.product([-1e4, 1e4], repeat=2):
        strength = Gamma(dtype=dtype)
        with torch.no_grad():
            strength.raw_concentration.fill_(raw[0])
            strength.raw_rate.fill_(raw[1])
        value = strength.log_choice_prob(delta)
        assert value.isfinite().all(), raw
        for gradient in torch.autograd.grad(value.sum(), [delta, *strength.parameters()]):
            assert gradient.isfinite().all(), raw


def test_quadrature_with_a_huge_loc_is_a_number_at_zero():
    assert LogNormal(100.0, 0.6, "quadrature").log_choice_prob(torch.zeros(1)).item() == pytest.approx(-math.log(2))


def test_quadrature_finds_the_mode_of_a_narrow_strength():
    strength = LogNormal(3.0, 0.001, "quadrature", dtype=f64)
    truth = oracle.lognormal(1e5, 3.0, strength.scale.item())[0].value
    got = strength.log_choice_prob(torch.tensor(-1e5, dtype=f64)).item()
    assert got == pytest.approx(float(truth), rel=1e-10)


@pytest.mark.parametrize("family", MIXTURES)
def test_posterior_mean_at_minus_infinity_is_zero(family):
    assert FAMILIES[family]().posterior_mean(torch.tensor(-math.inf)).item() == 0


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16])
def test_parameters_start_at_the_given_values_to_the_rounding_of_dtype(dtype):
    eps = torch.finfo(dtype).eps
    for value in (1e-6, 1e-3, 0.1, 0.6, 1.0, 2.0, 16.7, 19.9, 20.5, 25.0, 88.0, 1e3, 1e6):
        # A stored log(value) has |log value| eps / 2 of absolute rounding, which is relative in the value.
        bound = eps * (1 + max(0.0, -math.log(value)) / 2)
        strength = Gamma(value, 2 * value, dtype=dtype)
        assert strength.concentration.item() == pytest.approx(value, rel=bound, abs=0)
        assert strength.rate.item() == pytest.approx(2 * value, rel=bound, abs=0)
        assert LogNormal(scale=value, dtype=dtype).scale.item() == pytest.approx(value, rel=bound, abs=0)
        assert PointMass(value, dtype=dtype).mean.item() == torch.tensor(value, dtype=dtype).item()
        for loc in (value, -value, 0.0):
            assert LogNormal(loc, dtype=dtype).loc.item() == torch.tensor(loc, dtype=dtype).item()


@pytest.mark.parametrize("family", MIXTURES)
def test_raw_parameters_have_shape_1_and_the_given_dtype_and_device(family):
    for parameter in FAMILIES[family]().parameters():
        assert (parameter.shape, parameter.dtype, parameter.device.type) == ((1,), f32, "cpu")
    for parameter in FAMILIES[family](dtype=f64, device="meta").parameters():
        assert (parameter.shape, parameter.dtype, parameter.device.type) == ((1,), f64, "meta")


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_strength_has_buffers_alone(family):
    fixed = PointMass() if family == "point_mass" else FAMILIES[family](learnable=False)
    assert list(fixed.parameters()) == []
    assert all(b.shape == (1,) for b in fixed.buffers()) or family == "point_mass"
    delta = torch.tensor(DELTAS, requires_grad=True)
    learned = FAMILIES[family]()
    assert torch.equal(log_choice_prob(fixed, delta), log_choice_prob(learned, delta))
    assert fixed.state_dict().keys() == learned.state_dict().keys()


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (Gamma(0.3, 5.0), Gamma(learnable=False)),
        (LogNormal(-1.0, 0.2), LogNormal()),
        (LogNormal(-1.0, 0.2, "quadrature", learnable=False), LogNormal(estimator="quadrature")),
        (PointMass(0.7), PointMass()),
    ],
    ids=repr,
)
def test_state_dict_round_trip(saved, other, tmp_path):
    other = copy.deepcopy(other)
    torch.save(saved.state_dict(), tmp_path / "strength.pt")
    other.load_state_dict(torch.load(tmp_path / "strength.pt"))
    delta = torch.tensor(DELTAS)
    assert torch.equal(log_choice_prob(saved, delta), log_choice_prob(other, delta))
    assert saved.mean == other.mean


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_still_works_after_a_cast_to_bfloat16(family):
    strength = FAMILIES[family]()
    before = log_choice_prob(strength, torch.tensor(DELTAS))
    after = log_choice_prob(strength.to(torch.bfloat16), torch.tensor(DELTAS, dtype=torch.bfloat16))
    assert after.dtype == f32
    torch.testing.assert_close(after, before, rtol=0.03, atol=0)
    if family != "point_mass":
        after.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in strength.parameters())


def test_a_learned_strength_recovers_the_one_that_made_the_choices():
    # The expected loss over both labels at known probabilities, so the optimum is the truth itself.
    truth, strength = Gamma(2.0, 10.0, dtype=f64), Gamma(5.0, 40.0, dtype=f64)
    delta = torch.linspace(-60, 60, 121, dtype=f64)
    target = truth.log_choice_prob(delta).detach().exp()
    optimizer = torch.optim.LBFGS(strength.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_p, log_q = strength.log_choice_prob(delta), strength.log_choice_prob(-delta)
        loss = -(target * log_p + (1 - target) * log_q).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert strength.concentration.item() == pytest.approx(2.0, rel=1e-2)
    assert strength.rate.item() == pytest.approx(10.0, rel=1e-2)


def test_repr_shows_the_values():
    assert repr(Gamma(0.5, 3.0)) == "Gamma(concentration=0.5, rate=3)"
    assert repr(PointMass(0.2)) == "PointMass(beta=0.2)"
    assert "loc=-1" in repr(LogNormal(-1.0, 0.5))


# --- bad input --------------------------------------------------------------------------------------------------------

NOT_POSITIVE = [0.0, -1.5, math.nan, math.inf, -math.inf]
THREE, FOUR = torch.zeros(3), torch.zeros(4)


@pytest.mark.parametrize("bad", NOT_POSITIVE)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("beta", lambda x: PointMass(x)),
        ("beta", lambda x: dpo_loss(THREE, THREE, THREE, THREE, beta=x)),
        ("scale", lambda x: LogNormal(scale=x)),
        ("concentration", lambda x: Gamma(concentration=x)),
        ("rate", lambda x: Gamma(rate=x)),
    ],
)
def test_values_that_must_be_positive(name, call, bad):
    with pytest.raises(ValueError, match=rf"^{name} must be finite and > 0, got {bad}$"):
        call(bad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LogNormal(loc=math.nan), ["loc", "nan"]),
        (lambda: LogNormal(loc=-math.inf), ["loc", "-inf"]),
        (lambda: LogNormal(estimator="gauss"), ["estimator", "'gauss'", "monte_carlo", "quadrature"]),
        (lambda: LogNormal(samples=0), ["samples", "0", ">= 1"]),
        (lambda: LogNormal(nodes=1), ["nodes", "1", ">= 2"]),
        (lambda: dpo_loss(THREE, THREE, THREE, THREE, label_smoothing=0.5), ["label_smoothing", "0.5", "[0, 0.5)"]),
        (lambda: dpo_loss(THREE, THREE, THREE, THREE, label_smoothing=-0.1), ["label_smoothing", "-0.1"]),
        (lambda: dpo_loss(THREE, THREE, THREE, THREE, label_smoothing=math.nan), ["label_smoothing", "nan"]),
        (lambda: dpo_loss(THREE, FOUR, THREE, THREE), ["policy_rejected_logps (4,)", "policy_chosen_logps (3,)"]),
        (lambda: dpo_loss(THREE, THREE, THREE, torch.zeros(1)), ["reference_rejected_logps (1,)"]),
        (lambda: mixdpo_loss(THREE, THREE, FOUR, THREE, Gamma()), ["reference_chosen_logps (4,)"]),
        (lambda: dpo_loss(THREE.long(), THREE, THREE, THREE), ["policy_chosen_logps", "torch.int64"]),
        (lambda: dpo_loss(THREE, THREE, THREE, [0.0] * 3), ["reference_rejected_logps", "list"]),
        (lambda: mixdpo_loss(THREE, THREE, THREE.bool(), THREE, Gamma()), ["reference_chosen_logps", "torch.bool"]),
        (lambda: Gamma().log_choice_prob(THREE.int()), ["delta_r", "torch.int32"]),
        (lambda: Gamma().posterior_mean(1.0), ["delta_r", "float"]),
        (lambda: LogNormal().log_choice_prob(None), ["delta_r", "NoneType"]),
        (lambda: PointMass().log_choice_prob(THREE.long()), ["delta_r", "torch.int64"]),
        (lambda: mixdpo_loss(THREE, THREE, THREE, THREE, Gamma(), noise=THREE), ["noise", "Gamma"]),
        (lambda: mixdpo_loss(THREE, THREE, THREE, THREE, PointMass(), noise=THREE), ["noise", "PointMass"]),
        (
            lambda: LogNormal(estimator="quadrature").log_choice_prob(THREE, noise=torch.zeros(3, 16)),
            ["noise", "'monte_carlo'", "'quadrature'"],
        ),
        (lambda: LogNormal().log_choice_prob(THREE, noise=torch.zeros(3, 15)), ["noise", "(3, 16)", "(3, 15)"]),
        (lambda: LogNormal(samples=4).log_choice_prob(THREE, noise=torch.zeros(4)), ["noise", "(3, 4)", "(4,)"]),
    ],
)
def test_bad_input_is_named_with_its_value(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every word of the message is checked below
        call()
    assert [word for word in words if word not in str(error.value)] == []


# --- the file on its own ----------------------------------------------------------------------------------------------

TEN_LINES = """
import torch
from mixdpo import Gamma, LogNormal, dpo_loss, mixdpo_loss
logps = [torch.randn(8, requires_grad=True) for _ in range(4)]
for strength in (Gamma(), LogNormal()):
    optimizer = torch.optim.RMSprop(strength.parameters(), lr=1e-2)
    before = strength.mean.item()
    mixdpo_loss(*logps, strength)[0].mean().backward()
    optimizer.step()
    assert strength.mean.item() != before
print(dpo_loss(*logps)[0].shape)
"""


def test_the_file_works_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(mixdpo.__file__, tmp_path)
    # -I leaves out the working directory and PYTHONPATH, so that nothing but the copy can be found.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TEN_LINES}\nimport mixdpo; print(mixdpo.__file__)"
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["torch.Size([8])", str(tmp_path / "mixdpo.py")]


def test_the_file_imports_torch_and_the_standard_library_alone():
    modules = set()
    for node in ast.walk(ast.parse(Path(mixdpo.__file__).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert "torch" in modules
    assert modules - {"torch"} <= sys.stdlib_module_names
