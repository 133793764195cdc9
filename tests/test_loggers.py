"""--logger: what tensorboard and wandb hold is what metrics.jsonl holds, with the configuration and the final table."""

import json
import subprocess
import sys

import pytest

import train
from tests.conftest import ROOT, metrics

SMALL = "--preset tiny --max-pairs 64 --eval-pairs 8 --batch-size 32 --eval-every 32 --sft-epochs 1".split()


def scalars(run):
    """name -> [(step, value)] as in metrics.jsonl."""
    found = {}
    for line in metrics(run):
        for name, value in line.items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def leveldb_records(data):
    """The records of a LevelDB log, which an offline run is kept in: blocks of 32 KiB, of pieces with a header of 7."""
    place, record = 7, b""  # wandb's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768  # the rest of a block is filled up
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.filterwarnings("default")  # of what tensorboard brings along
def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert train.main([*SMALL, "--logger", "tensorboard", "--output-dir", str(run)]) == 0
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    expected = scalars(run)
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        assert [e.step for e in events.Scalars(name)] == [step for step, _ in values]
        assert [e.value for e in events.Scalars(name)] == pytest.approx([v for _, v in values], rel=1e-6)
    text = {name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("config", "final")}
    assert b"| dist | gamma |" in text["config"]
    strength = json.loads((run / "strength.json").read_text())
    assert f"| concentration | {strength['concentration']} |".encode() in text["final"]
    assert b"| used | 64 |" in text["final"]


def test_wandb_offline_holds_what_metrics_jsonl_holds(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = tmp_path / "run"
    # A process of its own: wandb leaves a service and handlers behind in the one that starts it.
    command = [sys.executable, "train.py", *SMALL, "--logger", "wandb", "--output-dir", str(run)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = [], {}
    for data in leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        if record.HasField("run"):
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    assert config["dist"] == "gamma"
    assert any(name.split("/")[0] == "final" for row in rows for name in row)
    for name, values in scalars(run).items():
        found = {row["_step"]: row[name] for row in rows if name in row}
        assert found == pytest.approx(dict(values)), name


def test_a_logger_that_is_not_installed_ends_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert train.main([*SMALL, "--logger", "wandb", "--output-dir", str(tmp_path / "run")]) == 2
    assert "--logger wandb needs wandb: pip install 'mixdpo[loggers]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
