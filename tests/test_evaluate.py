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


def everyone(n: int) -> evaluate.Resamples:
    return evaluate.resample([str(i) for i in range(n)])


def test_subgroups_micro_and_macro_by_hand():
    series = {"a": np.array([1.0, 3.0, 5.0, -2.0, 9.0])}
    labels = {"age": ["old", "old", "old", "young", None]}
    entry = evaluate.subgroups(series, labels, everyone(5), min_group=1)["age"]
    assert {value: (g["n"], g["a"]["mean"]) for value, g in entry["groups"].items()} == {
        "old": (3, 3.0),
        "young": (1, -2.0),
    }
    assert entry["micro"]["a"]["mean"] == 7 / 4  # of the rows that have a label
    assert entry["macro"]["a"]["mean"] == 0.5
    assert entry["not_given"] == 1


def test_small_groups_are_shown_but_not_averaged_or_called_worst():
    series = {"a": np.array([1.0, 3.0, 5.0, -2.0])}
    groups = evaluate.subgroups(series, {"age": ["old", "old", "old", "young"]}, everyone(4), min_group=2)
    assert groups["age"]["groups"]["young"]["small"]
    assert groups["age"]["macro"]["a"]["mean"] == 3.0
    worst = evaluate.worst_groups(groups)["a"]
    assert (worst["groups"], worst["share_below_zero"], worst["worst"]["group"]) == (1, 0.0, "old")
    assert "young (small)" in evaluate.group_table("margin", groups)


def test_the_worst_group_and_the_share_below_zero():
    series = {"a": np.array([1.0, 1.0, -4.0, -4.0]), "b": np.array([1.0, 1.0, 2.0, 2.0])}
    labels = {"age": ["old", "old", "young", "young"], "sex": ["f", "m", "f", "m"]}
    worst = evaluate.worst_groups(evaluate.subgroups(series, labels, everyone(4), min_group=1))
    assert (worst["a"]["worst"]["attribute"], worst["a"]["worst"]["group"]) == ("age", "young")
    assert worst["a"]["share_below_zero"] == 3 / 4
    assert worst["b"]["share_below_zero"] == 0


def test_intervals_of_groups_cover_at_their_level():
    """200 draws of 30 annotators with 5 rows each: the macro average's interval holds the truth in about 95 %."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        people = rng.normal(0, 1, 30)
        values = np.repeat(people, 5) + rng.normal(0, 1, 150)
        label = ["left" if i < 100 else "right" for i in range(150)]
        resamples = evaluate.resample([str(i // 5) for i in range(150)], 400)
        interval = evaluate.subgroups({"a": values}, {"side": label}, resamples, 1)["side"]["macro"]["a"]
        held += interval["low"] <= 0 <= interval["high"]
    assert 0.85 <= held / 200 <= 0.99  # percentile intervals of 10 annotators are a little short


def test_attributes_pairs_and_unknown_ones():
    columns = {name: ["x", "y"] for name in (*train.COLUMNS, "age", "sex")} | {"empty": [None, None]}
    rows = train.datasets.Dataset.from_dict(columns | {"sex": ["f", None]})
    assert evaluate.group_labels(rows, None) == {"age": ["x", "y"], "sex": ["f", None]}
    assert evaluate.group_labels(rows, ["age+sex"]) == {"age+sex": ["x & f", None]}
    with pytest.raises(train.UserError, match=r"--by religion: no attribute religion: choose from age, sex, empty"):
        evaluate.group_labels(rows, ["religion"])


def test_what_was_planted_in_the_demo_is_found_and_what_was_not_is_not():
    """A policy that knows the quality of demo responses: its margin depends on conviction, not on region."""
    value = {word: v for v, words in train.DEMO_WORDS.items() for word in words}
    rows = train.load_preferences("demo", "train", heterogeneity=1.5)

    def quality(text: str) -> int:
        return sum(value.get(word.strip(".,"), 0) for word in text.split())

    series = {
        "oracle": np.array(
            [quality(c) - quality(r) for c, r in zip(rows["chosen"], rows["rejected"], strict=True)], float
        )
    }
    labels = evaluate.group_labels(rows, None)
    groups = evaluate.subgroups(series, labels, evaluate.resample(rows["annotator"][:]), 20)
    weaker, stronger = (groups["conviction"]["groups"][name]["oracle"] for name in ("weaker", "stronger"))
    assert weaker["high"] < stronger["low"]
    regions = [group["oracle"] for group in groups["region"]["groups"].values()]
    assert max(r["low"] for r in regions) < min(r["high"] for r in regions)


def test_figures_command(one_process, tmp_path):
    margins = tmp_path / "margins.json"
    series = {"gamma": np.arange(40.0), "baseline": np.zeros(40)}
    labels = {"age": ["old", "young"] * 20, "sex": ["f"] * 20 + ["m"] * 20}
    kinds = ("sum", "per_token")
    result = {"subgroup_margins": {k: evaluate.subgroups(series, labels, everyone(40), 5) for k in kinds}}
    gains = {"gamma": series["gamma"] - 19}
    result["subgroup_gains"] = {k: evaluate.subgroups(gains, labels, everyone(40), 5) for k in kinds}
    train.write_json(margins, result)
    command = ["figures", "--margins", str(margins), "--runs", str(one_process), "--output-dir", str(tmp_path / "out")]
    assert evaluate.main(command) == 0
    names = ("subgroup_margins", "subgroup_gains", "strength", "densities")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    text = (tmp_path / "out" / "subgroup_margins.svg").read_text()
    for label in ("old (n=20)", "macro", "micro", "preference margin (nats, sum, 95 % interval)"):
        assert label in text


def test_figures_of_nothing(tmp_path, capsys):
    assert evaluate.main(["figures", "--output-dir", str(tmp_path)]) == 2
    assert "nothing to draw: pass --runs, or --margins" in capsys.readouterr().err
    assert evaluate.main(["figures", "--runs", str(tmp_path)]) == 2
    assert "has no config.json: pass the --output-dir of a finished run" in capsys.readouterr().err


def test_one_annotator_gives_no_interval():
    values = np.random.default_rng(0).normal(0, 1, 40)
    assert evaluate.mean_interval(values, evaluate.resample(["a"] * 40))["low"] is None
    labels: dict[str, list[str | None]] = {"sex": ["f"] * 10 + ["m"] * 30}
    resamples = evaluate.resample(["a"] * 10 + [f"b{i}" for i in range(30)])
    entry = evaluate.subgroups({"x": values}, labels, resamples, 1)["sex"]
    assert entry["groups"]["f"]["x"]["low"] is None
    assert entry["groups"]["m"]["x"]["low"] is not None
    assert entry["macro"]["x"]["low"] is None  # it averages a group whose spread is unknown
    assert entry["micro"]["x"]["low"] is not None
    assert "[no interval]" in evaluate.group_table("margin", {"sex": entry})
