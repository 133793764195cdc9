"""The paper's experiments as one command: plans the grid, runs it, writes the report.

    nox -s reproduce -- --scale tiny
    nox -s reproduce -- --model EleutherAI/pythia-2.8b --dataset hh prism --seeds 3 --judge-url URL --judge-model NAME

For every model, data set and seed: one SFT run and one reference pass, shared by the nine configurations of Table 2 and
DPO at the mean of the mixtures; then margins, and win rates when there is a judge. Everything goes through the public
commands of train.py and evaluate.py, whose output is in logs/. The same command goes on where it was stopped: what is
finished is not run again, what is unfinished or failed is. A run that fails does not stop the others.
Exit status: 0, 1 if a run failed, 2 for a mistake in what was asked for, 75 if interrupted.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import evaluate
import train
from train import UserError, differences, file_hash, read_json, write_json

ROOT = Path(__file__).parent.parent
INTERRUPTED = 75
HELD_OUT = 425  # test pairs and prompts, as in the paper; all there are where there are fewer

# The fixed distributions of the paper have a mean of 0.12, not DPO's 0.1: hence the second DPO.
MATCHED_BETA = "0.12"
CONFIGURATIONS: dict[str, list[str]] = {
    "dpo": ["--dist", "dpo", "--beta", "0.1"],
    "dpo-matched": ["--dist", "dpo", "--beta", MATCHED_BETA],
} | {
    f"{dist}-{name}": ["--dist", dist, "--beta-lr", lr]
    for dist in ("lognormal", "gamma")
    for name, lr in (("fixed", "0"), ("1e-5", "1e-5"), ("1e-4", "1e-4"), ("1e-3", "1e-3"))
}


class Scale(NamedTuple):
    models: list[str]
    datasets: list[str]
    flags: list[str]  # of train.py
    about: str


SCALES = {
    "tiny": Scale(
        ["tiny"],
        ["demo-0", "demo-0.5", "demo-1.5"],
        ["--preset", "tiny", "--eval-pairs", "200"],
        "0.9 M parameters, random weights, choices drawn with a known heterogeneity (demo-H: cv = H)",
    ),
    "small": Scale(
        ["llama", "gpt_neox"],
        ["hh", "prism", "community-alignment"],
        "--policy-dtype float32 --max-pairs 2560 --sft-lr 1e-3 --lr 1e-4 --warmup 5 --eval-every 1280".split(),
        "2 to 3 M parameters, random weights, trained on the text of the data set alone",
    ),
    "paper": Scale(
        ["EleutherAI/pythia-2.8b", "meta-llama/Llama-3.2-1B"],
        ["hh", "prism", "community-alignment"],
        [],
        "the paper's models and settings",
    ),
}
ARCHITECTURES = ("llama", "gpt_neox")  # made by verify.small_model
REPOSITORIES = {"hh": "hh-rlhf", "prism": "prism-alignment", "community-alignment": "community-alignment-dataset"}


def slug(name: str) -> str:
    """demo-0.5 stays, a file or a hub id loses its folder."""
    return Path(name).stem if Path(name).suffix in (".jsonl", ".csv", ".parquet") else Path(name).name


@dataclass(frozen=True)
class Cell:
    """What shares an SFT checkpoint and a reference pass: a model, a data set and a seed."""

    model: str
    dataset: str
    seed: int

    @property
    def pair(self) -> str:
        return f"{slug(self.dataset)}--{slug(self.model)}"

    @property
    def name(self) -> str:
        return f"{self.pair}--seed{self.seed}"


def data_flags(dataset: str, data_dir: str) -> list[str]:
    if demo := re.fullmatch(r"demo-([0-9.]+)", dataset):
        return ["--dataset", "demo", "--demo-heterogeneity", demo[1]]
    if data_dir and dataset in REPOSITORIES:
        return ["--dataset", dataset, "--data-dir", str(Path(data_dir, REPOSITORIES[dataset]))]
    return ["--dataset", dataset]


def train_flags(cell: Cell, scale: Scale, output: Path, data_dir: str) -> list[str]:
    """The flags that all configurations of a cell share, where it keeps its runs excepted."""
    model = cell.model
    if model in ARCHITECTURES:
        model = str(output / "models" / cell.pair)
    data = data_flags(cell.dataset, data_dir)
    return [*scale.flags, "--model", model, *data, "--seed", str(cell.seed), "--keep", "1"]


def shared_files(folder: Path) -> list[str]:
    return ["--sft-dir", str(folder / "sft"), "--reference-cache", str(folder / "reference.safetensors")]


# --- processes -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal came, and what was running has saved its state."""


Launch = Callable[[list[str], Path], int]
children: list[subprocess.Popen] = []
stopped: list[int] = []  # signals that came


def command_line(command: list[str]) -> list[str]:
    """train.py or evaluate.py with their flags, on all local devices."""
    devices = torch.cuda.device_count()
    if devices < 2 or command[0] == "-m" or command[1:2] in (["judge"], ["winrate"], ["figures"]):
        return [sys.executable, *command]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(devices)]
    return [sys.executable, *launcher, *command]


def start(command: list[str], log: Path) -> int:
    """Runs it to its end, its output appended to the log; a signal reaches it once, so that it saves its state."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as f:
        f.write(f"$ {shlex.join(command)}\n".encode())
        f.flush()
        # A session of its own: the terminal's interrupt would come on top of ours, and a second one stops at once.
        with subprocess.Popen(command_line(command), cwd=ROOT, stdout=f, stderr=f, start_new_session=True) as child:
            children[:] = [child]
            status = child.wait()
            children.clear()
    return status


@contextmanager
def signals_passed_on() -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        stopped.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)

    stopped.clear()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


# --- the plan --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the runs of one grid have to share."""
    files = {name: file_hash(ROOT / name)[:16] for name in ("mixdpo.py", "train.py")}
    return files | {"torch": torch.__version__, "transformers": transformers.__version__}


def measure(cell: Cell, scale: Scale, output: Path, data_dir: str, launch: Launch) -> dict[str, Any]:
    """A run of four updates: seconds a pair, seconds to start, bytes a policy, and how much there is to do."""
    shared = train_flags(cell, scale, output, data_dir)
    config = train.parse_config([*shared, "--output-dir", "unused"])
    folder = output / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    run, log = folder / "gamma", output / "logs" / f"trial--{cell.pair}.log"
    flags = [*CONFIGURATIONS["gamma-1e-4"], *shared, *shared_files(folder), "--output-dir", str(run)]
    # Four updates each of SFT and of preference training; later flags win.
    count = 4 * config.batch_size
    flags += ["--max-pairs", str(count), "--eval-pairs", "32", "--epochs", "1", "--sft-epochs", "1"]
    began = time.monotonic()
    if status := launch(["train.py", *flags], log):
        if stopped:
            raise Stopped
        message = last_line(log).removeprefix("train.py: error: ")
        raise UserError(f"the trial of {cell.pair} ended with status {status}: {message} (whole output: {log})")
    wall = time.monotonic() - began
    speeds = [line["train/examples_per_second"] for line in lines_of(run) if "train/examples_per_second" in line]
    data = read_json(run / "data.json")
    pairs = min(config.max_pairs, data["rows"]["train"])
    updates = config.epochs * -(-pairs // config.batch_size)
    evaluations = 1 + updates * config.batch_size // config.eval_every
    each = 1 / max(speeds)  # the first updates warm up
    size = sum(p.stat().st_size for p in (run / "policy").iterdir())
    shutil.rmtree(folder)
    return {
        "pairs": pairs,
        "updates": updates,
        "start_seconds": max(1.0, wall - 2 * count * each),
        # A forward pass is about a third of an update.
        "sft_seconds": config.sft_epochs * pairs * each + pairs * each / 3,
        "run_seconds": config.epochs * pairs * each + evaluations * config.eval_pairs * each / 3,
        "policy_bytes": size,
    }


def lines_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


def estimates(plan: dict[str, Any]) -> dict[str, float]:
    """Seconds and bytes of the whole grid, from the trials."""
    runs = len(CONFIGURATIONS)
    seconds = size = 0.0
    for trial in plan["trials"].values():
        seconds += trial["sft_seconds"] + runs * (trial["start_seconds"] + trial["run_seconds"])
        seconds += trial["start_seconds"] * (1 + runs / 4)  # margins
        size += (runs + 1) * trial["policy_bytes"]
    # Of an unfinished run: two checkpoints of weights and RMSprop's averages.
    largest = max(trial["policy_bytes"] for trial in plan["trials"].values())
    return {"seconds": seconds * len(plan["seeds"]), "bytes": size * len(plan["seeds"]) + 4 * largest}


def describe(plan: dict[str, Any], seeds: list[int]) -> str:
    """The plan as it is printed before anything long begins."""
    rows = [("data set, model", "pairs", "updates", "a run", "SFT and reference", "disk, a seed")]
    for name, trial in plan["trials"].items():
        disk = (len(CONFIGURATIONS) + 1) * trial["policy_bytes"] / 1e9
        run = duration(trial["start_seconds"] + trial["run_seconds"])
        numbers = (
            f"{trial['pairs']:,}",
            f"{trial['updates']:,}",
            run,
            duration(trial["sft_seconds"]),
            f"{disk:.2f} GB",
        )
        rows.append((name, *numbers))
    total = estimates(plan)
    runs = len(plan["trials"]) * len(seeds) * len(CONFIGURATIONS)
    return (
        f"{evaluate.columns_of(rows)}\n{runs} runs ({len(CONFIGURATIONS)} configurations, {len(seeds)} seeds) and "
        f"{len(plan['trials']) * len(seeds)} SFT runs; about {duration(total['seconds'])} without win rates; disk "
        f"{total['bytes'] / 1e9:.2f} GB"
    )


def make_plan(args: argparse.Namespace, scale: Scale, output: Path, launch: Launch) -> dict[str, Any]:
    """The saved plan, or a new one with its trials; refuses a directory that holds another grid."""
    cells = [Cell(model, dataset, args.seed) for dataset in args.dataset for model in args.model]
    grid = {"scale": args.scale, "models": args.model, "datasets": args.dataset, "flags": scale.flags}
    grid |= {"configurations": CONFIGURATIONS, "seeds": [args.seed + k for k in range(args.seeds)]}
    grid |= {"data_dir": args.data_dir, "versions": versions()}
    path, plan = output / "plan.json", grid | {"trials": {}}
    if path.exists():
        found = read_json(path)
        # More seeds may follow; all else has to be the same, or the runs could not stand in one table.
        known = {k: v for k, v in found.items() if k not in ("trials", "seeds")}
        mine = {k: v for k, v in grid.items() if k != "seeds"}
        if known == mine:
            plan = found | {"seeds": sorted({*found["seeds"], *grid["seeds"]})}
        elif (output / "runs.jsonl").exists():
            raise UserError(
                f"--output-dir {output} holds another grid ({differences(known, mine)}): finish it with what it was "
                "made with, or choose another directory; nothing was changed"
            )
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"--output-dir {output} is not empty and holds no plan.json: choose another directory")
    train.writable_directory("--output-dir", output)
    write_json(path, plan)
    for cell in cells:
        if cell.pair not in plan["trials"]:
            make_model(cell, output, args.data_dir, launch)
            print(f"trial: {cell.pair}", flush=True)
            plan["trials"][cell.pair] = measure(cell, scale, output, args.data_dir, launch)
            write_json(path, plan)
    return plan


def make_model(cell: Cell, output: Path, data_dir: str, launch: Launch) -> None:
    """The random-weight model of an architecture, and a tokenizer of the data set's training text."""
    path = output / "models" / cell.pair
    if cell.model not in ARCHITECTURES or (path / "tokenizer_config.json").exists():  # which is written last
        return
    command = ["-m", "verify.small_model", "--architecture", cell.model, "--output", str(path)]
    log = output / "logs" / f"model--{path.name}.log"
    if launch([*command, *data_flags(cell.dataset, data_dir)], log):
        if stopped:
            raise Stopped
        raise UserError(f"no model for {cell.dataset}: {last_line(log).removeprefix('small_model: error: ')}")


def probe_judge(args: argparse.Namespace) -> None:
    """One judgement, before anything is trained."""
    if not args.judge_model:
        raise UserError("--judge-url needs --judge-model: the judge's name there")
    server = evaluate.connect("--judge-url", args.judge_url, args.judge_model, args.key_env)
    texts = {"instruction": "Which is larger?", "first": "two", "second": "one"}
    try:
        with contextlib.closing(server.client):
            found = evaluate.judge_once(server, evaluate.fill(evaluate.TEMPLATE, texts))
    except evaluate.Lost as e:
        raise UserError(
            f"--judge-url {args.judge_url} does not judge ({e}): start it, or leave the flag out; nothing was trained"
        ) from e
    print(f"judge: {args.judge_model} answers ({found['kind']})", flush=True)


# --- the runs --------------------------------------------------------------------------------------------------------


def finished(run: Path) -> bool:
    return (run / "strength.json").exists()


def counts(cell: Cell, folder: Path) -> tuple[int, int]:
    """Test pairs and test conversations, at most HELD_OUT of each."""
    run = next(folder / name for name in CONFIGURATIONS if finished(folder / name))
    config = evaluate.run_config(run / "policy")
    data = (config.dataset, "test", config.data_dir)
    rows = train.load_preferences(*data, seed=config.seed, **train.data_options(config))
    pairs, _ = train.tokenize(
        rows, train.load_tokenizer(str(run / "policy")), config.max_length, config.max_prompt_length
    )
    names = zip(rows["conversation"], rows["prompt"], strict=True)
    return min(HELD_OUT, len(pairs)), min(HELD_OUT, len({conversation or prompt for conversation, prompt in names}))


def margins_command(cell: Cell, folder: Path) -> list[str]:
    """Margins of all finished runs and of the SFT model; gains over DPO where it is finished."""
    done = [name for name in CONFIGURATIONS if finished(folder / name)]
    policies = [str(folder / name / "policy") for name in done if name != "dpo"] + [str(folder / "sft")]
    if policies[0].endswith("sft"):  # the first one names the data, which the SFT directory does not
        policies = [str(folder / "dpo" / "policy"), *policies]
    baseline = ["--baseline", str(folder / "dpo" / "policy")] if "dpo" in done and len(done) > 1 else []
    pairs = ["--pairs", str(counts(cell, folder)[0])]
    return ["evaluate.py", "margins", "--policy", *policies, *baseline, *pairs, "--output-dir", str(folder / "margins")]


def margins_fit(folder: Path) -> bool:
    """Whether margins.json covers all runs that are finished."""
    path = folder / "margins" / "margins.json"
    done = {str(folder / name / "policy") for name in CONFIGURATIONS if finished(folder / name)}
    return path.exists() and done <= set(read_json(path)["policies"].values())


def win_rate_commands(cell: Cell, folder: Path, args: argparse.Namespace) -> list[list[str]]:
    done = [name for name in CONFIGURATIONS if finished(folder / name)]
    answers, judged = folder / "answers", folder / "judgements"
    policies = [str(folder / name / "policy") for name in done]
    prompts = ["--prompts", str(counts(cell, folder)[1])]
    base = answers / f"{evaluate.policy_name(folder / 'sft')}.jsonl"
    judge = ["--judge-url", args.judge_url, "--judge-model", args.judge_model, "--key-env", args.key_env]
    files = [str(answers / f"{name}.jsonl") for name in done]
    every = [str(judged / f"{name}-vs-{base.stem}.json") for name in done]
    return [
        ["evaluate.py", "generate", "--policy", *policies, str(folder / "sft"), *prompts, "--output-dir", str(answers)],
        ["evaluate.py", "judge", "--policy", *files, "--baseline", str(base), *judge, "--output-dir", str(judged)],
        ["evaluate.py", "winrate", "--judgements", *every, "--output-dir", str(judged)],
    ]


class Progress:
    """Runs commands, one line each; keeps what happened in runs.jsonl."""

    def __init__(self, output: Path, total: int, launch: Launch) -> None:
        self.output, self.total, self.launch = output, total, launch
        self.done = 0
        self.failures: list[str] = []

    def run(self, name: str, commands: Sequence[list[str]], result: Callable[[], str]) -> bool:
        """Whether they all ended with status 0; the first that does not ends the sequence."""
        self.done += 1
        log = self.output / "logs" / f"{name.replace('/', '--')}.log"
        began, status = time.time(), 0
        for command in commands:
            if status := self.launch(command, log):
                break
        if stopped:
            raise Stopped
        seconds = time.time() - began
        record = {"name": name, "commands": commands, "began": round(began), "seconds": seconds, "status": status}
        with evaluate.appending(self.output / "runs.jsonl") as append:
            append(record)
        text = f"failed with status {status}: {last_line(log)} ({log})" if status else result()
        print(f"[{self.done:>3}/{self.total}] {name}: {duration(seconds)}, {text}", flush=True)
        if status:
            self.failures.append(name)
        return not status


def run_result(run: Path) -> str:
    found = [line for line in lines_of(run) if "eval/loss" in line][-1]
    return (
        f"held-out loss {found['eval/loss']:.4f}, accuracy {found['eval/rewards/accuracies']:.3f}, "
        f"beta mean {found['beta/mean']:.4f}, cv {found['beta/cv']:.4f}"
    )


def run_grid(plan: dict[str, Any], scale: Scale, args: argparse.Namespace, output: Path, launch: Launch) -> list[str]:
    """Runs what is not finished; returns the names of what failed."""
    seeds = [args.seed + k for k in range(args.seeds)]
    cells = [Cell(model, dataset, seed) for seed in seeds for dataset in args.dataset for model in args.model]
    each = len(CONFIGURATIONS) + 1 + bool(args.judge_url)
    progress = Progress(output, each * len(cells), launch)
    for cell in cells:
        folder = output / cell.name
        flags = [*train_flags(cell, scale, output, args.data_dir), *shared_files(folder)]
        for name, configuration in CONFIGURATIONS.items():
            run = folder / name
            if finished(run):
                progress.done += 1
            else:
                command = ["train.py", *configuration, *flags, "--output-dir", str(run)]
                progress.run(f"{cell.name}/{name}", [command], functools.partial(run_result, run))
            if finished(run):
                shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the policy is exported
        if not any(finished(folder / name) for name in CONFIGURATIONS):
            progress.failures.append(f"{cell.name}/margins (no run is finished)")
            progress.done += 1 + bool(args.judge_url)
            continue
        if margins_fit(folder):
            progress.done += 1
        else:
            progress.run(f"{cell.name}/margins", [margins_command(cell, folder)], lambda: "margins.json")
        if args.judge_url:
            # Answers and judgements that are there are not asked for again.
            progress.run(f"{cell.name}/win-rates", win_rate_commands(cell, folder, args), lambda: "winrate.json")
    return progress.failures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = train.Parser(prog="reproduce", description=__doc__)
    parser.add_argument("--scale", choices=list(SCALES), default="tiny", help="default: tiny")
    parser.add_argument("--model", nargs="+", action="extend", help=f"hub ids, directories, tiny, or {ARCHITECTURES}")
    parser.add_argument("--dataset", nargs="+", action="extend", help=f"{', '.join(REPOSITORIES)}, demo-H, or files")
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("MIXDPO_DATA", ""),
        help=f"folder with local copies, {', '.join(REPOSITORIES.values())} (default: MIXDPO_DATA, or a download)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--judge-url", default="", metavar="URL", help="OpenAI-compatible server, for win rates")
    parser.add_argument("--judge-model", default="", metavar="NAME", help="its name there")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--output-dir", default="", help="default: runs/reproduce-SCALE")
    parser.add_argument("--plan-only", action="store_true", help="print the plan, and stop")
    args = parser.parse_args(argv)
    args.model = args.model or SCALES[args.scale].models
    args.dataset = args.dataset or SCALES[args.scale].datasets
    args.output_dir = args.output_dir or f"runs/reproduce-{args.scale}"
    if args.seeds < 1 or args.seed < 0:
        raise UserError(f"--seeds must be at least 1 and --seed at least 0, got {args.seeds} and {args.seed}")
    for name in ("model", "dataset"):
        if len({slug(value) for value in getattr(args, name)}) < len(getattr(args, name)):
            raise UserError(f"--{name} {' '.join(getattr(args, name))}: two of one name: rename one")
    for dataset in args.dataset:
        known = (*REPOSITORIES, "demo")
        if dataset not in known and not re.fullmatch(r"demo-\d+(\.\d+)?", dataset) and not Path(dataset).is_file():
            raise UserError(f"--dataset {dataset} is unknown: one of {', '.join(known)}, demo-0.5, or a file")
    return args


def main(argv: Sequence[str] | None = None, launch: Launch = start) -> int:
    from verify import report  # which reads what this module describes

    try:
        args = parse(argv)
        train.quiet_libraries()
        output, scale = Path(args.output_dir), SCALES[args.scale]
        for model in args.model:
            if model not in ARCHITECTURES:
                train.locate_model(model)
        if args.judge_url:
            probe_judge(args)
        with signals_passed_on():
            try:
                plan = make_plan(args, scale, output, launch)
                print(describe(plan, plan["seeds"]), flush=True)
                room, need = shutil.disk_usage(output).free, estimates(plan)["bytes"]
                have = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
                if need - have > room:
                    raise UserError(
                        f"--output-dir {output} has {room / 1e9:.2f} GB free, the plan needs {(need - have) / 1e9:.2f} "
                        "GB more: make room, choose another directory, or ask for less"
                    )
                if args.plan_only:
                    return 0
                failures = run_grid(plan, scale, args, output, launch)
            except Stopped:
                print("reproduce: interrupted and saved: the same command goes on", file=sys.stderr)
                return INTERRUPTED
        print(f"report: {report.write(output)}", flush=True)
    except UserError as e:
        return train.report_error("reproduce", e, argv)
    if failures:
        print(f"reproduce: failed, and run again by the same command: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
