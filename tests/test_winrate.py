"""Statistics of win rates against scipy, direct optimisation, enumeration and hand-computed rows."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from evaluate import holm, length_controlled_win_rate, paired_bootstrap, sign_flip_test, win_rate


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Preferences of two policies, which grow with their length, and three lengths."""
    rng = np.random.default_rng(seed)
    a, b, base = rng.integers(50, 900, (3, n)).astype(float)
    chance = scipy.special.expit(0.3 - 1.5 * np.tanh((base - a) / (base - a).std(ddof=1)))
    return 1 + rng.beta(2 * chance, 2 - 2 * chance), 1 + rng.beta(0.8, 0.9, n), a, b, base


def direct_lc(preferences: np.ndarray, policy: np.ndarray, baseline: np.ndarray) -> float:
    """The same maximum by a general optimiser, of a likelihood written another way."""
    y, d = preferences - 1, baseline - policy
    sd = math.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1))
    x = np.tanh(d / sd) if sd else np.zeros(len(d))

    def loss(w: np.ndarray) -> float:
        logit = w[0] * x + w[1]
        return -(scipy.special.xlogy(y, 1) + y * logit - np.logaddexp(0, logit)).sum() + 0.5e-4 * (w @ w)

    found = scipy.optimize.minimize(loss, [0.0, 0.0], jac="3-point", method="BFGS", options={"gtol": 1e-8})
    return 100 * scipy.special.expit(found.x[1])


def test_win_rate_by_hand():
    got = win_rate([2.0, 1.5, 1.0, 1.8, np.nan, 1.2])
    assert got.win_rate == pytest.approx(50)
    assert got.standard_error == pytest.approx(100 * scipy.stats.sem([1, 0.5, 0, 0.8, 0.2]))
    assert got.discrete_win_rate == pytest.approx(50)
    assert (got.wins, got.losses, got.draws, got.n_valid, got.n) == (2, 2, 1, 5, 6)


@pytest.mark.parametrize(("value", "rate"), [(2.0, 100.0), (1.0, 0.0), (1.5, 50.0)])
def test_all_alike(value, rate):
    every = np.full(40, value)
    lengths = np.random.default_rng(1).integers(50, 900, (2, 40))
    assert (win_rate(every).win_rate, win_rate(every).standard_error) == (rate, 0)
    got = length_controlled_win_rate(every, *lengths, resamples=200)
    assert got.lc_win_rate == pytest.approx(rate, abs=0.01)
    assert got.low == pytest.approx(rate, abs=0.01)
    assert got.high == pytest.approx(rate, abs=0.01)
    assert got.lc_win_rate == pytest.approx(direct_lc(every, *lengths), abs=1e-4)
    test = sign_flip_test(every, every, lengths=(lengths[0], *lengths), flips=50)
    assert (test.difference, test.p_value) == (0, 1)


def test_empty_missing_and_few():
    assert win_rate([np.nan, np.nan]).win_rate is None
    assert (win_rate([1.3, np.nan]).standard_error, win_rate([1.3]).n_valid) == (None, 1)
    few = length_controlled_win_rate([1.5] * 9 + [np.nan] * 9, [1] * 18, [2] * 18)
    assert (few.lc_win_rate, few.low, few.n_valid, few.n) == (None, None, 9, 18)
    assert few.reason == "9 valid judgements, fewer than 10"
    assert paired_bootstrap([1.2, np.nan], [np.nan, 1.2]).reason == "0 prompts valid in both, fewer than 1"
    assert sign_flip_test([1.2, np.nan], [np.nan, 1.2]).p_value is None


@pytest.mark.parametrize("n", [12, 60, 425])
def test_lc_equals_a_direct_optimiser(n):
    a, _, length, _, base = sample(n)
    got = length_controlled_win_rate(a, length, base, resamples=10)
    assert got.lc_win_rate == pytest.approx(direct_lc(a, length, base), abs=1e-5)
    assert got.phi < -0.5  # the longer answer wins more often
    missing = length_controlled_win_rate([*a, np.nan, 1.5], [*length, 3, np.nan], [*base, 4, 5], resamples=10)
    assert (missing.lc_win_rate, missing.n_valid, missing.n) == (got.lc_win_rate, n, n + 2)


def test_lc_of_one_sided_lengths_and_of_separated_data():
    a, _, _, _, base = sample(100)
    length = base - np.arange(1, 101) / 4
    shorter = length_controlled_win_rate(a, length, base, resamples=100)
    assert shorter.lc_win_rate == pytest.approx(direct_lc(a, length, base), abs=1e-4)
    assert "shorter on 100 % of prompts" in shorter.warnings[0]
    # The longer answer always wins: without the ridge phi would be infinite.
    length = np.where(np.arange(100) < 70, base + 50, base - 50)
    won = np.where(length > base, 2.0, 1.0)
    separated = length_controlled_win_rate(won, length, base, resamples=100)
    assert separated.lc_win_rate == pytest.approx(direct_lc(won, length, base), abs=1e-3)
    assert any("LC differs from WR by " in w for w in separated.warnings)


def test_lc_of_equal_lengths_is_the_win_rate():
    a, *_ = sample(50)
    got = length_controlled_win_rate(a, [80] * 50, [80] * 50)
    assert got.lc_win_rate == win_rate(a).win_rate
    theirs = scipy.stats.bootstrap((a - 1,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    assert got.low == pytest.approx(100 * theirs.confidence_interval.low, abs=0.6)
    assert got.high == pytest.approx(100 * theirs.confidence_interval.high, abs=0.6)
    constant = length_controlled_win_rate(a, [80] * 50, [83] * 50)
    assert (constant.lc_win_rate, constant.reason) == (
        None,
        "every length difference is 3: length cannot be told from quality",
    )


def test_lc_bootstrap_refits_every_resample():
    """Each resampled fit equals the fit of the rows it repeats; the interval is their percentiles."""
    a, _, length, _, base = sample(30)
    weights = np.concatenate(list(evaluate.resamples_of(np.arange(30), 40, 0)))
    assert (weights.sum(1) == 30).all()
    fits = evaluate.fit_length_control(a[None] - 1, (base - length)[None], weights, (3.0, -2.0))[0]
    for weight, fit in zip(weights.astype(int), fits, strict=True):
        again = (np.repeat(v, weight) for v in (a, length, base))
        assert fit == pytest.approx(direct_lc(*again), abs=1e-4)
    got = length_controlled_win_rate(a, length, base, resamples=40)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(fits, [0.025, 0.975])), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0]), st.integers(-3, 3)), min_size=10, max_size=40))
def test_lc_is_the_maximum_for_any_labels(rows):
    a, d = np.array(rows).T
    if d[0] and (d == d[0]).all():
        return
    got = length_controlled_win_rate(a, np.zeros(len(d)), d - d.min(), resamples=1)  # lengths are never negative
    if not (d == d[0]).all():
        rate, phi, theta = evaluate.fit_length_control(a[None] - 1, d[None], np.ones((1, len(d))))
        x = np.tanh(d / d.std(ddof=1))
        residual = a - 1 - scipy.special.expit(phi * x + theta)
        assert abs(residual.sum() - 1e-4 * theta[0]) < 1e-6
        assert abs(residual @ x - 1e-4 * phi[0]) < 1e-6
        assert 0 <= rate[0] <= 100
    else:
        assert got.lc_win_rate == win_rate(a).win_rate


def test_paired_bootstrap_equals_scipy_and_uses_one_index_set():
    a, b, *_ = sample(200)
    got = paired_bootstrap([*a, np.nan], [*b, 1.0])
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert got.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert (got.low, got.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=0.4)
    assert (got.n_valid, got.n) == (200, 201)
    same = paired_bootstrap(a, a - 0.0)
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_paired_bootstrap_of_lc():
    a, b, la, lb, base = sample(60)
    got = paired_bootstrap(a, b, lengths=(la, lb, base), resamples=50, seed=3)
    assert got.difference == pytest.approx(direct_lc(a, la, base) - direct_lc(b, lb, base), abs=1e-4)
    drawn = []
    for weight in np.concatenate(list(evaluate.resamples_of(np.arange(60), 50, 3))).astype(int):
        aa, bb, laa, lbb, bbase = (np.repeat(v, weight) for v in (a, b, la, lb, base))
        drawn.append(direct_lc(aa, laa, bbase) - direct_lc(bb, lbb, bbase))
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-3)


def test_clusters_are_resampled_and_flipped_whole():
    """Twenty annotators who each repeat one prompt ten times know as much as twenty prompts."""
    a, b, la, lb, base = sample(20)
    names = [f"annotator{i:02}" for i in range(20)]
    many = [np.repeat(v, 10) for v in (a, b, la, lb, base)]
    clusters = np.repeat(names, 10).tolist()
    few, all_rows = (paired_bootstrap(*p, clusters=c) for p, c in (((a, b), names), (many[:2], clusters)))
    assert (few.low, few.high) == pytest.approx((all_rows.low, all_rows.high))
    alone = sign_flip_test(a, b, clusters=names, flips=999)
    assert sign_flip_test(*many[:2], clusters=clusters, flips=999).p_value == alone.p_value
    one, ten = length_controlled_win_rate(a, la, base), length_controlled_win_rate(many[0], many[2], many[4], clusters)
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high), abs=1.5)  # sd has ddof 1: nearly, not exactly
    loose = length_controlled_win_rate(many[0], many[2], many[4])
    assert loose.high - loose.low < 0.5 * (ten.high - ten.low)


def test_sign_flip_equals_scipy():
    a, b, *_ = sample(60)
    got = sign_flip_test(a, b)
    theirs = scipy.stats.permutation_test(
        (a - b,),
        lambda x, axis: np.abs(x.mean(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=99_999,
        rng=1,
    )
    assert got.p_value == pytest.approx(theirs.pvalue, abs=0.006)
    assert (got.exact, got.flips) == (False, 99_999)
    assert got.p_value == sign_flip_test(a, b).p_value
    assert got.p_value == sign_flip_test(b, a).p_value
    # No swap of 60 but none and all reaches the difference of one that always wins: the observed one counts itself.
    assert sign_flip_test(np.full(60, 2.0), np.full(60, 1.0), flips=999).p_value == 1 / 1000


@pytest.mark.parametrize("n", [1, 5, 16])
def test_sign_flip_is_exact_for_few_prompts(n):
    rng = np.random.default_rng(n)
    a, b = rng.choice([1.0, 1.25, 1.5, 2.0], (2, n))  # ties between swaps are the rule
    d = a - b
    every = np.array(list(itertools.product([1, -1], repeat=n))) @ d
    got = sign_flip_test(a, b)
    assert got.exact
    assert got.flips == 2**n
    assert got.p_value == (np.abs(every) >= abs(d.sum()) - 1e-12).mean()


def test_sign_flip_of_lc_swaps_preference_and_length_and_refits():
    a, b, la, lb, base = sample(10, seed=3)
    statistic = []
    for flip in itertools.product([False, True], repeat=10):
        (aa, bb), (laa, lbb) = ((np.where(flip, y, x), np.where(flip, x, y)) for x, y in ((a, b), (la, lb)))
        statistic.append(abs(direct_lc(aa, laa, base) - direct_lc(bb, lbb, base)))
    got = sign_flip_test(a, b, lengths=(la, lb, base))
    assert got.p_value == (np.array(statistic) >= statistic[0] - 1e-3).mean()
    assert abs(got.difference) == pytest.approx(statistic[0], abs=1e-4)
    drawn = sign_flip_test(np.tile(a, 2), np.tile(b, 2), lengths=tuple(np.tile((la, lb, base), 2)), flips=500)
    assert not drawn.exact
    assert 0 < drawn.p_value <= 1


def test_holm_by_hand():
    # Holm (1979): 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, which may not fall below what came before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([1.0, 2.1]), r"preferences must be in \[1, 2\] \(NaN: missing\), got 2.1"),
        (lambda: win_rate([[1.0]]), r"preferences must be one-dimensional, got shape \(1, 1\)"),
        (lambda: length_controlled_win_rate([1.0] * 3, [1] * 2, [1] * 3), "policy_lengths .* 3 values, got"),
        (lambda: length_controlled_win_rate([1.0], [-1], [1]), "policy_lengths must be in .*got -1"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "b must be one-dimensional with 1 values"),
        (lambda: sign_flip_test([0.5], [1.0]), r"a must be in \[1, 2\]"),
        (lambda: sign_flip_test([1.5], [1.0], clusters=["x", "y"]), "clusters must have 1 values, got 2"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
