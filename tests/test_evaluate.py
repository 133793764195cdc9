"""evaluate.py against hand-computed rows, plain forwards and scipy."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from tests.conftest import run_command


def test_margins_by_hand():
    pairs = train.Pairs([[1], [1]], [[2, 3], [4]], [[5], [6, 7, 8, 9]], [0, 1])
    got = evaluate.margins(np.array([[-3.0, -2.0], [-1.0, -8.0]]), pairs)
    assert got["sum"].tolist() == [-1.0, 7.0]
    assert got["per_token"].tolist() == [-1.5 - -2.0, -1.0 - -2.0]


def test_interval_equals_scipys_bootstrap_when_every_row_is_its_own_cluster():
    values = np.random.default_rng(0).normal(1, 2, 300)
    ours = evaluate.mean_interval(values, evaluate.resample([str(i) for i in range(300)]))
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, random_state=1)
    assert ours["mean"] == pytest.approx(values.mean())
    assert ours["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_interval_resamples_annotators_whole():
    """Twenty annotators who each repeat one value 50 times know as much as twenty rows."""
    values = np.random.default_rng(0).normal(0, 1, 20)
    rows = evaluate.mean_interval(
        np.repeat(values, 50), evaluate.resample(np.repeat(np.arange(20).astype(str), 50).tolist())
    )
    alone = evaluate.mean_interval(values, evaluate.resample(np.arange(20).astype(str).tolist()))
    assert (rows["low"], rows["high"]) == pytest.approx((alone["low"], alone["high"]))


def test_margins_command(one_process, tmp_path):
    command = ["evaluate.py", "margins", "--policy", str(one_process / "policy"), "--pairs", "40"]
    command += ["--baseline", str(one_process / "sft")]
    done = run_command(*command, "--output-dir", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"margins.json", "margins.png", "margins.svg"}
    result = json.loads((tmp_path / "one" / "margins.json").read_text())
    values = result["values"]["gamma"]["sum"]
    assert result["n"] == len(values) == 40
    assert result["summary"]["gamma"]["sum"]["margin"]["mean"] == pytest.approx(np.mean(values))
    gain = np.mean(np.array(values) - result["values"]["baseline"]["sum"])
    assert result["summary"]["gamma"]["sum"]["gain"]["mean"] == pytest.approx(gain)
    assert f"{np.mean(values):.3f}" in done.stdout

    model = AutoModelForCausalLM.from_pretrained(one_process / "policy").eval()
    tokenizer = train.byte_tokenizer()
    rows = train.load_preferences("demo", "test")
    for row, value in list(zip(result["rows"], values, strict=True))[:5]:
        logps = []
        for side in ("chosen", "rejected"):
            prompt, text = (
                tokenizer(rows[row][name], add_special_tokens=False)["input_ids"] for name in ("prompt", side)
            )
            ids = torch.tensor([prompt + text + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].log_softmax(-1)
            logps.append(logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
        assert value == pytest.approx(logps[0] - logps[1], abs=1e-3)

    two = run_command(*command, "--output-dir", str(tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    split = json.loads((tmp_path / "two" / "margins.json").read_text())
    assert split["rows"] == result["rows"]
    np.testing.assert_allclose(split["values"]["gamma"]["sum"], values, atol=1e-3)
