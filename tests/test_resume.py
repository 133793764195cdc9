"""Interrupted runs end bit for bit where an uninterrupted one does; what is damaged is never taken for whole."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.conftest import ROOT, SMALL, metrics, run_command

FLAGS = [*SMALL, "--dist", "gamma", "--epochs", "2", "--save-every", "32"]  # 8 updates, a checkpoint after each


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*FLAGS, "--output-dir", str(run)]) == 0
    return run


def shared(whole: Path) -> list[str]:
    return ["--sft-dir", str(whole / "sft"), "--reference-cache", str(whole / "reference.safetensors")]


@pytest.fixture(scope="session")
def two_ranks(whole, tmp_path_factory) -> Path:
    """The uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    done = run_command("train.py", *FLAGS, *shared(whole), "--output-dir", str(run), processes=2)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, strength and metrics, bit for bit; only the speed may differ."""
    for name, weight in load_file(whole / "policy" / "model.safetensors").items():
        assert torch.equal(weight, load_file(run / "policy" / "model.safetensors")[name]), name
    assert (run / "strength.json").read_bytes() == (whole / "strength.json").read_bytes()
    speed = "train/examples_per_second"
    assert [{k: v for k, v in m.items() if k != speed} for m in metrics(run)] == [
        {k: v for k, v in m.items() if k != speed} for m in metrics(whole)
    ]


class Stop(BaseException):
    """As sudden as a kill, within the process."""


def interrupted_run(run: Path, whole: Path, monkeypatch, updates: int) -> None:
    """A run that dies in update `updates` + 1, with a checkpoint after each."""
    original = train.clip_policy
    calls = iter(range(1, 99))

    def die(*args):
        if next(calls) > updates:
            raise Stop
        return original(*args)

    monkeypatch.setattr(train, "clip_policy", die)
    with pytest.raises(Stop):
        train.main([*FLAGS, *shared(whole), "--output-dir", str(run)])
    monkeypatch.setattr(train, "clip_policy", original)


def test_a_run_goes_on_where_it_stopped(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    interrupted_run(run, whole, monkeypatch, 5)
    assert len(list((run / "checkpoints").glob("step-*"))) <= 3  # two kept, and perhaps one half written
    # Half a line, as a kill leaves it: it lies behind the checkpoint and is cut off.
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "exam')
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert "goes on after update " in capsys.readouterr().out
    assert_same_end(run, whole)


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "truncated": truncate,
    "a bit flipped": flip_a_bit,
    "a shard missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a digit of the manifest changed": lambda folder: change(
        folder / "manifest.json", '"examples": 1', '"examples": 2'
    ),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"key": {'),
}


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupted_run(run, whole, monkeypatch, 4)
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, stopped, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    *_, newest = sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))
    DAMAGE[damage](newest)
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert f"checkpoint {newest} is not whole" in capsys.readouterr().out
    assert_same_end(run, whole)


def test_with_no_whole_checkpoint_it_starts_again(stopped, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink(missing_ok=True)
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert "goes on" not in capsys.readouterr().out
    assert_same_end(run, whole)


def test_what_changed_is_refused(stopped, whole, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    same = [*shared(whole), "--output-dir", str(run)]
    assert train.main([*FLAGS, *same, "--no-resume"]) == 2
    assert "unfinished: leave out --no-resume" in capsys.readouterr().err
    assert train.main([*FLAGS, *same, "--lr", "1e-3"]) == 2
    assert "lr 0.0001 there, 0.001 here" in capsys.readouterr().err
    version = train.np.__version__
    monkeypatch.setattr(train.np, "__version__", "9.0")
    assert train.main([*FLAGS, *same]) == 2
    assert f"numpy {version!r} there, '9.0' here" in capsys.readouterr().err
    monkeypatch.undo()
    os.truncate(run / "metrics.jsonl", 10)
    assert train.main([*FLAGS, *same]) == 2
    assert "metrics.jsonl has 10 bytes" in capsys.readouterr().err
    # All ranks leave in the same place, and none waits for another.
    done = run_command("train.py", *FLAGS, *same, processes=2)
    assert "metrics.jsonl has 10 bytes" in done.stderr
    assert done.stderr.count("train.py: error") == 1, done.stderr
    # Both leave by themselves, or torchrun ends the second (-15), whichever is sooner; one of them has once been
    # seen to abort (-6) on its way out, for a reason that was not found.
    assert set(re.findall(r"exitcode *: (-?\d+)", done.stderr)) <= {"2", "-15", "-6"}, done.stderr


def test_changed_data_is_refused(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"q{i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(160)]
    data, run = tmp_path / "own.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS, "--dataset", str(data), "--output-dir", str(run)]
    monkeypatch.setattr(train, "evaluate_policy", lambda *args: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train.main(flags)
    monkeypatch.undo()
    rows[3]["chosen"] = " maybe"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(flags) == 2
    assert "tokens" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1


def test_a_second_run_on_one_directory_is_refused(tmp_path):
    config = train.parse_config([*FLAGS, "--output-dir", str(tmp_path)])
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        train.claim_output_dir(config, first)
        with pytest.raises(train.UserError, match="is in use by another run"):
            train.claim_output_dir(config, second)
    # A kill may leave this, before there is a configuration.
    (tmp_path / "config.json").rename(tmp_path / "config.json.tmp")
    with contextlib.ExitStack() as third:
        train.claim_output_dir(config, third)


def test_an_sft_checkpoint_that_another_run_has_just_made_is_not_made_again(tmp_path, monkeypatch, capsys):
    config = train.parse_config([*FLAGS, "--output-dir", str(tmp_path / "run")])
    answers = iter([False, True])
    monkeypatch.setattr(train, "has_sft", lambda *args: next(answers))
    assert train.main([*FLAGS, "--output-dir", str(tmp_path / "run")]) == 2
    assert f"--sft-dir {config.sft_dir} has just been made by another run: start again" in capsys.readouterr().err


def test_one_changed_byte_in_the_cache_is_refused(whole, tmp_path, capsys):
    cache = tmp_path / "reference.safetensors"
    content = bytearray((whole / "reference.safetensors").read_bytes())
    content[-3] ^= 1
    cache.write_bytes(content)
    flags = ["--sft-dir", str(whole / "sft"), "--reference-cache", str(cache), "--output-dir", str(tmp_path / "run")]
    assert train.main([*FLAGS, *flags]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_reference_pass_goes_on(whole, tmp_path, monkeypatch):
    """Parts that were scored are not scored again, and a damaged one is."""
    original, scored = train.score_all, []

    def count(network, pairs, *args):
        if len(scored) == 3:
            raise Stop
        scored.append(len(pairs))
        return original(network, pairs, *args)

    monkeypatch.setattr(train, "score_all", count)
    flags = [*FLAGS, "--sft-dir", str(whole / "sft"), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(Stop):
        train.main(flags)
    parts = sorted((tmp_path / "run" / "reference.safetensors.part").glob("*.safetensors"))
    assert [p.name for p in parts] == [f"train-{i:09}.safetensors" for i in (0, 32, 64)]
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    scored.clear()
    with pytest.raises(Stop):
        train.main(flags)
    assert scored == [32, 5, 32]  # the damaged one, what was left of train, and validation
    monkeypatch.undo()
    assert train.main(flags) == 0
    assert_same_end(tmp_path / "run", whole)


def start(run: Path, *flags: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "train.py", *FLAGS, *flags, "--output-dir", str(run)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def test_an_interrupt_before_the_training_stops_at_once(tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def prepare(*args):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", prepare)
    assert train.main([*FLAGS, "--output-dir", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "train.py: interrupted before the training: nothing was lost\n"


def test_sigterm_finishes_the_step_saves_and_says_so(whole, tmp_path):
    run = tmp_path / "run"
    process = start(run, *shared(whole))
    wait_for(process, run / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said.startswith("train.py: interrupted and saved after update ")
    assert said.count("\n") == 1
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert_same_end(run, whole)


def test_sft_goes_on_after_a_signal(whole, tmp_path, monkeypatch, capsys):
    original, calls = train.sft_gradients, iter(range(99))

    def signalled(*args):
        if next(calls) == 1:
            train.STOP.set()
        return original(*args)

    monkeypatch.setattr(train, "sft_gradients", signalled)
    flags = [*FLAGS, "--output-dir", str(tmp_path / "run")]
    assert train.main(flags) == 75
    assert "saved after SFT update 2" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(flags) == 0
    assert "SFT: goes on after update 2" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", whole)


def test_kills_at_random_moments(whole, tmp_path):
    """SIGKILL again and again, until a run gets through; from the very start, in every stage."""
    run, rng = tmp_path / "run", random.Random(0)
    for _ in range(4):
        process = start(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(4, 14))
        process.kill()
        process.communicate()
        if (run / "strength.json").exists():  # the last file: a kill after it finds the run finished
            break
    else:
        done = run_command("train.py", *FLAGS, "--output-dir", str(run))
        assert done.returncode == 0, done.stderr
    assert_same_end(run, whole)


def test_no_space_is_one_line_and_the_last_checkpoint_is_whole(whole, tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    run = tmp_path / "run"
    limit = 3_000_000  # below a checkpoint's file, above every other one
    done = subprocess.run(
        [sys.executable, "train.py", *FLAGS, *shared(whole), "--output-dir", str(run)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"{run}/checkpoints cannot be written (" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((run / "checkpoints").glob("step-" + 8 * "[0-9]"))
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert_same_end(run, whole)


def test_a_rank_killed_and_restarted_by_torchrun(whole, two_ranks, tmp_path):
    """With --max-restarts torchrun starts all ranks again, and the run goes on to the end of an undisturbed one."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, "--max-restarts", "1", "train.py", *FLAGS, *shared(whole), "--output-dir", str(run)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(process, run / "checkpoints" / "step-00000002" / "manifest.json")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "goes on after update " in said
    assert_same_end(run, two_ranks)
