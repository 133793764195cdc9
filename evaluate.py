"""Preference margins of trained policies on held-out pairs, for every subgroup, and the paper's figures.

    python evaluate.py margins --policy runs/gamma/policy runs/dpo/policy --baseline runs/gamma/sft
    python evaluate.py margins --policy runs/gamma/policy --baseline runs/dpo/policy --by age gender+education
    torchrun --nproc_per_node 8 evaluate.py margins --policy runs/gamma/policy      # splits the pairs over the ranks
    python evaluate.py figures --margins runs/gamma/margins/margins.json --runs runs/gamma runs/lognormal

The preference margin of a pair is log pi(y_w|x) - log pi(y_l|x) under the policy alone (Sec. 4.4 of the paper), summed
over response tokens, and also per token (each response's sum divided by its number of tokens). The micro average is the
mean over pairs, the macro average the mean over the subgroups of an attribute. Pairs come from the test split of the
data that the first policy was trained on, which is read from the config.json beside its directory.

margins writes margins.json (every number) and a figure of the margins and of the strength over training; figures draws
Figs. 2, 3/6, 4/7 of the paper and the learned densities from the saved files. Figures are PNG and SVG.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from train import (
    COLUMNS,
    Config,
    Pairs,
    Parser,
    UserError,
    World,
    check_sharing,
    data_options,
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
DASHES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 3)), (0, (1, 1)))  # curves that coincide stay visible

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


def held_out_pairs(config: Config, policy: Path, count: int, seed: int) -> tuple[Pairs, datasets.Dataset]:
    """`count` pairs of the test split, seeded, cut as in the run; and the rows that they come from."""
    rows = load_preferences(config.dataset, "test", config.data_dir, seed=config.seed, **data_options(config))
    pairs, _ = tokenize(rows, load_tokenizer(str(policy)), config.max_length, config.max_prompt_length)
    if len(pairs) < count:
        raise UserError(
            f"--pairs {count}: the test split of {config.dataset} has only {len(pairs)}; pass that or fewer"
        )
    pairs = pairs.select(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:count]).tolist())
    return pairs, rows.select(pairs.rows)


def group_labels(rows: datasets.Dataset, by: Sequence[str] | None) -> dict[str, list[str | None]]:
    """Per attribute, or combination written a+b, the label of every row; null where it is not given."""
    known = [name for name in rows.column_names if name not in COLUMNS]
    labels: dict[str, list[str | None]] = {}
    for name in known if by is None else by:
        parts = name.split("+")
        if unknown := [part for part in parts if part not in known]:
            raise UserError(f"--by {name}: no attribute {unknown[0]} (there are: {', '.join(known) or 'none'})")
        columns = zip(*(rows[part] for part in parts), strict=True)
        labels[name] = [None if None in values else " & ".join(map(str, values)) for values in columns]
    return {name: values for name, values in labels.items() if set(values) != {None}}


def load_policy(path: Path, pairs: Pairs, world: World) -> nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} cannot be loaded ({str(e).splitlines()[0]})") from e
    model = model.eval().to(world.device)
    check_sharing(model, pairs, world)
    return model


# --- margins ---------------------------------------------------------------------------------------------------------


def margins(logps: np.ndarray, pairs: Pairs) -> dict[str, np.ndarray]:
    """Per pair, in nats: the margin of the sums, and that of the means per response token. logps: (n, 2)."""
    lengths = np.array([[len(c), len(r)] for c, r in zip(pairs.chosen, pairs.rejected, strict=True)])
    return {"sum": logps[:, 0] - logps[:, 1], "per_token": logps[:, 0] / lengths[:, 0] - logps[:, 1] / lengths[:, 1]}


class Resamples(NamedTuple):
    """The cluster bootstrap: whole annotators (or conversations) are drawn, the same ones for every statistic."""

    member: np.ndarray  # (rows,) the cluster of each row
    weights: np.ndarray  # (resamples, clusters) how often each was drawn


def resample(clusters: Sequence[str], count: int = 10_000) -> Resamples:
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), count)
    return Resamples(member, draws.astype(float))


def resampled_means(values: np.ndarray, rows: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(resamples,) the mean of the chosen rows in each resample; NaN where none of them was drawn."""
    clusters = resamples.weights.shape[1]
    sums, sizes = (np.bincount(resamples.member[rows], x, clusters) for x in (values[rows], np.ones(rows.sum())))
    with np.errstate(invalid="ignore"):
        return (resamples.weights @ sums) / (resamples.weights @ sizes)


def estimate(mean: float, means: np.ndarray) -> dict[str, float]:
    """The mean with its 95 % percentile interval."""
    low, high = np.nanquantile(means, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def mean_interval(values: np.ndarray, resamples: Resamples) -> dict[str, float]:
    return estimate(values.mean(), resampled_means(values, np.ones(len(values), bool), resamples))


def summarise(by_name: dict[str, dict[str, np.ndarray]], resamples: Resamples) -> dict[str, Any]:
    """Per policy: mean margin and accuracy with intervals, and the paired gain over the baseline if there is one."""
    result: dict[str, Any] = {}
    for name, kinds in by_name.items():
        entry: dict[str, Any] = {}
        for kind, values in kinds.items():
            right = (values > 0) + 0.5 * (values == 0)
            entry[kind] = {"margin": mean_interval(values, resamples), "accuracy": mean_interval(right, resamples)}
            if "baseline" in by_name and name != "baseline":
                entry[kind]["gain"] = mean_interval(values - by_name["baseline"][kind], resamples)
        result[name] = entry
    return result


def subgroups(
    series: dict[str, np.ndarray], labels: dict[str, list[str | None]], resamples: Resamples, min_group: int
) -> dict[str, Any]:
    """Per attribute: every group's n, number of clusters and mean with interval, per series; micro and macro averages.

    Groups of fewer than min_group pairs are reported but marked; these and the rows without a label are not in the
    macro average, the share below zero, or the worst group.
    """
    result: dict[str, Any] = {}
    for attribute, values in labels.items():
        label = np.array(["" if v is None else v for v in values])
        given = np.array([v is not None for v in values])
        groups: dict[str, Any] = {}
        large: list[np.ndarray] = []
        for value in sorted(set(label[given])):
            rows = given & (label == value)
            small = bool(rows.sum() < min_group)
            large += [] if small else [rows]
            groups[str(value)] = {
                "n": int(rows.sum()),
                "clusters": len(set(resamples.member[rows])),
                "small": small,
            } | {name: estimate(x[rows].mean(), resampled_means(x, rows, resamples)) for name, x in series.items()}
        entry: dict[str, Any] = {"groups": groups, "not_given": int((~given).sum()), "micro": {}, "macro": {}}
        for name, x in series.items():
            entry["micro"][name] = estimate(x[given].mean(), resampled_means(x, given, resamples))
            if large:
                means = np.mean([resampled_means(x, rows, resamples) for rows in large], axis=0)
                entry["macro"][name] = estimate(np.mean([x[rows].mean() for rows in large]), means)
        result[attribute] = entry
    return result


def worst_groups(gains: dict[str, Any]) -> dict[str, Any]:
    """Per policy: how many of the large enough subgroups, over all attributes, lose against the baseline; the worst."""
    found: dict[str, list[dict[str, Any]]] = {}
    for attribute, entry in gains.items():
        for value, group in entry["groups"].items():
            for name in entry["micro"] if not group["small"] else ():
                found.setdefault(name, []).append(
                    {"attribute": attribute, "group": value, "n": group["n"]} | group[name]
                )
    return {
        name: {
            "groups": len(rows),
            "share_below_zero": sum(row["mean"] < 0 for row in rows) / len(rows),
            "worst": min(rows, key=lambda row: row["mean"]),
        }
        for name, rows in found.items()
    }


def cell(entry: dict[str, float] | None, digits: int = 3) -> str:
    return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]" if entry else ""


def columns_of(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(summary: dict[str, Any]) -> str:
    rows = [("policy", "", "margin (nats)", "accuracy", "gain over baseline")]
    for name, kinds in summary.items():
        for kind, e in kinds.items():
            rows.append((name, kind.replace("_", " "), cell(e["margin"]), cell(e["accuracy"]), cell(e.get("gain"))))
    return columns_of(rows)


def group_table(title: str, groups: dict[str, Any]) -> str:
    names = list(next(iter(groups.values()))["micro"])
    rows = [(title, "pairs", "people", *names)]
    for attribute, entry in groups.items():
        rows.append((attribute, "", "", *("" for _ in names)))
        for value, group in sorted(entry["groups"].items(), key=lambda item: item[1]["n"]):
            mark = " (small)" if group["small"] else ""
            rows.append((f"  {value}{mark}", str(group["n"]), str(group["clusters"]), *(cell(group[n]) for n in names)))
        if entry["not_given"]:
            rows.append(("  not given", str(entry["not_given"]), "", *("" for _ in names)))
        for average in ("macro", "micro"):
            rows.append((f"  = {average} average", "", "", *(cell(entry[average].get(n)) for n in names)))
    return columns_of(rows)


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


def color_of(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name != "baseline"]
    return {"baseline": "0.4"} | {name: COLORS[i % len(COLORS)] for i, name in enumerate(others)}


def draw_margins(result: dict[str, Any], path: Path) -> None:
    """Distribution of the margins, and the strength over training."""
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), width_ratios=[2, 1, 1, 1], layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate([entry["sum"] for entry in result["values"].values()]), 50)
    colors = color_of(list(result["values"]))
    for i, (name, values) in enumerate(result["values"].items()):
        axes[0].hist(values["sum"], bins, histtype="step", color=colors[name], label=name)
        axes[0].axvline(np.mean(values["sum"]), color=colors[name], linestyle="--", linewidth=1)
        for axis, part in zip(axes[1:], ("mean", "variance", "cv"), strict=True):
            if history := result["strength"].get(name):
                axis.plot(history["examples"], history[part], color=colors[name], linestyle=DASHES[i % len(DASHES)])
    axes[0].set(xlabel="preference margin (nats; dashed: mean)", ylabel=f"pairs (n = {result['n']})")
    axes[0].legend(frameon=False, fontsize=7)
    for axis, part in zip(axes[1:], ("mean", "variance", "cv"), strict=True):
        axis.set(xlabel="training examples", title=f"{part} of beta")
        axis.ticklabel_format(axis="y", useOffset=False)
    save_figure(figure, path)
    plt.close(figure)


def draw_subgroups(entries: dict[str, Any], names: Sequence[str], ylabel: str, path: Path) -> None:
    """Figs. 2 and 3/6: a panel an attribute, a dot a subgroup (its area by n), lines and squares the averages."""
    plt = load_pyplot()
    colors = color_of(names)
    sizes = [len(entry["groups"]) + 2 for entry in entries.values()]
    figure, axes = plt.subplots(
        len(entries), 1, figsize=(7, 0.6 + 0.27 * sum(sizes)), height_ratios=sizes, layout="constrained", squeeze=False
    )
    for axis, (attribute, entry) in zip(axes[:, 0], entries.items(), strict=True):
        groups = sorted(entry["groups"].items(), key=lambda item: -item[1]["n"])
        most = max(group["n"] for _, group in groups)
        ticks = [f"{value} (n={g['n']}{', small' if g['small'] else ''})" for value, g in groups] + ["macro", "micro"]
        for k, name in enumerate(names):
            shift = 0.5 * (k - (len(names) - 1) / 2) / len(names)
            points = [(g[name], 12 + 60 * g["n"] / most, "o", 0.35 if g["small"] else 0.8) for _, g in groups]
            points += [(entry[average].get(name), 40, "s", 1.0) for average in ("macro", "micro")]
            for y, (point, size, marker, alpha) in enumerate(points):
                if point:
                    color = colors[name]
                    axis.plot([point["low"], point["high"]], [y + shift] * 2, color=color, alpha=alpha, linewidth=1)
                    axis.scatter(
                        point["mean"], y + shift, s=size, marker=marker, color=color, alpha=alpha, linewidths=0
                    )
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.axhline(len(groups) - 0.5, color="0.85", linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(ticks)), ticks)
        axis.invert_yaxis()
        axis.set_title(attribute.replace("_", " "), loc="left", fontsize=9)
    axes[-1, 0].set_xlabel(ylabel)
    handles = [plt.Line2D([], [], color=colors[name], marker="o", linestyle="", label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(names), frameon=False)
    save_figure(figure, path)
    plt.close(figure)


def draw_strength(runs: dict[str, Path], path: Path) -> None:
    """Figs. 4/7: variance and cv of beta over training."""
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        history = beta_history(run)
        for axis, part in zip(axes, ("variance", "cv"), strict=True):
            axis.plot(history["examples"], history[part], label=name, linestyle=DASHES[i % len(DASHES)])
    for axis, part in zip(axes, ("variance", "cv (sd / mean)"), strict=True):
        axis.set(xlabel="training examples", ylabel=f"{part} of beta")
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)
    plt.close(figure)


def density(family: str, values: dict[str, Any], beta: np.ndarray) -> np.ndarray:
    """The density of a lognormal or gamma strength; values as in strength.json or config.json."""
    with torch.no_grad():
        if family == "gamma":
            law: Any = torch.distributions.Gamma(values["concentration"], values["rate"])
        else:
            law = torch.distributions.LogNormal(values["loc"], values["scale"])
        return law.log_prob(torch.from_numpy(beta)).exp().numpy()


def draw_densities(runs: dict[str, Path], path: Path) -> None:
    """The learned density of beta (solid) and the one that training started from (dotted)."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(4.5, 2.8), layout="constrained")
    beta = np.linspace(1e-3, 0.5, 500)
    for i, (name, run) in enumerate(runs.items()):
        learned = read_json(run / "strength.json")
        family, color = learned["family"], COLORS[i % len(COLORS)]
        if family != "dpo":
            axis.plot(beta, density(family, learned, beta), color=color, label=name)
            axis.plot(beta, density(family, read_json(run / "config.json"), beta), color=color, linestyle=":")
    axis.set(xlabel="beta", ylabel="density (dotted: initial)", xlim=(0, 0.5), ylim=(0, None))
    if axis.lines:
        axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)
    plt.close(figure)


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
        pairs, rows = held_out_pairs(config, policies[0], args.pairs, args.seed)
        labels = group_labels(rows, args.by)
        for directory in list(directories.values())[1:]:
            if held_out_pairs(config, directory, args.pairs, args.seed)[0] != pairs:
                raise UserError(
                    f"{directory} and {policies[0]} tokenise the pairs differently: they cannot be compared"
                )
    values = {}
    for name, directory in directories.items():
        model = load_policy(directory, pairs, world)
        logps = score_all(model, pairs, 64 * world.size, args.micro_batch_tokens, world, f"margins, {name}")
        values[name] = margins(logps, pairs)
        del model
    names_of_rows = zip(rows["annotator"], rows["conversation"], map(str, pairs.rows), strict=True)
    resamples = resample([annotator or conversation or row for annotator, conversation, row in names_of_rows])
    summary = summarise(values, resamples)
    kinds = ("sum", "per_token")
    margin_groups = {
        k: subgroups({n: v[k] for n, v in values.items()}, labels, resamples, args.min_group) for k in kinds
    }
    gain_groups: dict[str, Any] = {}
    if args.baseline:
        for kind in kinds:
            gains = {n: v[kind] - values["baseline"][kind] for n, v in values.items() if n != "baseline"}
            gain_groups[kind] = subgroups(gains, labels, resamples, args.min_group)
    worst = {kind: worst_groups(groups) for kind, groups in gain_groups.items()}
    result = {
        "dataset": config.dataset,
        "split": "test",
        "seed": args.seed,
        "n": len(pairs),
        "clusters": resamples.weights.shape[1],
        "min_group": args.min_group,
        "policies": {name: str(directory) for name, directory in directories.items()},
        "summary": summary,
        "subgroup_margins": margin_groups,
        "subgroup_gains": gain_groups,
        "worst": worst,
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
            f"{result['clusters']} annotators or conversations whole"
        )
        print(table(summary))
        shown = "per_token" if args.per_token else "sum"
        for title, groups in (("margin", margin_groups[shown]), ("gain over baseline", gain_groups.get(shown))):
            if groups:
                print("\n" + group_table(f"{title}, {shown.replace('_', ' ')}", groups))
        for name, entry in worst.get(shown, {}).items():
            low = entry["worst"]
            print(
                f"{name}: {entry['share_below_zero']:.0%} of {entry['groups']} subgroups of at least {args.min_group} "
                f"pairs gain less than 0; the worst is {low['attribute']} = {low['group']}: {cell(low)}, n = {low['n']}"
            )
        print(f"numbers: {output / 'margins.json'}; figure: {output / 'margins.png'}, .svg")


def command_figures(args: argparse.Namespace) -> None:
    load_pyplot()
    output = Path(args.output_dir)
    runs = {Path(run).name: Path(run) for run in args.runs}
    for run in runs.values():
        for name in ("config.json", "metrics.jsonl", "strength.json"):
            if not (run / name).is_file():
                raise UserError(f"--runs {run} has no {name}: pass the --output-dir of a finished run")
    drawn = []
    if args.margins:
        result = read_json(Path(args.margins))
        if "subgroup_margins" not in result:
            raise UserError(f"--margins {args.margins} was not written by evaluate.py margins: pass its margins.json")
        kind = "per_token" if args.per_token else "sum"
        for key, label in (("subgroup_margins", "preference margin"), ("subgroup_gains", "gain over the baseline")):
            entries = result[key].get(kind)
            if entries:
                names = list(next(iter(entries.values()))["micro"])
                draw_subgroups(entries, names, f"{label} (nats, {kind.replace('_', ' ')}, 95 % interval)", output / key)
                drawn.append(key)
    if runs:
        draw_strength(runs, output / "strength")
        draw_densities(runs, output / "densities")
        drawn += ["strength", "densities"]
    if not drawn:
        raise UserError("nothing to draw: pass --runs, or --margins of data that have attributes")
    print(f"{output}: " + ", ".join(f"{name}.png, .svg" for name in drawn))


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
    command.add_argument("--by", nargs="+", metavar="ATTRIBUTE", help="attributes, or a+b; all attributes by default")
    command.add_argument("--min-group", type=int, default=20, help="smaller subgroups are marked (default: 20 pairs)")
    command.add_argument("--per-token", action="store_true", help="print subgroups per token; the JSON has both")
    command.set_defaults(run=command_margins)
    command = commands.add_parser("figures", help="the paper's figures from saved files", allow_abbrev=False)
    command.add_argument("--margins", metavar="FILE", help="a margins.json")
    command.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="output directories of train.py")
    command.add_argument("--per-token", action="store_true", help="margins per token")
    command.add_argument("--output-dir", default="figures", metavar="DIR", help="default: figures")
    command.set_defaults(run=command_figures)
    try:
        args = parser.parse_args(argv)
        quiet_libraries()
        if args.run is command_figures:
            command_figures(args)
        else:
            with start_processes() as world:
                args.run(args, world)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
