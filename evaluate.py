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
import os
import sys
from collections.abc import Sequence
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
    rows = load_preferences(config.dataset, "test", config.data_dir, seed=config.seed, **data_options(config))
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
