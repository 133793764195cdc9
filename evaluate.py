"""Preference margins of trained policies on held-out pairs.

    python evaluate.py margins --policy runs/gamma/policy runs/dpo/policy --baseline runs/gamma/sft
    torchrun --nproc_per_node 8 evaluate.py margins --policy runs/gamma/policy      # splits the pairs over the ranks

The preference margin of a pair is log pi(y_w|x) - log pi(y_l|x) under the policy alone (Sec. 4.4 of the paper), summed
over response tokens, and also per token (each response's sum divided by its number of tokens). Pairs come from the test
split of the data that the first policy was trained on, which is read from the config.json beside its directory.

Writes margins.json (every number), and a figure of the margins and of the strength over training as PNG and SVG.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from train import (
    Config,
    Pairs,
    Parser,
    UserError,
    World,
    load_preferences,
    load_tokenizer,
    model_config,
    quiet_libraries,
    read_json,
    score_all,
    start_processes,
    tokenize,
    write_json,
)

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by their lightness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# --- inputs ----------------------------------------------------------------------------------------------------------


def run_config(policy: Path) -> Config:
    """The configuration of the run that a policy directory (its policy/ or sft/) belongs to."""
    if not (policy / "config.json").is_file():
        raise UserError(f"--policy {policy} is not a model directory (no config.json): pass the policy/ of a run")
    path = policy.parent / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: pass a policy/ directory inside the output directory of a run")
    values = read_json(path)
    known = {f.name for f in dataclasses.fields(Config)}
    if set(values) != known:
        raise UserError(f"{path} is not the config.json of a run (differs in {', '.join(sorted(known ^ set(values)))})")
    return Config(**values)


def held_out_pairs(config: Config, policy: Path, count: int, seed: int) -> tuple[Pairs, list[str]]:
    """`count` pairs of the test split, seeded, cut as in the run, and whom each is by: annotator or conversation."""
    rows = load_preferences(
        config.dataset, "test", config.data_dir, seed=config.seed, heterogeneity=config.demo_heterogeneity
    )
    pairs, _ = tokenize(rows, load_tokenizer(str(policy)), config.max_length, config.max_prompt_length)
    if len(pairs) < count:
        raise UserError(
            f"--pairs {count}: the test split of {config.dataset} has only {len(pairs)}; pass that or fewer"
        )
    pairs = pairs.select(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:count]).tolist())
    some = rows.select(pairs.rows)
    names = zip(some["annotator"], some["conversation"], map(str, pairs.rows), strict=True)
    return pairs, [annotator or conversation or row for annotator, conversation, row in names]


def load_policy(path: Path, world: World) -> nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} cannot be loaded ({str(e).splitlines()[0]})") from e
    return model.eval().to(world.device)


# --- margins ---------------------------------------------------------------------------------------------------------


def margins(logps: np.ndarray, pairs: Pairs) -> dict[str, np.ndarray]:
    """Per pair, in nats: the margin of the sums, and that of the means per response token. logps: (n, 2)."""
    lengths = np.array([[len(c), len(r)] for c, r in zip(pairs.chosen, pairs.rejected, strict=True)])
    return {"sum": logps[:, 0] - logps[:, 1], "per_token": logps[:, 0] / lengths[:, 0] - logps[:, 1] / lengths[:, 1]}


def mean_interval(values: np.ndarray, clusters: Sequence[str], resamples: int = 10_000) -> dict[str, float]:
    """Mean over rows and its 95 % percentile bootstrap interval; clusters (annotators) are resampled whole."""
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    weights = np.random.default_rng(0).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)
    low, high = np.quantile(weights @ sums / (weights @ sizes), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def summarise(by_name: dict[str, dict[str, np.ndarray]], clusters: Sequence[str]) -> dict[str, Any]:
    """Per policy: mean margin and accuracy with intervals, and the paired gain over the baseline if there is one."""
    result: dict[str, Any] = {}
    for name, kinds in by_name.items():
        entry: dict[str, Any] = {}
        for kind, values in kinds.items():
            right = (values > 0) + 0.5 * (values == 0)
            entry[kind] = {"margin": mean_interval(values, clusters), "accuracy": mean_interval(right, clusters)}
            if "baseline" in by_name and name != "baseline":
                entry[kind]["gain"] = mean_interval(values - by_name["baseline"][kind], clusters)
        result[name] = entry
    return result


def table(summary: dict[str, Any]) -> str:
    def cell(entry: dict[str, float] | None, digits: int) -> str:
        return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]" if entry else ""

    rows = [("policy", "", "margin (nats)", "accuracy", "gain over baseline")]
    for name, kinds in summary.items():
        for kind, e in kinds.items():
            label = kind.replace("_", " ")
            rows.append((name, label, cell(e["margin"], 3), cell(e["accuracy"], 3), cell(e.get("gain"), 3)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# --- figures ---------------------------------------------------------------------------------------------------------


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("figures need matplotlib: pip install 'mixdpo[plots]', or pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.fonttype": "none"}
    plt.rcParams |= {"axes.prop_cycle": plt.cycler(color=COLORS), "savefig.bbox": "tight", "savefig.dpi": 150}
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """PNG and SVG, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        aside = path.with_name(f"{path.name}.tmp.{suffix}")
        figure.savefig(aside)
        os.replace(aside, path.with_name(f"{path.name}.{suffix}"))


def beta_history(run: Path) -> dict[str, list[float]]:
    """examples, mean, variance and cv of the strength over training, from metrics.jsonl; empty if there is none."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    names = {"examples": "examples"} | {name: f"beta/{name}" for name in ("mean", "variance", "cv")}
    return {name: [line[key] for line in lines] for name, key in names.items()} if lines else {}


def draw_margins(result: dict[str, Any], path: Path) -> None:
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), width_ratios=[2, 1, 1, 1], layout="constrained")
    every = np.concatenate([entry["sum"] for entry in result["values"].values()])
    low, high = np.quantile(every, [0.005, 0.995])
    bins = np.linspace(low, high, 41)
    for i, (name, values) in enumerate(result["values"].items()):
        color = "0.4" if name == "baseline" else COLORS[i % len(COLORS)]
        axes[0].hist(np.clip(values["sum"], bins[0], bins[-1]), bins, histtype="step", color=color, label=name)
        axes[0].axvline(np.mean(values["sum"]), color=color, linestyle="--", linewidth=1)
        for axis, part in zip(axes[1:], ("mean", "variance", "cv"), strict=True):
            history = result["strength"].get(name)
            if history:
                axis.plot(history["examples"], history[part], color=color)
    axes[0].set(xlabel="preference margin (nats, dashed: mean)", ylabel=f"pairs (n = {result['n']})")
    axes[0].legend(frameon=False, fontsize=7)
    for axis, part in zip(axes[1:], ("mean", "variance", "cv"), strict=True):
        axis.set(xlabel="training examples", title=f"{part} of beta")
        axis.ticklabel_format(axis="y", useOffset=False)
    save_figure(figure, path)
    plt.close(figure)


# --- win rates -------------------------------------------------------------------------------------------------------

RIDGE = 1e-4  # on both coefficients of the length control: keeps the fit finite when every judgement agrees
LEAST_LENGTHS = 10  # valid judgements below which two coefficients are not fitted
MOST_MISSING = 0.02  # share of judgements above which no rate is printed
NOT_COVERED = (
    "The p-values cover the choice of prompts alone: not the judge's own bias or noise, the seed of training or of "
    "sampling, nor a choice among runs made after seeing these rates."
)


@dataclass(frozen=True)
class WinRate:
    """Per cent. With no valid preference the rates are None, with one the standard error."""

    win_rate: float | None  # 100 mean(preference - 1)
    standard_error: float | None  # of win_rate, ddof 1
    discrete_win_rate: float | None  # wins + draws / 2, of the valid
    wins: int  # preferences above 1.5
    losses: int
    draws: int  # exactly 1.5
    n_valid: int
    n: int


@dataclass(frozen=True)
class LengthControlledWinRate:
    """lc_win_rate and its 95 % interval in per cent, or None with the reason; phi and theta of the regression."""

    lc_win_rate: float | None
    low: float | None
    high: float | None
    phi: float | None
    theta: float | None
    n_valid: int
    n: int
    reason: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairedDifference:
    """Rate of a minus rate of b in percentage points with its 95 % interval, or None with the reason."""

    difference: float | None
    low: float | None
    high: float | None
    n_valid: int  # prompts on which both are valid
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class SignFlipTest:
    """p_value of the two-sided test that a and b are exchangeable within prompts; difference in percentage points."""

    difference: float | None
    p_value: float | None
    flips: int  # drawn, or all of them if exact
    exact: bool
    n_valid: int
    n: int
    reason: str | None = None


def checked(name: str, values: Any, n: int | None = None, low: float = 0.0, high: float = math.inf) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or (n is not None and len(array) != n):
        raise ValueError(f"{name} must be one-dimensional{f' with {n} values' if n else ''}, got shape {array.shape}")
    bad = array[(array < low) | (array > high)]
    if len(bad):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}] (NaN: missing), got {bad[0]:g}")
    return array


def win_rate(preferences: Any) -> WinRate:
    """AlpacaEval's win rate. preferences: (n,), in [1, 2]: 1 baseline, 2 policy, 1.5 a draw, NaN missing.

    Raises ValueError for a preference outside [1, 2].
    """
    every = checked("preferences", preferences, low=1, high=2)
    p = every[~np.isnan(every)]
    wins, losses = int((p > 1.5).sum()), int((p < 1.5).sum())
    draws, n = len(p) - wins - losses, len(p)
    rate = float(100 * (p - 1).mean()) if n else None
    error = float(100 * p.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return WinRate(rate, error, 100 * (wins + draws / 2) / n if n else None, wins, losses, draws, n, len(every))


def fit_length_control(
    y: np.ndarray, differences: np.ndarray, weights: np.ndarray, start: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(LC win rate in per cent, phi, theta), each (rows,): one regression a row, all at once.

    Maximises sum_i w_i [y_i log P_i + (1 - y_i) log(1 - P_i)] - RIDGE / 2 (phi^2 + theta^2), where
    logit P_i = phi tanh(d_i / sd) + theta (Dubois et al., 2024, without their term of instruction difficulty) and sd is
    the row's own weighted standard deviation of d, ddof 1, not centred. y in [0, 1], differences baseline - policy in
    characters, weights counts: each (rows, n) or (1, n).
    """
    total = weights.sum(-1, keepdims=True)
    mean = (weights * differences).sum(-1, keepdims=True) / total
    sd = np.sqrt((weights * (differences - mean) ** 2).sum(-1, keepdims=True) / np.maximum(total - 1, 1))
    # Where all differences are equal sd is 0, and the limit of d / sd is taken: infinite, or 0 for d = 0.
    scaled = np.divide(differences, sd, out=np.copysign(np.inf, differences) + 0 * sd, where=sd > 0)
    x = np.tanh(np.where(differences == 0, 0.0, scaled))
    phi, theta = (np.full(max(len(x), len(y), len(weights)), value) for value in start)
    for _ in range(200):
        p = 0.5 + 0.5 * np.tanh(0.5 * (phi[:, None] * x + theta[:, None]))
        residual, curvature = weights * (p - y), weights * p * (1 - p)
        g_phi, g_theta = np.vecdot(residual, x) + RIDGE * phi, residual.sum(-1) + RIDGE * theta
        h_phi, h_theta = np.vecdot(curvature, x * x) + RIDGE, curvature.sum(-1) + RIDGE
        h_both = np.vecdot(curvature, x)
        determinant = h_phi * h_theta - h_both**2
        step_phi = (h_theta * g_phi - h_both * g_theta) / determinant
        step_theta = (h_phi * g_theta - h_both * g_phi) / determinant
        size = np.abs(step_phi) + np.abs(step_theta)
        # |x| <= 1, so no logit moves by more than `size`; shortened to log(1 + size) the step always descends (Sun and
        # Tran-Dinh, Mathematical Programming 178, 2019), and near the optimum it is Newton's.
        shorter = np.divide(np.log1p(size), size, out=np.ones_like(size), where=size > 0)
        phi, theta = phi - shorter * step_phi, theta - shorter * step_theta
        if size.max() < 1e-8:
            break
    rate = 50 + 50 * np.tanh(theta / 2)
    flat = ~((differences != 0) & (weights > 0)).any(-1)  # no length differs: nothing to control for
    return np.where(flat, 100 * ((weights * y).sum(-1) / total[:, 0]), rate), phi, theta


def chunks(total: int, width: int) -> Iterator[int]:
    """Sizes that sum to `total`, of rows that together stay within a processor's cache."""
    size = max(1, 100_000 // max(width, 1))
    yield from (min(size, total - start) for start in range(0, total, size))


def units(clusters: Sequence[str] | None, valid: np.ndarray) -> np.ndarray:
    """Per valid row the number of its cluster; every row is its own where there are none."""
    if clusters is None:
        return np.arange(valid.sum())
    if len(clusters) != len(valid):
        raise ValueError(f"clusters must have {len(valid)} values, got {len(clusters)}")
    return np.unique(np.asarray(clusters)[valid], return_inverse=True)[1]


def resamples_of(member: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap counts (chunk, n), clusters resampled whole."""
    rng, count = np.random.default_rng([seed, 1]), int(member.max()) + 1
    for size in chunks(resamples, len(member)):
        yield rng.multinomial(count, np.full(count, 1 / count), size)[:, member].astype(float)


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def length_controlled_win_rate(
    preferences: Any,
    policy_lengths: Any,
    baseline_lengths: Any,
    clusters: Sequence[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> LengthControlledWinRate:
    """The win rate at equal lengths, 100 sigmoid(theta) of `fit_length_control`, in per cent.

    preferences: (n,) in [1, 2], NaN missing; lengths: (n,) in characters; clusters: n names (annotators), resampled
    whole. The interval is a percentile bootstrap that refits, and rescales, every resample. Equal lengths everywhere
    give the win rate itself; fewer than 10 valid rows, or one and the same difference everywhere, give None and the
    reason. Raises ValueError for values out of range or shapes that differ.
    """
    every = checked("preferences", preferences, low=1, high=2)
    lengths = [checked("policy_lengths", policy_lengths, len(every))]
    lengths.append(checked("baseline_lengths", baseline_lengths, len(every)))
    valid = ~np.isnan([every, *lengths]).any(0)
    n = int(valid.sum())
    nothing = LengthControlledWinRate(None, None, None, None, None, n, len(every))
    if n < LEAST_LENGTHS:
        return replace(nothing, reason=f"{n} valid judgements, fewer than {LEAST_LENGTHS}")
    y, d = every[valid] - 1, (lengths[1] - lengths[0])[valid]
    if d[0] and (d == d[0]).all():
        return replace(nothing, reason=f"every length difference is {d[0]:g}: length cannot be told from quality")
    rate, phi, theta = (float(v[0]) for v in fit_length_control(y[None], d[None], np.ones((1, n))))
    refits = [
        fit_length_control(y[None], d[None], weights, (phi, theta))[0]
        for weights in resamples_of(units(clusters, valid), resamples, seed)
    ]
    share = max((d > 0).mean(), (d < 0).mean())
    warnings = []
    if share > 0.9:
        longer = "shorter" if (d > 0).mean() > 0.5 else "longer"
        warnings.append(f"the policy is {longer} on {100 * share:.0f} % of prompts: LC is an extrapolation")
    if abs(rate - 100 * y.mean()) > 10:
        warnings.append(f"LC differs from WR by {rate - 100 * y.mean():+.1f} points: lengths matter much")
    return LengthControlledWinRate(
        rate, *interval(np.concatenate(refits)), phi, theta, n, len(every), warnings=tuple(warnings)
    )


Lengths = tuple[Any, Any, Any]  # of a, of b, of the baseline, (n,) each


def paired(a: Any, b: Any, lengths: Lengths | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, str | None]:
    """(valid (n,), y (2, n_valid), baseline - policy lengths (2, n_valid) or None, why there is no result or None)."""
    first = checked("a", a, low=1, high=2)
    y = np.stack([first, checked("b", b, len(first), 1, 2)]) - 1
    valid = ~np.isnan(y).any(0)
    d = None
    if lengths is not None:
        of_a, of_b, base = (checked("lengths", v, len(first)) for v in lengths)
        d = base - np.stack([of_a, of_b])
        valid &= ~np.isnan(d).any(0)
        d = d[:, valid]
    n, least = int(valid.sum()), 1 if lengths is None else LEAST_LENGTHS
    return valid, y[:, valid], d, None if n >= least else f"{n} prompts valid in both, fewer than {least}"


def rate_difference(
    y: np.ndarray, d: np.ndarray | None, weights: np.ndarray, start: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """(rows,) rate of a minus rate of b in points; y, d: (2, rows or 1, n); weights: (rows or 1, n)."""
    if d is None:
        return 100 * np.vecdot(y[0] - y[1], weights) / weights.sum(-1)
    return fit_length_control(y[0], d[0], weights, start)[0] - fit_length_control(y[1], d[1], weights, start)[0]


def pooled_fit(y: np.ndarray, d: np.ndarray | None) -> tuple[float, float]:
    """(phi, theta) of both policies together: near every resample's, which saves iterations."""
    if d is None:
        return 0.0, 0.0
    _, phi, theta = fit_length_control(y.reshape(1, -1), d.reshape(1, -1), np.ones((1, y.size)))
    return float(phi[0]), float(theta[0])


def paired_bootstrap(
    a: Any,
    b: Any,
    *,
    lengths: Lengths | None = None,
    clusters: Sequence[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Difference of two policies' win rates against one baseline on the same prompts, and its percentile interval.

    a, b: (n,) preferences in [1, 2], NaN missing; one resampling of the prompts (of whole clusters) serves both. With
    lengths = (a's, b's, the baseline's), in characters, it is the difference of the length-controlled win rates, both
    refitted. Raises ValueError for values out of range or shapes that differ.
    """
    valid, y, d, reason = paired(a, b, lengths)
    if reason:
        return PairedDifference(None, None, None, int(valid.sum()), len(valid), reason)
    y, d, start = y[:, None], None if d is None else d[:, None], pooled_fit(y, d)
    difference = rate_difference(y, d, np.ones((1, y.shape[-1])), start)
    drawn = [rate_difference(y, d, w, start) for w in resamples_of(units(clusters, valid), resamples, seed)]
    return PairedDifference(float(difference[0]), *interval(np.concatenate(drawn)), y.shape[-1], len(valid))


def flips_of(member: np.ndarray, flips: int, seed: int) -> Iterator[np.ndarray]:
    """True where a and b change places, (chunk, n), whole clusters at once: `flips` draws, or all if flips is 0."""
    rng, count = np.random.default_rng([seed, 2]), int(member.max()) + 1
    start = 0
    for size in chunks(flips or 2**count, len(member)):
        number = np.arange(start, start := start + size)[:, None]
        flip = rng.integers(0, 2, (size, count), dtype=np.int8) if flips else number >> np.arange(count) & 1
        yield flip[:, member].astype(bool)


def sign_flip_test(
    a: Any,
    b: Any,
    *,
    lengths: Lengths | None = None,
    clusters: Sequence[str] | None = None,
    flips: int = 99_999,
    seed: int = 0,
) -> SignFlipTest:
    """Two-sided test that which of two policies gave which answer does not matter; arguments as `paired_bootstrap`.

    T = abs(difference of the rates); T* swaps a and b (preference and length) within prompts, whole clusters at once,
    and with lengths refits both. p = (1 + #{T* >= T}) / (1 + flips); over all 2^n swaps, and so exact, if n <= 16.
    """
    valid, y, d, reason = paired(a, b, lengths)
    n = int(valid.sum())
    if reason:
        return SignFlipTest(None, None, 0, False, n, len(valid), reason)
    member, ones, start = units(clusters, valid), np.ones((1, n)), pooled_fit(y, d)
    exact = member.max() < 16
    values = y if d is None else np.concatenate([y, d])

    def of(flip: np.ndarray) -> np.ndarray:
        other = values.reshape(-1, 2, n)[:, ::-1].reshape(-1, n)
        swapped = np.where(flip, other[:, None], values[:, None])
        return rate_difference(swapped[:2], None if d is None else swapped[2:], ones, start)

    difference = float(of(np.zeros((1, n), dtype=bool))[0])
    # Swaps that give the same rates must count as ties whatever the rounding, hence the 1e-6 points.
    counts = [
        (np.abs(of(flip)) >= abs(difference) - 1e-6).sum() for flip in flips_of(member, 0 if exact else flips, seed)
    ]
    made = 2 ** (int(member.max()) + 1) if exact else flips
    p = sum(counts) / made if exact else (1 + sum(counts)) / (1 + made)
    return SignFlipTest(difference, float(p), made, bool(exact), n, len(valid))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where <= alpha, and the family-wise error stays below alpha."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return adjusted.tolist()


# --- commands --------------------------------------------------------------------------------------------------------


def command_margins(args: argparse.Namespace, world: World) -> None:
    load_pyplot()
    if args.pairs < 2:
        raise UserError(f"--pairs must be at least 2, got {args.pairs}")
    policies = [Path(p) for p in args.policy]
    names = [str(p.parent.name) for p in policies]
    if len(set(names)) < len(names) or "baseline" in names:
        names = [str(p) for p in policies]
    directories = dict(zip(names, policies, strict=True))
    config = run_config(policies[0])
    if args.baseline:
        directories["baseline"] = Path(args.baseline)
    for directory in directories.values():
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} is not a model directory (no config.json): pass the policy/ or sft/ of a run")
        model_config(str(directory))
    with world.rank_zero_first():
        pairs, clusters = held_out_pairs(config, policies[0], args.pairs, args.seed)
        for directory in list(directories.values())[1:]:
            if held_out_pairs(config, directory, args.pairs, args.seed)[0] != pairs:
                raise UserError(
                    f"{directory} and {policies[0]} tokenise the pairs differently: they cannot be compared"
                )
    values = {}
    for name, directory in directories.items():
        model = load_policy(directory, world)
        logps = score_all(model, pairs, 64 * world.size, args.micro_batch_tokens, world, f"margins, {name}")
        values[name] = margins(logps, pairs)
        del model
    summary = summarise(values, clusters)
    result = {
        "dataset": config.dataset,
        "split": "test",
        "seed": args.seed,
        "n": len(pairs),
        "clusters": len(set(clusters)),
        "policies": {name: str(directory) for name, directory in directories.items()},
        "summary": summary,
        "rows": pairs.rows,
        "values": {name: {kind: v.tolist() for kind, v in kinds.items()} for name, kinds in values.items()},
        "strength": {name: beta_history(d.parent) for name, d in directories.items() if name != "baseline"},
    }
    if world.rank == 0:
        output = Path(args.output_dir or policies[0].parent / "margins")
        write_json(output / "margins.json", result)
        draw_margins(result, output / "margins")
        print(
            f"preference margins on {len(pairs)} test pairs of {config.dataset}; 95 % bootstrap intervals, resampling "
            f"{len(set(clusters))} annotators or conversations whole"
        )
        print(table(summary))
        print(f"numbers: {output / 'margins.json'}; figure: {output / 'margins.png'}, .svg")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("margins", help="preference margins on held-out pairs", allow_abbrev=False)
    command.add_argument("--policy", nargs="+", required=True, metavar="DIR", help="policy/ directories of runs")
    command.add_argument("--baseline", metavar="DIR", help="a policy/ or sft/ directory to compare with")
    command.add_argument("--pairs", type=int, default=425, help="held-out pairs (default: 425, as in the paper)")
    command.add_argument("--seed", type=int, default=0, help="chooses the pairs (default: 0)")
    command.add_argument("--micro-batch-tokens", type=int, default=8192, help="tokens held at once (default: 8192)")
    command.add_argument("--output-dir", metavar="DIR", help="default: margins/ beside the first policy")
    command.set_defaults(run=command_margins)
    try:
        args = parser.parse_args(argv)
        quiet_libraries()
        with start_processes() as world:
            args.run(args, world)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
