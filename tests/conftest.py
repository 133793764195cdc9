"""One small run that many tests look at, and how to start another."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evaluate
import train
from verify import reproduce

ROOT = Path(__file__).parent.parent
# The last batch has 5 pairs: of two ranks, one has nothing to do for one of them.
SMALL = ["--preset", "tiny", "--max-pairs", "101", "--eval-pairs", "33", "--batch-size", "32", "--eval-every", "64"]
# The warm-up matters: at update 1 delta_r is rounding noise, and RMSprop would make a whole step of it.
SMALL += ["--sft-epochs", "1", "--warmup", "5", "--beta-lr", "3e-4", "--micro-batch-tokens", "2048"]


def run_command(*command: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", *(launcher if processes > 1 else []), *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def one_process(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "gamma"
    done = run_command("train.py", *SMALL, "--dist", "gamma", "--output-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.startswith("Gamma(concentration=2, rate=16.7) learned at lr 0.0003; tiny (llama, ")
    return run


def in_process(command: list[str], log: Path) -> int:
    """As reproduce.start, without the seconds that a new process takes."""
    program = {"train.py": train.main, "evaluate.py": evaluate.main}[command[0]]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = program(command[1:])
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        f.write(text.getvalue())
    return status


@pytest.fixture(scope="module")
def small_grid() -> Iterator[None]:
    """Three configurations, few pairs, for the tiny scale two data sets, so that a grid takes seconds."""
    flags = "--preset tiny --max-pairs 64 --eval-pairs 8 --batch-size 32 --eval-every 32 --sft-epochs 1".split()
    flags += "--max-length 96 --micro-batch-tokens 2048 --warmup 2".split()
    patch = pytest.MonkeyPatch()
    for name in set(reproduce.CONFIGURATIONS) - {"dpo", "dpo-matched", "gamma-1e-4"}:
        patch.delitem(reproduce.CONFIGURATIONS, name)
    patch.setitem(reproduce.SCALES, "tiny", reproduce.Scale(["tiny"], ["demo-0", "demo-1.5"], flags, "for tests"))
    patch.setitem(reproduce.SCALES, "paper", reproduce.SCALES["paper"]._replace(flags=flags))
    patch.setattr(reproduce, "HELD_OUT", 48)
    yield
    patch.undo()
