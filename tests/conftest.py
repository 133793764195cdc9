"""One small run that many tests look at, and how to start another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
