"""Faults that are really caused: full disks, ranks and nodes that die, values that are not finite."""

import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from tests.conftest import ROOT, metrics
from tests.test_resume import FLAGS, assert_same_end, shared, start, two_ranks, wait_for, whole

__all__ = ["two_ranks", "whole"]  # fixtures: uninterrupted runs
MIB = 2**20
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


launched: list[subprocess.Popen[str]] = []


def launch(*command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    launched.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of a test that fails, too."""
    yield
    while launched:
        process = launched.pop()
        if process.poll() is None:
            ranks = children(process)
            for victim in (process.pid, *ranks):
                os.kill(victim, signal.SIGKILL)
        with process:  # waits, and closes its pipe
            pass


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "filler", "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(MIB))
    with open(place / "filler", "ab", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"x")


def before(monkeypatch, owner, name: str, call: int, action) -> None:
    """Lets `action` happen just before the given call of owner.name."""
    original, count = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(count) == call:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


FULL = {
    "cache": (train, "write_scores", 7, "reference.safetensors"),
    "metrics": (train.Logger, "log", 1, "metrics.jsonl"),
    "checkpoint": (train.Checkpoints, "save", 3, "checkpoints"),
    "export": (train, "export", 1, "policy"),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_is_one_line_and_nothing_half_is_taken_for_whole(
    moment, whole, small_disk, monkeypatch, capfd, record_property
):
    owner, name, call, place = FULL[moment]
    run = small_disk / "run"
    flags = [*FLAGS, "--sft-dir", str(whole / "sft"), "--output-dir", str(run)]
    before(monkeypatch, owner, name, call, lambda: fill(small_disk))
    assert train.main(flags) == 1
    said = capfd.readouterr().err
    record_property("message", said.strip().replace(str(small_disk), ""))
    assert said.startswith(f"train.py: error: {run / place} cannot be written (")
    assert "o space left on device" in said
    assert said.count("\n") == 1
    assert not (run / "strength.json").exists()
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    assert train.main(flags) == 0
    if moment == "checkpoint":
        assert "goes on after update 2 of 8" in capfd.readouterr().out
    assert_same_end(run, whole)


def test_a_disk_that_becomes_read_only(whole, small_disk, monkeypatch, capfd, record_property):
    run = small_disk / "run"
    flags = [*FLAGS, *shared(whole), "--output-dir", str(run)]

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    # A file that is open for writing, as the lock's is, keeps a file system from being remounted.
    monkeypatch.setattr(train, "hold", lambda flag, path, lock: path.mkdir(parents=True, exist_ok=True))
    before(monkeypatch, train, "export", 1, lambda: remount("ro"))
    assert train.main(flags) == 1
    said = capfd.readouterr().err
    record_property("message", said.strip().replace(str(small_disk), ""))
    assert "Read-only file system" in said
    assert said.count("\n") == 1
    monkeypatch.undo()
    assert train.main(flags) == 2
    said = capfd.readouterr().err
    assert "Read-only file system" in said
    assert said.startswith(f"train.py: error: --output-dir {run} cannot be written")
    remount("rw")
    assert train.main(flags) == 0
    assert "goes on after update 8 of 8" in capfd.readouterr().out
    assert_same_end(run, whole)


def test_metrics_that_cannot_be_written(whole, tmp_path, capfd):
    """/dev/full takes the place of metrics.jsonl: this needs no file system of its own."""
    flags = [*FLAGS, *shared(whole), "--output-dir", str(tmp_path / "run")]
    with contextlib.ExitStack() as lock:
        train.claim_output_dir(train.parse_config(flags), lock)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert train.main([*flags, "--micro-batch-tokens", "2048"]) == 1
    assert "metrics.jsonl cannot be written ([Errno 28] No space left on device): make room" in capfd.readouterr().err


def test_answers_that_cannot_be_written(tmp_path):
    part = tmp_path / "answers.jsonl.part0"
    part.symlink_to("/dev/full")
    with (
        pytest.raises(train.Unwritable, match=r"part0 cannot be written \(.*No space left on device\)"),
        evaluate.appending(part) as append,
    ):
        append({"id": "a"})


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value"),
    [("loss", math.nan), ("loss", math.inf), ("policy's gradient", math.inf), ("strength's gradient", math.nan)],
)
def test_what_is_not_finite_stops_before_the_step(where, value, whole, tmp_path, monkeypatch, capsys, record_property):
    run = tmp_path / "run"
    flags = [*FLAGS, *shared(whole), "--output-dir", str(run)]
    loss, gradients, count = train.mixdpo_loss, train.preference_gradients, itertools.count(1)

    def bad_loss(*args, **kwargs):
        losses, *rest = loss(*args, **kwargs)
        return (losses.clone().index_fill_(0, torch.tensor([1]), value), *rest)

    def bad_gradients(config, step, batch, pairs, logps, network, strength, world):
        with monkeypatch.context() as context:
            if next(count) == 5 and where == "loss":
                context.setattr(train, "mixdpo_loss", bad_loss)
            rows = gradients(config, step, batch, pairs, logps, network, strength, world)
        if step == 5 and where != "loss":
            module = network if where.startswith("policy") else strength
            next(p for p in module.parameters() if p.grad is not None).grad.mul_(value)
        return rows

    monkeypatch.setattr(train, "preference_gradients", bad_gradients)
    with pytest.raises(RuntimeError, match="update 5: loss or gradient is not finite") as error:
        train.main(flags)
    record_property("message", str(error.value).replace(str(tmp_path), ""))
    saved = json.loads((run / "diagnostics.json").read_text())
    assert saved["step"] == 5
    assert len(saved["rows"]) == 32
    bad = [row for row in saved["rows"] if row["loss"] in ("nan", "inf")]
    assert len(bad) >= 1 if where == "loss" else not bad
    assert {"concentration", "rate"} < saved.keys()
    monkeypatch.undo()
    capsys.readouterr()
    assert train.main(flags) == 0
    assert "goes on after update 4 of 8" in capsys.readouterr().out
    assert_same_end(run, whole)


EXTREME = [(1e-6, 1e-6), (1e-6, 1e6), (1e6, 1e-6), (1e6, 1e6)]


@pytest.mark.parametrize("drift", [-1e3, 1e3])
@pytest.mark.parametrize(
    "strength",
    [
        *(functools.partial(train.Gamma, *values) for values in EXTREME),
        functools.partial(train.LogNormal, -10.0, 1e-6, "quadrature"),
        functools.partial(train.LogNormal, -10.0, 20.0, "quadrature"),
        functools.partial(train.LogNormal, 10.0, 20.0),
    ],
)
def test_degenerate_parameters_stay_finite(strength, drift):
    """Initial values at the edge, then raw parameters far beyond it, where the softplus is 0 or huge.

    A moment of the log-normal may be inf, as it is beyond float32; it is in no loss.
    """
    strength = strength()
    torch.manual_seed(0)
    for _ in range(2):
        delta_r = torch.tensor([-100.0, -1.0, 0.0, 1e-3, 1.0, 100.0], requires_grad=True)
        losses = -strength.log_choice_prob(delta_r)
        losses.mean().backward()
        assert losses.isfinite().all(), (strength, losses)
        assert delta_r.grad.isfinite().all(), (strength, delta_r.grad)
        assert all(p.grad.isfinite().all() for p in strength.parameters()), strength
        assert not any(torch.isnan(getattr(strength, name)) for name in ("mean", "cv"))
        with torch.no_grad():
            for p in strength.parameters():
                p += drift


def test_drift_is_warned_of_once_and_leaves_the_policy_finite(whole, tmp_path, capsys):
    train.say_once.cache_clear()
    run = tmp_path / "run"
    assert train.main([*FLAGS, "--beta-lr", "3", *shared(whole), "--output-dir", str(run)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said, "the learning rate should have driven it there"
    assert len(said) == len({line.split(" of the strength")[0] for line in said})
    assert all(w.isfinite().all() for w in load_file(run / "policy" / "model.safetensors").values())


def test_a_clock_that_goes_backwards(whole, tmp_path, monkeypatch):
    clock = itertools.count(2e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(clock) * 1e9))
    run = tmp_path / "run"
    before(monkeypatch, train, "clip_policy", 4, lambda: train.STOP.set())
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 75
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert_same_end(run, whole)


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_is_killed(whole, tmp_path, capfd):
    run = tmp_path / "run"
    first = start(run)  # makes its own SFT checkpoint
    wait_for(first, run / "data.json")
    first.send_signal(signal.SIGSTOP)
    other = ["--sft-dir", str(run / "sft"), "--output-dir", str(tmp_path / "other")]
    for flags, what in ((["--output-dir", str(run)], f"--output-dir {run}"), (other, f"--sft-dir {run}/sft.part")):
        assert train.main([*FLAGS, *flags]) == 2
        assert f"{what} is in use by another run" in capfd.readouterr().err
    first.kill()
    first.communicate()
    assert train.main([*FLAGS, "--output-dir", str(run)]) == 0
    assert_same_end(run, whole)


def script(tmp_path: Path, *lines: str) -> str:
    """train.py with something changed."""
    path = tmp_path / "changed.py"
    path.write_text("\n".join(["import sys, time, train", *lines, "sys.exit(train.main())", ""]))
    return str(path)


def test_a_second_signal_stops_at_once(whole, tmp_path):
    run, there = tmp_path / "run", tmp_path / "there"
    slow = script(
        tmp_path,
        "original = train.clip_policy",
        f"train.clip_policy = lambda *a: (open({str(there)!r}, 'w').close(), time.sleep(600), original(*a))[2]",
    )
    process = launch(sys.executable, slow, *FLAGS, *shared(whole), "--output-dir", str(run))
    wait_for(process, there)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, said
    assert train.main([*FLAGS, *shared(whole), "--output-dir", str(run)]) == 0
    assert_same_end(run, whole)


def test_signals_to_the_ranks_end_them_when_the_checkpoint_is_whole(whole, tmp_path):
    """As a scheduler sends them. Were rank 1 to leave first, torchrun would send rank 0 a second one, which stops at
    once, while it hashes the files, here a second for each."""
    run = tmp_path / "run"
    slow = script(
        tmp_path,
        "original = train.file_hash",
        "train.file_hash = lambda p: (time.sleep(1 if 'checkpoints' in str(p) else 0), original(p))[1]",
    )
    flags = [*FLAGS, "--save-every", "992", *shared(whole), "--output-dir", str(run)]
    process = launch(*TORCHRUN, "--standalone", "--nproc_per_node", "2", slow, *flags)
    wait_for(process, run / "metrics.jsonl")
    for rank in children(process):
        os.kill(rank, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(list((run / "checkpoints").glob("step-????????/manifest.json"))) == 1, said


def test_torchrun_stopped_saves_and_another_number_of_ranks_goes_on(whole, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*FLAGS, "--save-every", "992", *shared(whole), "--output-dir", str(run)]
    process = launch(*TORCHRUN, "--standalone", "--nproc_per_node", "2", "train.py", *flags)
    wait_for(process, run / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("train.py: interrupted and saved after update ") == 1
    step = int(said.split("saved after update ")[1].split(":")[0])
    assert (run / "checkpoints" / f"step-{step:08}" / "manifest.json").exists(), said
    assert train.main(flags) == 0
    assert f"goes on after update {step} of 8" in capsys.readouterr().out
    for a, b in zip(metrics(run), metrics(whole), strict=True):
        assert a.keys() == b.keys()
        for name in [n for n in a if "accuracies" not in n and n != "train/examples_per_second"]:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (a["step"], name)


def test_ranks_started_again_do_not_look_for_the_dead(tmp_path):
    """Rank 0 comes half a minute late: longer than rank 1 would try the address of its predecessor."""
    changed = script(
        tmp_path,
        "import os, torch.distributed as dist",
        "again, rank = os.environ['TORCHELASTIC_RESTART_COUNT'] == '1', os.environ['RANK']",
        "time.sleep(30 if again and rank == '0' else 0)",
        "with train.start_processes() as world:",
        "    dist.barrier()",
        "    if not again:",
        "        os._exit(1) if rank == '1' else time.sleep(600)",
        "sys.exit(0)",
    )
    process = launch(*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", changed)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


def test_ranks_meet_those_who_are_alive():
    """Rank 1 came twice and died, before and after rank 0 came; rank 0 came twice."""
    store = torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=10))
    store.set("come/1", "died before")

    def meet(rank: int) -> queue.Queue:
        met: queue.Queue = queue.Queue()
        # A daemon: one that never returns fails the test, and does not hold it up.
        threading.Thread(target=lambda: met.put(train.meet(store, rank, 2)), daemon=True).start()
        return met

    first = meet(0)
    time.sleep(0.2)
    store.set("come/1", "died after")
    time.sleep(1.5)
    assert first.empty()
    a, b = meet(1).get(timeout=10), first.get(timeout=10)
    a.set("address", "of rank 1")
    assert b.get("address") == b"of rank 1"
    # Started again, both: nothing of the first time is seen.
    a, b = [met.get(timeout=10) for met in (meet(1), meet(0))]
    assert not b.check(["address"])
    a.set("address", "of another")
    assert b.get("address") == b"of another"


def test_when_a_rank_dies_the_others_stop_with_its_name(whole, tmp_path, record_property):
    run = tmp_path / "run"
    flags = [*FLAGS, *shared(whole), "--output-dir", str(run)]
    process = launch(*TORCHRUN, "--standalone", "--nproc_per_node", "2", "train.py", *flags)
    wait_for(process, run / "checkpoints" / "step-00000001" / "manifest.json")
    ranks = children(process)
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    record_property(
        "message",
        next((line for line in said.splitlines() if "exitcode: -9" in line), "")
        .split("failed ")[-1]
        .split(" of bin")[0],
    )
    assert process.returncode == 1
    assert f"exitcode: -9) local_rank: 1 (pid: {ranks[1]})" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_two_nodes_of_which_one_is_killed_and_started_again(whole, two_ranks, tmp_path):
    """Two torchrun agents on loopback; the run ends as two ranks undisturbed do."""
    run = tmp_path / "run"
    flags = [*FLAGS, *shared(whole), "--output-dir"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3"]
    node += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]
    first, second = (launch(*node, rank, "train.py", *flags, str(run)) for rank in "01")
    wait_for(first, run / "checkpoints" / "step-00000002" / "manifest.json")
    ranks = children(second)
    for victim in (second.pid, *ranks):
        os.kill(victim, signal.SIGKILL)
    second.communicate()
    again = launch(*node, "1", "train.py", *flags, str(run))
    said = [process.communicate(timeout=240)[0] for process in (first, again)]
    assert (first.returncode, again.returncode) == (0, 0), said
    assert "goes on after update " in said[0] + said[1]
    assert_same_end(run, two_ranks)
