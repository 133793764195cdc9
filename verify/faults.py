"""python -m verify.faults [--kills 30] [--updates 20000]: runs that are killed, damaged and long.

Kills: a run of the demo (SFT, reference pass, 8 updates with a checkpoint after each, export) gets SIGKILL at a random
moment, or when a file of a stage appears, and is started again until it ends; its policy, strength and metrics have to
be those of the undisturbed run, bit for bit. Soak: two ranks, many updates of a tiny model with checkpoints, memory and
open files of both read every few seconds. Cost: the demo with a checkpoint after every update, every eight, and one at
the end, in turn. Every other fault is caused by the repository's tests (tests/test_resume.py, tests/test_faults.py),
which are run for the table. Results: verify/results/faults.json and faults.md; --only replaces one part of them.
Exit status: 0, or 1 if a run did not end as the undisturbed one or a test failed.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from verify.__main__ import RESULTS, write

RUN = (
    "--preset tiny --dist gamma --max-pairs 101 --eval-pairs 33 --batch-size 32 --eval-every 64 --sft-epochs 1 "
    "--epochs 2 --save-every 32"
).split()
# Where a kill hits: at once when a file of this name appears, or at a random moment of the run.
STAGES = {
    "while a checkpoint is written": "checkpoints/step-*.tmp",
    "in the reference pass": "reference.safetensors.part/train-*",
    "in the export": "policy.tmp",
    "in SFT": "sft.part/step-*.tmp",
}


def start(*flags: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def result_of(run: Path) -> tuple[Any, ...]:
    """All that has to be equal: the speed of an update is not."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line.pop("train/examples_per_second", None)
    weights = load_file(run / "policy" / "model.safetensors")
    return lines, (run / "strength.json").read_bytes(), {n: w.numpy().tobytes() for n, w in weights.items()}


def kill_until_done(run: Path, stage: str, pattern: str | None, kills: int, seconds: float, rng: random.Random) -> int:
    """Kills the run up to `kills` times in this stage, and lets it end; returns how often it was killed."""
    done = 0
    while not (run / "strength.json").exists():  # else it was killed after its end
        seen = set(run.glob(pattern)) if pattern else set()
        process, began, moment = start(*RUN, "--output-dir", str(run)), time.monotonic(), rng.uniform(1, seconds)
        while process.poll() is None:
            hit = set(run.glob(pattern)) - seen if pattern else time.monotonic() - began > moment
            if hit and done < kills:
                time.sleep(rng.uniform(0, 0.02) if pattern else 0)
                process.kill()
                done += process.wait() < 0
                break
            time.sleep(0.001)
        _, said = process.communicate()
        if process.returncode > 0:
            raise SystemExit(f"{stage}: a run ended by itself: {said}")
    return done


def measure_kills(kills: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = start(*RUN, "--output-dir", f"{folder}/whole")
        if process.wait():
            raise SystemExit(process.communicate()[1])
        seconds = time.monotonic() - began
        whole, rng = result_of(Path(folder, "whole")), random.Random(0)
        stages: dict[str, str | None] = {"at a random moment": None} | STAGES
        for stage, pattern in stages.items():
            wanted = kills // 2 if pattern is None else math.ceil(kills / 2 / len(STAGES))
            row = {"fault": f"SIGKILL {stage}", "injections": 0, "runs": 0, "equal": 0}
            while row["injections"] < wanted:
                run = Path(folder, f"run{len(rows)}-{row['runs']}")
                row["injections"] += kill_until_done(
                    run, stage, pattern, min(3, wanted - row["injections"]), seconds, rng
                )
                row["runs"] += 1
                row["equal"] += result_of(run) == whole
            rows.append(row)
            print(row, flush=True)
    return rows


def measure_tests() -> dict[str, dict[str, Any]]:
    """Of each test: its cases, how many passed or were skipped, and a message that it saw."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = ["tests/test_faults.py", "tests/test_resume.py"]
        # xunit2, the default, has no place for what a test records.
        flags = ["-q", "--show-capture=no", "-o", "junit_family=legacy", f"--junit-xml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *flags, *tests])
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.attrib["name"].split("[")[0].removeprefix("test_").replace("_", " ")
            row = rows.setdefault(name, {"cases": 0, "passed": 0, "skipped": 0, "message": ""})
            row["cases"] += 1
            row["skipped"] += (skipped := case.find("skipped") is not None)
            row["passed"] += not skipped and case.find("failure") is None and case.find("error") is None
            for entry in case.iter("property"):
                row["message"] = row["message"] or entry.attrib["value"]
    return rows


def measure_cost(repeats: int = 5) -> list[dict[str, Any]]:
    """Seconds of the training loop and, within it, of handing the state over, for checkpoints of several distances."""
    rows = [{"updates_between": n, "updates": 0, "seconds": [], "handing_over": []} for n in (1, 8, 10**6)]
    spent = {"train": 0.0, "save": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - began

        return run

    loop, save = train.train, train.Checkpoints.save
    train.train, train.Checkpoints.save = timed("train", loop), timed("save", save)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            shared = ["--sft-dir", f"{folder}/sft", "--reference-cache", f"{folder}/reference.safetensors"]
            for repeat in range(repeats + 1):  # the first makes what is shared
                for row in rows:
                    run = f"{folder}/{repeat}-{row['updates_between']}"
                    spent |= {"train": 0.0, "save": 0.0}
                    flags = ["--preset", "tiny", "--max-pairs", "1024", "--eval-every", str(10**6), "--output-dir", run]
                    if train.main([*flags, *shared, "--save-every", str(64 * row["updates_between"])]):
                        raise SystemExit("cost: a run did not end well")
                    row["updates"] = 16
                    if repeat:
                        row["seconds"].append(spent["train"])
                        row["handing_over"].append(spent["save"])
    finally:
        train.train, train.Checkpoints.save = loop, save  # type: ignore[method-assign]
    return rows


def usage(process: int) -> tuple[float, int]:
    """(MiB resident, open files)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{process}/fd"))


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the least-squares line, and two standard errors from the means of 20 blocks (samples are correlated)."""
    blocks = np.array_split(np.arange(len(x)), 20)
    x, y = (np.array([values[b].mean() for b in blocks]) for values in (x, y))
    (gradient, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(gradient), 2 * float(np.sqrt(covariance[0, 0]))


def soak(updates: int) -> dict[str, Any]:
    """Two ranks, checkpoints every 1,000 updates. train.py itself compares the ranks' strengths at each of them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = train.byte_tokenizer()
        shape = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        flags = ["--preset", "tiny", "--model", f"{folder}/model", "--dist", "gamma", "--batch-size", "2"]
        flags += ["--sft-epochs", "0"]
        flags += ["--eval-batch-size", "2", "--eval-pairs", "20", "--eval-every", "4000", "--save-every", "2000"]
        flags += ["--max-pairs", "2000", "--epochs", str(updates // 1000), "--lr", "1e-5", "--beta-lr", "1e-5"]
        process = start(*flags, "--output-dir", f"{folder}/run", ranks=2)
        metrics = Path(folder, "run", "metrics.jsonl")
        samples: list[tuple[float, ...]] = []
        while process.poll() is None:
            time.sleep(2)
            try:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                with open(metrics, "rb") as f:
                    f.seek(max(0, f.seek(0, os.SEEK_END) - 2000))
                    step = json.loads(f.read().splitlines()[-2])["step"]
                each = [usage(int(child)) for child in children]
            except (OSError, IndexError, ValueError, KeyError):
                continue  # not there yet, or gone
            if len(each) == 2 and step > updates // 10:  # by then everything has been allocated once
                samples.append((step, *each[0], *each[1]))
        if process.returncode:
            raise SystemExit(process.communicate()[1])
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "train/loss" in line]
        table = np.array(samples)
        memory = [slope(table[:, 0], table[:, c]) for c in (1, 3)]
        return {
            "updates": steps[-1],
            "steps_once_and_in_order": steps == list(range(1, steps[-1] + 1)),
            "samples": len(samples),
            "resident_mib": [float(table[:, c].mean()) for c in (1, 3)],
            "mib_per_1000_updates": [[1000 * value for value in pair] for pair in memory],
            "open_files": [[int(table[:, c].min()), int(table[:, c].max())] for c in (2, 4)],
        }


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Runs that are killed, damaged and long", "", "Written by `nox -s faults`; do not edit.", ""]
    if "kills" in result:
        lines += ["| fault | injections | runs | ended bit for bit as undisturbed |", "|---|---|---|---|"]
        lines += [f"| {r['fault']} | {r['injections']} | {r['runs']} | {r['equal']} |" for r in result["kills"]]
    if "tests" in result:
        lines += [
            "",
            "Faults that the tests cause. Where a run can go on, a case passes only if it then ends bit for bit",
        ]
        lines[-1] += " as an undisturbed one, with every line of metrics.jsonl:"
        lines += ["", "| test | cases | passed | skipped | message |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {r['cases']} | {r['passed']} | {r['skipped']} | {r['message'].replace('|', '/')} |"
            for name, r in result["tests"].items()
        ]
    if "cost" in result:
        none = result["cost"][-1]["seconds"]
        lines += [
            "",
            "Time of the demo's training loop (0.9 M parameters, CPU), by updates between checkpoints; medians:",
            "",
        ]
        lines += ["| updates between | seconds an update | ratio to one at the end, in turn | of it, handing over |"]
        lines += ["|---|---|---|---|"]
        for row in result["cost"]:
            each, handing = (statistics.median(row[name]) / row["updates"] for name in ("seconds", "handing_over"))
            ratios = [a / b for a, b in zip(row["seconds"], none, strict=True)]
            name = "one at the end" if row["updates_between"] > row["updates"] else row["updates_between"]
            shown = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {name} | {each:.3f} | {shown} | {handing:.4f} |")
    if "soak" in result:
        s = result["soak"]
        lines += ["", f"Soak: two ranks, {s['updates']:,} updates, every one logged once and in order: "
                  f"{'yes' if s['steps_once_and_in_order'] else 'no'}."]  # fmt: skip
        for rank in (0, 1):
            value, error = s["mib_per_1000_updates"][rank]
            low, high = s["open_files"][rank]
            lines.append(
                f"Rank {rank}: {s['resident_mib'][rank]:.0f} MiB, {value:+.3f} ± {error:.3f} MiB per 1,000 updates "
                f"(two standard errors), {low} to {high} open files."
            )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m verify.faults", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--only", choices=["kills", "tests", "cost", "soak"])
    args = parser.parse_args()
    train.quiet_libraries()
    parts: dict[str, Callable[[], Any]] = {
        "kills": lambda: measure_kills(args.kills),
        "tests": measure_tests,
        "cost": measure_cost,
        "soak": lambda: soak(args.updates),
    }
    path = RESULTS / "faults.json"
    for name in [args.only] if args.only else parts:
        part = {name: parts[name]()}
        result = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | part
        write(path, json.dumps(result, indent=1) + "\n")
        write(RESULTS / "faults.md", markdown(result))
    print(markdown(result))
    lost = any(row["equal"] < row["runs"] for row in result.get("kills", []))
    return int(lost or any(row["passed"] + row["skipped"] < row["cases"] for row in result.get("tests", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
