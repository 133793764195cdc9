"""The report of a grid that verify.reproduce ran: python -m verify.report runs/reproduce-tiny [--output-dir DIR]

With --readme README.md the short version, the statements and their verdicts, goes between the marks there.

Writes report.md, report.html (one file, for reading) and figures (PNG, SVG), all from report.json, which holds every
number shown. It holds no text of the data sets and no group that is a single annotator.

Intervals are 95 %. Of several seeds: Student's t over the seeds' values, a seed being another split of the data,
another order and other held-out pairs. Of one seed: the cluster bootstrap over held-out pairs, as a normal interval
from its width, which leaves out how much training itself varies; quantities without one have no interval. A statement
is never judged without an interval.
"""

import base64
import html
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtri, stdtrit

import evaluate
import train
from train import UserError, read_json, write_text
from verify.reproduce import CONFIGURATIONS, MATCHED_BETA, Cell, finished, lines_of

HOLDS, DOES_NOT, CANNOT = "holds here", "does not hold here", "cannot be told here"
LEARNED = ("lognormal-1e-4", "gamma-1e-4")  # the paper's choice, Sec. 5.2
METHODS = {"dpo": ("DPO", "—"), "dpo-matched": (f"DPO, beta {MATCHED_BETA}", "—")} | {
    name: (evaluate.METHODS[name.split("-")[0]], "—" if "fixed" in name else name.split("-", 1)[1])
    for name in CONFIGURATIONS
    if "dpo" not in name
}
BEGIN, END = "<!-- reproduce:begin -->", "<!-- reproduce:end -->"
BASELINES = ("dpo", "dpo-matched")


# --- values with intervals -------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One value a seed; error: the standard error within the seed, used where there is one seed alone."""

    values: list[float]
    error: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        n = len(self.values)
        if n > 1:
            half = float(stdtrit(n - 1, (1 + level) / 2)) * statistics.stdev(self.values) / math.sqrt(n)
        elif self.error is not None:
            half = float(ndtri((1 + level) / 2)) * self.error
        else:
            return None
        return self.mean - half, self.mean + half

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval() or (None, None)
        return {"mean": self.mean, "low": low, "high": high, "seeds": len(self.values)}


def measured(entries: Iterable[dict[str, Any] | None]) -> Measured | None:
    """From the estimates of evaluate.py, one a seed; None if there are none."""
    found = [e for e in entries if e]
    if not found:
        return None
    low, high = found[0]["low"], found[0]["high"]
    error = None if len(found) > 1 or low is None else float((high - low) / (2 * ndtri(0.975)))
    return Measured([e["mean"] for e in found], error)


def show(value: Measured | None, digits: int = 3) -> str:
    if value is None:
        return ""
    span = value.interval()
    text = f"{value.mean:.{digits}f}"
    return text + (f" [{span[0]:.{digits}f}, {span[1]:.{digits}f}]" if span else " [no interval]")


# --- statements ------------------------------------------------------------------------------------------------------


@dataclass
class Statement:
    source: str
    text: str
    verdict: str
    why: str
    evidence: list[dict[str, Any]]


Claims = Sequence[tuple[str, Measured | None]]


def evidence_of(claims: Claims) -> list[dict[str, Any]]:
    return [{"what": what} | value.as_json() for what, value in claims if value is not None]


def all_positive(source: str, text: str, claims: Claims, missing: str, strict: bool = True) -> Statement:
    """The statement that every quantity is above 0 (strict), or not below it.

    Holds if each 95 % interval lies there (no correction: all of them have to). Does not hold if some interval lies
    wholly below 0 at a level corrected for their number (Bonferroni). Cannot be told otherwise, or without intervals.
    """
    found = [(what, value) for what, value in claims if value is not None]
    evidence = evidence_of(found)
    if not found:
        return Statement(source, text, CANNOT, missing, evidence)
    level = 1 - 0.05 / len(found)
    below = [what for what, value in found if (span := value.interval(level)) and span[1] < 0]
    if below:
        why = f"{len(below)} of {len(found)} are below 0 (level corrected for {len(found)}): {', '.join(below[:3])}"
        return Statement(source, text, DOES_NOT, why, evidence)
    spans = [value.interval() for _, value in found]
    if without := sum(span is None for span in spans):
        return Statement(source, text, CANNOT, f"{without} of {len(found)} quantities have no interval", evidence)
    above = sum(span[0] > 0 or (not strict and span[0] == 0) for span in spans if span)
    if above == len(found):
        return Statement(source, text, HOLDS, f"all {len(found)} intervals are above 0", evidence)
    means = sum(value.mean > 0 for _, value in found)
    why = f"{above} of {len(found)} intervals are above 0, none is below; {means} means are above 0"
    return Statement(source, text, CANNOT, why, evidence)


def same_order(source: str, text: str, pairs: Mapping[str, Claims], missing: str) -> Statement:
    """The statement that each difference (per pair of data sets) has one sign in all of its settings.

    Holds if in every pair all 95 % intervals lie on one side; does not if a pair has intervals on both sides at a level
    corrected for all of them.
    """
    found = {name: [(w, v) for w, v in claims if v is not None] for name, claims in pairs.items()}
    found = {name: claims for name, claims in found.items() if len(claims) > 1}
    evidence = evidence_of([(f"{name}, {w}", v) for name, claims in found.items() for w, v in claims])
    if not found:
        return Statement(source, text, CANNOT, missing, evidence)
    level = 1 - 0.05 / len(evidence)

    def sides(claims: Claims, level: float) -> list[int]:
        spans = [value.interval(level) for _, value in claims if value is not None]
        return [0 if span is None else (span[0] > 0) - (span[1] < 0) for span in spans]

    reversed_pairs = [name for name, claims in found.items() if {-1, 1} <= set(sides(claims, level))]
    if reversed_pairs:
        return Statement(source, text, DOES_NOT, f"the order is reversed between settings: {reversed_pairs}", evidence)
    told = [name for name, claims in found.items() if set(sides(claims, 0.95)) in ({1}, {-1})]
    why = f"{len(told)} of {len(found)} pairs of data sets have one order, told apart in every setting"
    return Statement(source, text, HOLDS if len(told) == len(found) else CANNOT, why, evidence)


def equals(source: str, text: str, claims: Sequence[tuple[str, Measured | None, float]], tolerance: float) -> Statement:
    """The statement that each quantity has a value: holds if the 95 % interval is within the tolerance around it, does
    not if the (corrected) interval leaves the tolerance out altogether."""
    found = [(what, value, target) for what, value, target in claims if value is not None]
    evidence = [{"what": what, "stated": target} | value.as_json() for what, value, target in found]
    if not found:
        return Statement(source, text, CANNOT, "no run to compare", evidence)
    inside, outside = 0, []
    for what, value, target in found:
        span, wide = value.interval(), value.interval(1 - 0.05 / len(found))
        if span and wide:
            inside += target - tolerance <= span[0] and span[1] <= target + tolerance
            if wide[1] < target - tolerance or wide[0] > target + tolerance:
                outside.append(what)
    if outside:
        return Statement(source, text, DOES_NOT, f"outside ± {tolerance:g} of what is stated: {outside}", evidence)
    why = f"{inside} of {len(found)} intervals are within ± {tolerance:g} of what is stated"
    return Statement(source, text, HOLDS if inside == len(found) else CANNOT, why, evidence)


# --- what the runs left ----------------------------------------------------------------------------------------------


def read_run(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    lines = lines_of(folder)
    speeds = [line["train/examples_per_second"] for line in lines if "train/examples_per_second" in line]
    return {
        "strength": read_json(folder / "strength.json"),
        "trajectory": evaluate.beta_history(folder),
        "held_out": [line for line in lines if "eval/loss" in line][-1],
        "updates": lines[-1]["step"],
        # The median is not disturbed by what else a machine does now and then.
        "seconds_per_update": read_json(folder / "config.json")["batch_size"] / statistics.median(speeds),
        "wall_seconds": record.get("seconds"),
        "command": shlex.join(record["commands"][-1]) if record else None,
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """What the runs of a cell have in common: flags, and what became of the data."""
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in train.LOCATION_FLAGS}
    own = {name for flags in CONFIGURATIONS.values() for name in flags if name.startswith("--")}
    config = {k: v for k, v in config.items() if "--" + k.replace("_", "-") not in own}
    data = read_json(folder / "data.json")
    return {
        "config": config | {name: Path(config[name]).name for name in ("model", "dataset")},
        "data": {k: data[k] for k in ("rows_read", "rows_dropped", "split", "tokenised")},
    }


def read_margins(folder: Path) -> dict[str, Any] | None:
    """Per policy its margin and accuracy, gains over both DPOs, and those of subgroups; no single pair is kept."""
    path = folder / "margins" / "margins.json"
    if not path.exists():
        return None
    found = read_json(path)
    with evaluate.reading(path):
        name_of = {n: "sft" if Path(d).name == "sft" else Path(d).parent.name for n, d in found["policies"].items()}
        values = {name_of[name]: {k: np.array(v) for k, v in kinds.items()} for name, kinds in found["values"].items()}
        resamples = evaluate.resample(found["cluster"])
        result: dict[str, Any] = {k: found[k] for k in ("n", "clusters", "min_group", "seed")}
        result["summary"] = {name_of[n]: entry for n, entry in found["summary"].items()}
        for kinds in result["summary"].values():
            for entry in kinds.values():
                entry.pop("gain", None)  # kept with those over the other baseline
        named = found["subgroup_margins"]["sum"]
        result["subgroup_margins"] = of_several({a: renamed(entry, name_of) for a, entry in named.items()})
        result["groups_left_out"] = sum(g["clusters"] < 2 for entry in named.values() for g in entry["groups"].values())
        result["gains"], result["subgroup_gains"] = {}, {}
        for baseline in BASELINES:
            if baseline not in values:
                continue
            gains = {n: v["sum"] - values[baseline]["sum"] for n, v in values.items() if n not in (baseline, "sft")}
            result["gains"][baseline] = {n: evaluate.mean_interval(g, resamples) for n, g in gains.items()}
            if gains:
                groups = evaluate.subgroups(gains, found["labels"], resamples, found["min_group"])
                result["subgroup_gains"][baseline] = of_several(groups)
    return result


def of_several(attributes: dict[str, Any]) -> dict[str, Any]:
    """Without the groups that are one annotator: a person, and no interval could be had."""
    result = {}
    for attribute, entry in attributes.items():
        groups = {label: group for label, group in entry["groups"].items() if group["clusters"] > 1}
        if groups:
            result[attribute] = entry | {"groups": groups}
    return result


def renamed(entry: dict[str, Any], name_of: dict[str, str]) -> dict[str, Any]:
    def names(values: dict[str, Any]) -> dict[str, Any]:
        return {name_of.get(k, k): v for k, v in values.items()}

    groups = {label: names(group) for label, group in entry["groups"].items()}
    return entry | {"groups": groups, "micro": names(entry["micro"]), "macro": names(entry["macro"])}


def read_win_rates(folder: Path) -> dict[str, Any] | None:
    path = folder / "judgements" / "winrate.json"
    if not path.exists():
        return None
    found = read_json(path)
    with evaluate.reading(path):
        rates = {
            c["policy"]: {k: c[k] for k in ("win_rate", "length_controlled", "mean_lengths", "reason")}
            for c in found["cells"]
        }
        differences = {c["policy"]: {k: c[k] for k in ("win_rate", "length_controlled")} for c in found["comparisons"]}
    return {"rates": rates, "over_dpo": differences, "judge": found["judge"], "notes": found["notes"]}


def collect(output: Path) -> dict[str, Any]:
    """Everything that the report shows, but for what follows from it."""
    plan = read_json(output / "plan.json")
    records = {}
    for record in evaluate.read_whole_lines(output / "runs.jsonl"):
        records[record["name"]] = record
    cells: dict[str, Any] = {}
    for seed in plan["seeds"]:
        for dataset, model in itertools.product(plan["datasets"], plan["models"]):
            cell = Cell(model, dataset, seed)
            folder = output / cell.name
            runs = {
                n: read_run(folder / n, records.get(f"{cell.name}/{n}", {}))
                for n in CONFIGURATIONS
                if finished(folder / n)
            }
            if runs:
                cells[cell.name] = asdict(cell) | {
                    "runs": runs,
                    **read_settings(folder / next(iter(runs))),
                    "margins": read_margins(folder),
                    "win_rates": read_win_rates(folder),
                }
    if not cells:
        raise UserError(f"{output} holds no finished run: run python -m verify.reproduce --output-dir {output}")
    failures = {name: record["status"] for name, record in records.items() if record["status"]}
    data = {"plan": plan, "environment": environment(), "cells": cells, "failures": failures}
    # What is shown to others names no directory of this machine.
    places = {str(output): "RUNS", plan["data_dir"]: "$MIXDPO_DATA"}
    return without_places(data, {place: name for place, name in places.items() if place.startswith("/")})


def without_places(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: without_places(entry, places) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_places(entry, places) for entry in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name)
    return value


def environment() -> dict[str, Any]:
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": gpu,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.system(),
    }


# --- from cells to columns -------------------------------------------------------------------------------------------

Column = tuple[str, str]  # (data set, model)


def columns(data: dict[str, Any]) -> dict[Column, list[dict[str, Any]]]:
    """The cells of each column of the tables, one a seed."""
    found: dict[Column, list[dict[str, Any]]] = {}
    for cell in data["cells"].values():
        found.setdefault((train.printable(Path(cell["dataset"]).name), Path(cell["model"]).name), []).append(cell)
    return found


def per_seed(cells: Sequence[dict[str, Any]], *keys: str) -> Measured | None:
    """The estimates found by following the keys, in those cells that have them."""
    entries = []
    for cell in cells:
        entry: Any = cell
        for key in keys:
            entry = entry.get(key) if entry else None
        entries.append(entry)
    return measured(entries)


def final(cells: Sequence[dict[str, Any]], name: str, what: str) -> list[float]:
    return [cell["runs"][name]["strength"][what] for cell in cells if name in cell["runs"]]


def difference(a: Sequence[float], b: Sequence[float]) -> Measured | None:
    """Paired by seed."""
    values = [x - y for x, y in zip(a, b, strict=False)]
    return Measured(values) if values else None


def relative_time(cells: Sequence[dict[str, Any]], name: str) -> list[float]:
    both = [cell["runs"] for cell in cells if {name, "dpo"} <= set(cell["runs"])]
    return [runs[name]["seconds_per_update"] / runs["dpo"]["seconds_per_update"] for runs in both]


def log_decline(cells: Sequence[dict[str, Any]], name: str) -> list[float]:
    """log of final over initial variance of beta: negative where it fell."""
    found = [cell["runs"][name]["trajectory"]["variance"] for cell in cells if name in cell["runs"]]
    return [math.log(v[-1] / v[0]) for v in found]


def accuracy_difference(cells: Sequence[dict[str, Any]], a: str, b: str) -> Measured | None:
    """Margins of the policy, a - b, in nats; over seeds alone, as the pairs of one seed are shared."""
    found = [cell["margins"]["summary"] for cell in cells if cell["margins"]]
    found = [s for s in found if {a, b} <= set(s)]
    return difference(*([s[n]["sum"]["margin"]["mean"] for s in found] for n in (a, b)))


def subgroup_claims(by_column: dict[Column, list[dict[str, Any]]], baseline: str, average: str = "") -> Claims:
    """Gains of both learned mixtures, of every large enough subgroup, or of the average of each attribute."""
    claims = []
    for (dataset, model), cells in by_column.items():
        entries = [c["margins"]["subgroup_gains"].get(baseline, {}) for c in cells if c["margins"]]
        for attribute in dict.fromkeys(a for entry in entries for a in entry):
            found = [entry[attribute] for entry in entries if attribute in entry]
            labels = dict.fromkeys(g for f in found for g, v in f["groups"].items() if not v["small"])
            for name in LEARNED:
                where = f"{dataset}, {model}, {name}, {attribute}"
                if average:
                    claims.append((f"{where}: {average}", measured(f[average].get(name) for f in found)))
                    continue
                for label in labels:
                    large = [f["groups"].get(label) for f in found]
                    values = [g.get(name) for g in large if g and not g["small"]]
                    claims.append((f"{where} = {label}", measured(values)))
    return claims


def statements(data: dict[str, Any]) -> list[Statement]:
    """The paper's statements, each with a verdict and what it rests on."""
    by_column = columns(data)
    datasets, models = (list(dict.fromkeys(column[k] for column in by_column)) for k in (0, 1))
    found = []

    masks = []
    for (dataset, model), cells in by_column.items():
        entries = [c["margins"]["subgroup_margins"] for c in cells if c["margins"]]
        for attribute in dict.fromkeys(a for entry in entries for a in entry):
            means = [
                (e[attribute]["micro"].get("dpo"), e[attribute]["macro"].get("dpo")) for e in entries if attribute in e
            ]
            pairs = [(micro["mean"], macro["mean"]) for micro, macro in means if micro and macro]
            where = f"{dataset}, {model}, DPO, {attribute}: micro - macro (nats)"
            masks.append((where, difference(*zip(*pairs, strict=True)) if pairs else None))
    found.append(
        all_positive(
            "Sec. 5.1, Fig. 2",
            "Small subgroups have lower margins, so that the micro average lies above the macro average.",
            masks,
            "no attribute with subgroups",
        )
    )
    for baseline, label in (("dpo", "DPO"), ("dpo-matched", f"DPO with the mean of the mixtures, {MATCHED_BETA}")):
        source = "App. G, Fig. 6" if baseline == "dpo" else "not in the paper"
        text = f"LogNormal and Gamma (beta LR 1e-4) lower no subgroup's margin against {label}."
        claims = subgroup_claims(by_column, baseline)
        found.append(all_positive(source, text, claims, "no attribute with large enough subgroups", strict=False))
        source = "Sec. 5.2, Fig. 3" if baseline == "dpo" else "not in the paper"
        text = f"They raise the macro-averaged margin against {label}."
        claims = subgroup_claims(by_column, baseline, "macro")
        found.append(all_positive(source, text, claims, "no attribute with large enough subgroups"))
        text = f"They raise the margin averaged over pairs against {label}."
        claims = [
            (f"{dataset}, {model}, {name}", per_seed(cells, "margins", "gains", baseline, name))
            for (dataset, model), cells in by_column.items()
            for name in LEARNED
        ]
        found.append(all_positive(source, text, claims, "no margins"))
    found += win_rate_statements(by_column)
    found += strength_statements(by_column, datasets, models)
    stable = [
        (
            f"{dataset}, {model}, {dist}: margin at 1e-4 minus at {lr}",
            accuracy_difference(cells, f"{dist}-1e-4", f"{dist}-{lr}"),
        )
        for (dataset, model), cells in by_column.items()
        for dist in ("lognormal", "gamma")
        for lr in ("1e-5", "1e-3")
    ]
    found.append(
        all_positive(
            "App. F",
            "A beta LR of 1e-4 is consistently strong: no worse than 1e-5 and 1e-3 (here in margins, not win rates).",
            stable,
            "no margins",
            strict=False,
        )
    )
    times = [
        (f"{dataset}, {model}, {name}", Measured(values) if (values := relative_time(cells, name)) else None, stated)
        for (dataset, model), cells in by_column.items()
        for name, stated in zip(LEARNED, (1.02, 1.1), strict=True)
    ]
    found.append(equals("Sec. 5.4, Fig. 5", "An update costs 1.02 (LogNormal) and 1.1 (Gamma) of DPO's.", times, 0.03))
    return found


def win_rate_statements(by_column: dict[Column, list[dict[str, Any]]]) -> list[Statement]:
    claims = []
    for (dataset, model), cells in by_column.items():
        for name in LEARNED:
            entries = [c["win_rates"]["over_dpo"].get(name) for c in cells if c["win_rates"]]
            estimates = [{"mean": e["win_rate"]["difference"], **e["win_rate"]} for e in entries if e]
            claims.append((f"{dataset}, {model}, {name}: points over DPO", measured(estimates)))
    prism = [claim for claim in claims if claim[0].startswith("prism")]
    why = "no judge was given: pass --judge-url"
    return [
        all_positive("Table 1", "LogNormal and Gamma raise the win rate over DPO's.", claims, why),
        all_positive("Sec. 5.2", "On PRISM they do so substantially (up to 11.2 points).", prism, f"{why}, and prism"),
    ]


def strength_statements(
    by_column: dict[Column, list[dict[str, Any]]], datasets: list[str], models: list[str]
) -> list[Statement]:
    fastest = []
    pairs: dict[str, list[tuple[str, Measured | None]]] = {}
    planted: dict[str, list[tuple[str, Measured | None]]] = {"1e-4": [], "1e-3": []}
    demo = sorted((d for d in datasets if d.startswith("demo-")), key=lambda d: float(d[5:]))
    for model, dist in itertools.product(models, ("lognormal", "gamma")):
        name = f"{dist}-1e-4"
        for other in datasets:
            if other != "hh" and {("hh", model), (other, model)} <= set(by_column):
                slower, faster = (log_decline(by_column[d, model], name) for d in (other, "hh"))
                what = f"{model}, {name}: log decline of variance, hh beyond {other}"
                fastest.append((what, difference(slower, faster)))
        for a, b in itertools.combinations(datasets, 2):
            if {(a, model), (b, model)} <= set(by_column):
                logs = [[math.log(v) for v in final(by_column[d, model], name, "variance")] for d in (a, b)]
                pairs.setdefault(f"{a} - {b}", []).append((f"{model}, {name}: log variance", difference(*logs)))
        for lr, (low, high) in itertools.product(planted, itertools.pairwise(demo)):
            if {(low, model), (high, model)} <= set(by_column):
                cv = [final(by_column[d, model], f"{dist}-{lr}", "cv") for d in (high, low)]
                planted[lr].append((f"{model}, {dist}-{lr}: cv on {high} minus {low}", difference(*cv)))
    need = "needs demo data of several heterogeneities"
    return [
        all_positive(
            "Sec. 5.3, Fig. 4", "The variance of beta falls fastest on HH.", fastest, "needs hh and another data set"
        ),
        same_order(
            "App. H, Fig. 7",
            "The order of the data sets by learned variance is the same across models and distributions.",
            pairs,
            "needs two data sets",
        ),
    ] + [
        all_positive(
            "Sec. 5.3, with a known truth",
            f"Learned cv follows the heterogeneity of the data (choices drawn with a planted cv; beta LR {lr}).",
            claims,
            need,
        )
        for lr, claims in planted.items()
    ]


# --- tables ----------------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def layout(
    by_column: dict[Column, list[dict[str, Any]]], parts: Sequence[str], names: Iterable[str], value: Any
) -> Table:
    """Tables 1 and 2: a row a configuration, a column a data set and model; value(cells, name, part) gives the text."""
    header = ["method", "beta LR"] + [f"{d}, {m}: {part}" for d, m in by_column for part in parts]
    rows = []
    for name in names:
        cells = [value(cells, name, part) for cells in by_column.values() for part in parts]
        if any(cells):
            rows.append([*METHODS.get(name, ("SFT", "—")), *cells])
    return header, rows


def margin_cell(cells: Sequence[dict[str, Any]], name: str, part: str) -> str:
    return show(per_seed(cells, "margins", "summary", name, "sum", part))


def gain_cell(cells: Sequence[dict[str, Any]], name: str, part: str) -> str:
    return show(per_seed(cells, "margins", "gains", "dpo-matched" if MATCHED_BETA in part else "dpo", name))


def win_rate_cell(cells: Sequence[dict[str, Any]], name: str, part: str) -> str:
    found = [c["win_rates"]["rates"].get(name) for c in cells if c["win_rates"]]
    if part == "WR":
        rates = [r["win_rate"] for r in found if r and not r["reason"]]
        if not rates:
            return ""
        error = rates[0]["standard_error"] if len(rates) == 1 else None
        return show(Measured([r["win_rate"] for r in rates], error), 2)
    values = [r["length_controlled"] for r in found if r and r["length_controlled"]]
    return show(measured({"mean": v["lc_win_rate"], **v} for v in values if v["lc_win_rate"] is not None), 2)


def strength_table(by_column: dict[Column, list[dict[str, Any]]]) -> Table:
    rows = []
    for (dataset, model), cells in by_column.items():
        for name in CONFIGURATIONS:
            if "dpo" in name or not final(cells, name, "cv"):
                continue
            values = [show(Measured(final(cells, name, part)), 5) for part in ("mean", "variance", "cv")]
            decline = show(Measured([math.exp(v) for v in log_decline(cells, name)]))
            rows.append([dataset, model, *METHODS[name], *values, decline])
    return ["data", "model", "method", "beta LR", "mean", "variance", "cv", "variance, final / initial"], rows


def data_table(by_column: dict[Column, list[dict[str, Any]]]) -> Table:
    rows = []
    for (dataset, model), cells in by_column.items():
        data = cells[0]["data"]
        counts = data["tokenised"]["train"]
        lost = [str(counts[k]) for k in ("pairs", "used", "prompt_cut", "response_cut", "eos_lost")]
        dropped = {k: v for k, v in counts.items() if k.startswith("dropped_") and v} | data["rows_dropped"]
        rows.append([dataset, model, str(data["rows_read"]), *lost, train.counted(dropped), data["split"]])
    header = ["data", "model", "rows read", "training pairs", "used", "prompt cut", "response cut", "EOS lost"]
    return [*header, "dropped, and why", "split"], rows


def time_table(by_column: dict[Column, list[dict[str, Any]]]) -> Table:
    rows = []
    for (dataset, model), cells in by_column.items():
        for name in CONFIGURATIONS:
            runs = [c["runs"][name] for c in cells if name in c["runs"]]
            if runs:
                walls = [r["wall_seconds"] for r in runs if r["wall_seconds"] is not None]
                wall = f"{statistics.fmean(walls):.0f}" if walls else "—"
                step = f"{1000 * statistics.median(r['seconds_per_update'] for r in runs):.1f}"
                ratio = relative_time(cells, name)
                text = show(Measured(ratio)) if ratio else ""
                rows.append([dataset, model, *METHODS[name], str(runs[0]["updates"]), wall, step, text])
    header = [
        "data",
        "model",
        "method",
        "beta LR",
        "updates",
        "wall time of a run (s)",
        "update (ms)",
        "relative to DPO",
    ]
    return header, rows


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(data: dict[str, Any], output: Path, runs: Path) -> list[tuple[str, str]]:
    """Names and captions of the figures, in the report's order."""
    plt = evaluate.load_pyplot()
    by_column = columns(data)
    drawn = []
    for (dataset, model), cells in by_column.items():
        found = cells[0]["margins"]
        stem, one = f"{dataset}--{model}", f" Seed {cells[0]['seed']}." if len(cells) > 1 else ""
        if found and found["subgroup_margins"] and "dpo" in found["summary"]:
            label = "preference margin of DPO (nats, 95 % interval)"
            evaluate.draw_subgroups(found["subgroup_margins"], ["dpo"], label, output / f"fig2--{stem}")
            drawn.append((f"fig2--{stem}", f"Fig. 2, {dataset}, {model}: margins of subgroups under DPO.{one}"))
        names = [n for n in LEARNED if found and n in found["gains"].get("dpo", {})]
        if names and found["subgroup_gains"].get("dpo"):
            label = "gain over DPO (nats, 95 % interval)"
            evaluate.draw_subgroups(found["subgroup_gains"]["dpo"], names, label, output / f"fig3--{stem}")
            drawn.append((f"fig3--{stem}", f"Figs. 3 and 6, {dataset}, {model}: gains of subgroups over DPO.{one}"))
    drawn += draw_trajectories(plt, by_column, output)
    drawn += draw_times(plt, by_column, output)
    for model, dist in itertools.product(dict.fromkeys(m for _, m in by_column), ("lognormal", "gamma")):
        cells = {d: c[0] for (d, m), c in by_column.items() if m == model}
        # The largest learning rate moves them most.
        names = [n for n in CONFIGURATIONS if n.startswith(f"{dist}-") and any(n in c["runs"] for c in cells.values())]
        if names:
            name, stem = names[-1], f"densities-{dist}--{model}"
            folders = {
                d: runs / Cell(c["model"], c["dataset"], c["seed"]).name / name
                for d, c in cells.items()
                if name in c["runs"]
            }
            evaluate.draw_densities(folders, output / stem)
            drawn.append((stem, f"Learned {name}, {model}, first seed (dotted: where training began)."))
    drawn += draw_confound(plt, by_column, output)
    drawn += draw_planted(plt, by_column, output)
    return drawn


def draw_trajectories(plt: Any, by_column: dict[Column, list[dict[str, Any]]], output: Path) -> list[tuple[str, str]]:
    """Figs. 4 and 7: a row a model, a panel a distribution, a line a data set (thin: seeds)."""
    models = list(dict.fromkeys(model for _, model in by_column))
    colors = {
        d: evaluate.COLORS[i % len(evaluate.COLORS)] for i, d in enumerate(dict.fromkeys(d for d, _ in by_column))
    }
    size = (7.5, 2.6 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, layout="constrained", squeeze=False)
    for ((dataset, model), cells), (k, name) in itertools.product(by_column.items(), enumerate(LEARNED)):
        axis = axes[models.index(model), k]
        found = [c["runs"][name]["trajectory"] for c in cells if name in c["runs"]]
        for history in found:
            axis.plot(history["examples"], history["variance"], color=colors[dataset], linewidth=0.6, alpha=0.5)
        if found:
            shortest = min(len(h["examples"]) for h in found)
            mean = np.mean([h["variance"][:shortest] for h in found], axis=0)
            axis.plot(found[0]["examples"][:shortest], mean, color=colors[dataset], linewidth=1.8)
        axis.set(xlabel="training examples", ylabel="variance of beta", title=f"{model}, {METHODS[name][0]}")
        axis.ticklabel_format(axis="y", useOffset=False)
    handles = [plt.Line2D([], [], color=color, label=dataset) for dataset, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=7)
    evaluate.save_figure(figure, output / "fig4")
    plt.close(figure)
    return [("fig4", "Figs. 4 and 7: variance of beta over training at beta LR 1e-4 (thin: seeds, thick: their mean).")]


def draw_times(plt: Any, by_column: dict[Column, list[dict[str, Any]]], output: Path) -> list[tuple[str, str]]:
    ratios = {
        name: [r for cells in by_column.values() for r in relative_time(cells, name)] for name in ("dpo", *LEARNED)
    }
    ratios = {name: values for name, values in ratios.items() if values}
    if len(ratios) < 2:
        return []
    figure, axis = plt.subplots(figsize=(4, 2.6), layout="constrained")
    means = [statistics.fmean(v) for v in ratios.values()]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0 for v in ratios.values()]
    axis.bar(
        [METHODS[n][0] for n in ratios], means, yerr=spreads, capsize=4, color=evaluate.COLORS[: len(ratios)], width=0.6
    )
    stated = {"lognormal-1e-4": 1.02, "gamma-1e-4": 1.1}
    places = [i for i, n in enumerate(ratios) if n in stated]
    axis.plot(places, [stated[n] for n in ratios if n in stated], "k_", markersize=22, label="stated in the paper")
    axis.set(ylabel="time of an update, DPO = 1", ylim=(0, None))
    figure.legend(frameon=False, fontsize=7, loc="outside upper right")
    evaluate.save_figure(figure, output / "fig5")
    plt.close(figure)
    return [
        (
            "fig5",
            "Fig. 5: median time of an update over DPO's in the same cell (± 1 sd over cells; other load disturbs it).",
        )
    ]


def draw_confound(plt: Any, by_column: dict[Column, list[dict[str, Any]]], output: Path) -> list[tuple[str, str]]:
    """Gains over DPO at 0.1 and at the mean of the mixtures, side by side."""
    names = [name for name in CONFIGURATIONS if "dpo" not in name]
    figure, axes = plt.subplots(
        1, len(by_column), figsize=(1.6 + 2.6 * len(by_column), 2.8), layout="constrained", sharey=True, squeeze=False
    )
    for axis, ((dataset, model), cells) in zip(axes[0], by_column.items(), strict=True):
        for k, baseline in enumerate(BASELINES):
            for y, name in enumerate(names):
                value = per_seed(cells, "margins", "gains", baseline, name)
                if value:
                    place, color = y + 0.3 * k - 0.15, evaluate.COLORS[k]
                    axis.plot(value.mean, place, "o", color=color, markersize=4)
                    if span := value.interval():
                        axis.plot(span, [place] * 2, color=color, linewidth=1.2)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(xlabel="gain in margin (nats)", title=f"{dataset}, {model}")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    labels = [f"over {METHODS[b][0]}" if k else "over DPO, beta 0.1" for k, b in enumerate(BASELINES)]
    handles = [plt.Line2D([], [], color=evaluate.COLORS[k], marker="o", label=label) for k, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=7)
    evaluate.save_figure(figure, output / "confound")
    plt.close(figure)
    caption = (
        f"Gains over DPO as in the paper, and over DPO at the mean of the mixtures ({MATCHED_BETA}); 95 % intervals."
    )
    return [("confound", caption)]


def draw_planted(plt: Any, by_column: dict[Column, list[dict[str, Any]]], output: Path) -> list[tuple[str, str]]:
    """Learned cv against the planted one."""
    demo = {c: cells for c, cells in by_column.items() if c[0].startswith("demo-")}
    if len({dataset for dataset, _ in demo}) < 2:
        return []
    rates = ("1e-5", "1e-4", "1e-3")
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for axis, dist in zip(axes, ("lognormal", "gamma"), strict=True):
        for k, lr in enumerate(rates):
            for (dataset, _), cells in demo.items():
                values, planted = final(cells, f"{dist}-{lr}", "cv"), float(dataset[5:]) + 0.03 * (k - 1)
                axis.plot([planted] * len(values), values, ".", color=evaluate.COLORS[k], alpha=0.4, markersize=4)
                if values:
                    axis.plot(planted, statistics.fmean(values), "o", color=evaluate.COLORS[k], markersize=5)
        axis.set(xlabel="planted cv of the preference strength", ylabel="learned cv", title=evaluate.METHODS[dist])
        axis.ticklabel_format(axis="y", useOffset=False)
    colors = dict(zip(rates, evaluate.COLORS, strict=False))
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="", label=f"beta LR {r}") for r, c in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=7)
    evaluate.save_figure(figure, output / "planted")
    plt.close(figure)
    return [
        (
            "planted",
            "Learned cv at the end of training against the planted one (small: seeds, large: their mean; moved apart).",
        )
    ]


# --- the two texts, from the same blocks -----------------------------------------------------------------------------

Block = tuple[str, Any]  # ("h1" | "h2" | "p" | "code", text), ("table", Table), ("figure", (name, caption))


def blocks_of(data: dict[str, Any], found: list[Statement], figures: list[tuple[str, str]]) -> list[Block]:
    by_column, plan, where = columns(data), data["plan"], data["environment"]
    seeds = len(plan["seeds"])
    span = (
        f"Student's t over {seeds} seeds, each another split, order and set of held-out pairs"
        if seeds > 1
        else "cluster bootstrap over held-out pairs, of one seed: what another training run would give is not in them"
    )
    blocks: list[Block] = [
        ("h1", f"Reproduction at scale {plan['scale']}"),
        (
            "p",
            f"{', '.join(plan['models'])} on {', '.join(plan['datasets'])}; {seeds} seed(s), "
            f"{len(data['cells'])} SFT runs, {sum(len(c['runs']) for c in data['cells'].values())} "
            f"preference runs. Intervals are 95 %: {span}. Every number is in report.json.",
        ),
        ("h2", "Statements of the paper"),
        ("p", scope(plan)),
        (
            "table",
            (["statement", "where", "verdict", "because"], [[s.text, s.source, s.verdict, s.why] for s in found]),
        ),
    ]
    for s in found:
        if s.evidence:
            blocks.append(("h3", s.text))
            rows = [evidence_row(e) for e in s.evidence]
            blocks.append(("table", (["quantity", "mean", "95 % interval", "seeds"], rows)))
    blocks += [("h2", "Tables 1 and 2: win rates against the SFT model")]
    rates = layout(by_column, ("WR", "LC-WR"), CONFIGURATIONS, win_rate_cell)
    main = ("dpo", *LEARNED)
    if rates[1]:
        blocks += [("p", "Table 1."), ("table", layout(by_column, ("WR", "LC-WR"), main, win_rate_cell))]
        blocks += [("p", "Table 2, with DPO at the mean of the mixtures."), ("table", rates)]
    else:
        blocks.append(("p", "No judge was given, so there are none; the same layout in margins follows."))
    margins = ("margin", "accuracy")
    blocks += [
        ("h2", "The same layout in preference margins and accuracy"),
        ("p", "Margin: log pi(chosen) - log pi(rejected) in nats, test pairs; accuracy: share with a positive margin."),
        ("table", layout(by_column, margins, ("sft", *main), margin_cell)),
        ("table", layout(by_column, margins, ("sft", *CONFIGURATIONS), margin_cell)),
        ("h2", f"Gains over DPO, and over DPO at the mean of the mixtures ({MATCHED_BETA})"),
        (
            "p",
            "The fixed distributions have a mean of 0.12 and not DPO's 0.1, and learned ones drift. A gain over both "
            "is one that a larger beta alone does not explain. In nats, paired by test pair.",
        ),
        ("table", layout(by_column, ("over 0.1", f"over {MATCHED_BETA}"), CONFIGURATIONS, gain_cell)),
        ("h2", "Learned strength"),
        ("table", strength_table(by_column)),
        ("h2", "Figures"),
        *(("figure", figure) for figure in figures),
        ("h2", "Data: what was truncated and dropped"),
        ("p", "Counts of the first seed; the test split is cut in the same way."),
        ("table", data_table(by_column)),
        (
            "p",
            "Subgroups that are a single annotator, which are left out here and only part of the averages: "
            + ", ".join(
                f"{d}, {m}: {c[0]['margins']['groups_left_out']}" for (d, m), c in by_column.items() if c[0]["margins"]
            )
            + ".",
        ),
        ("h2", "Time"),
        ("table", time_table(by_column)),
        ("h2", "Where and how"),
        ("p", ", ".join(f"{k} {v}" for k, v in (where | plan["versions"]).items())),
    ]
    if data["failures"]:
        blocks.append(("p", f"Failed, and not in the tables: {', '.join(data['failures'])}."))
    first = next(iter(data["cells"].values()))["runs"]
    commands = [run["command"] for run in first.values() if run["command"]]
    blocks += [("p", "Commands of the first cell (the others differ in --model, --dataset and --seed):")]
    return [*blocks, ("code", "\n".join(commands))]


def scope(plan: dict[str, Any]) -> str:
    """What a grid of this scale can say about the paper's."""
    if plan["scale"] == "paper":
        return "The paper's models and settings."
    return (
        "These models have a few million parameters, start from random weights and have read nothing but this data. "
        "What holds for any policy (the objective's arithmetic, relative time, whether learned spread follows a "
        "planted one) can be seen in them. How large gains are, and who gains, depends on what a model knows "
        "beforehand: 'holds' and 'does not hold' are about these runs, and decide nothing about models of billions of "
        "parameters."
    )


def evidence_row(e: dict[str, Any]) -> list[str]:
    span = "none" if e["low"] is None else f"{e['low']:.4g} to {e['high']:.4g}"
    stated = f" (stated: {e['stated']:g})" if "stated" in e else ""
    return [e["what"] + stated, f"{e['mean']:.4g}", span, str(e["seeds"])]


def as_markdown(blocks: list[Block]) -> str:
    parts = []
    for kind, content in blocks:
        if kind == "table":
            header, rows = content
            parts.append(evaluate.markdown(header, [[c.replace("|", "\\|") for c in row] for row in rows]))
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0]}.png)\n\n{content[1]} ([SVG]({content[0]}.svg))")
        elif kind == "code":
            parts.append(f"```\n{content}\n```")
        else:
            parts.append("#" * int(kind[1]) + f" {content}" if kind[0] == "h" else content)
    return "\n\n".join(parts) + "\n"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>MixDPO: reproduction</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;
padding:0 1rem;color:#222}}table{{border-collapse:collapse;font-size:.82rem;display:block;overflow-x:auto}}
td,th{{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;vertical-align:top}}th{{background:#f5f5f5}}
img{{max-width:100%}}figcaption{{font-size:.9rem;color:#555}}figure{{margin:1.5rem 0}}pre{{overflow-x:auto;
background:#f5f5f5;padding:1rem;font-size:.8rem}}h3{{font-size:1rem;margin-bottom:0}}</style>{body}</html>
"""


def as_html(blocks: list[Block], folder: Path) -> str:
    """One page that needs nothing beside it: figures are inside, as SVG."""
    parts = []
    for kind, content in blocks:
        if kind == "table":
            header, rows = content
            lines = [("th", header), *(("td", row) for row in rows)]
            cells = ["".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) for tag, row in lines]
            parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        elif kind == "figure":
            image = base64.b64encode((folder / f"{content[0]}.svg").read_bytes()).decode()
            caption = html.escape(content[1])
            source = f"data:image/svg+xml;base64,{image}"
            parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        else:
            tag = "pre" if kind == "code" else kind
            parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
    return PAGE.format(body="\n".join(parts))


def short(report: dict[str, Any]) -> str:
    """The README's version of a report.json: what could be tested there, and the verdicts."""
    plan = report["plan"]
    runs = sum(len(cell["runs"]) for cell in report["cells"].values())
    told = [[s["text"], s["source"], s["verdict"], s["why"]] for s in report["statements"] if s["evidence"]]
    header = ["statement of the paper", "where", "verdict", "because"]
    return (
        f"Scale {plan['scale']}: {', '.join(plan['datasets'])}; {runs} preference runs over {len(plan['seeds'])} "
        f"seeds; {len(report['statements']) - len(told)} more statements need a judge or other data.\n\n"
        f"{evaluate.markdown(header, told)}"
    )


def write(runs: Path, output: Path | None = None) -> Path:
    """The report of the grid in `runs`, beside it in report/ unless told otherwise; returns report.md."""
    output = train.writable_directory("--output-dir", output or runs / "report")
    data = collect(runs)
    found = statements(data)
    # Without indentation it is a third of the size.
    write_text(output / "report.json", json.dumps(data | {"statements": [asdict(s) for s in found]}) + "\n")
    blocks = blocks_of(data, found, draw(data, output, runs))
    write_text(output / "report.md", as_markdown(blocks))
    write_text(output / "report.html", as_html(blocks, output))
    return output / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = train.Parser(prog="report", description=__doc__)
    parser.add_argument("runs", help="the --output-dir of verify.reproduce")
    parser.add_argument("--output-dir", help="default: report/ inside it")
    parser.add_argument("--readme", help="put the short version between the marks in this file")
    try:
        args = parser.parse_args(argv)
        if not Path(args.runs, "plan.json").is_file():
            raise UserError(f"{args.runs} holds no plan.json: pass the --output-dir of verify.reproduce")
        written = write(Path(args.runs), Path(args.output_dir) if args.output_dir else None)
        if args.readme:
            from verify import __main__ as checks  # here, as it sets a style for figures of its own

            try:
                text = short(read_json(written.with_name("report.json")))
                checks.into_readme(text, Path(args.readme), BEGIN, END)
            except checks.UserError as e:
                raise UserError(str(e)) from e
        print(written)
    except UserError as e:
        return train.report_error("report", e, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
