"""A user's mistake is one line on stderr with the thing, its value and the remedy; status 2; no model is loaded.

Also where files that the commands wrote themselves were changed. What a hostile model, data file or judge may do is in
test_hostile.py.
"""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import evaluate
import train
import verify.__main__ as verify
from tests.conftest import run_command

PAIRS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(400)]


@pytest.fixture(autouse=True)
def no_model_and_no_hub(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train, "load_model", fail)
    monkeypatch.setattr(evaluate, "load_policy", fail)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def jsonl(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def broken(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def model_without_eos(path: Path) -> str:
    LlamaConfig(vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    tokenizer = train.byte_tokenizer()
    train.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(path)
    return str(path)


def finished_run(path: Path, **changes: object) -> str:
    config = train.parse_config(["--preset", "tiny", "--output-dir", str(path)])
    train.write_json(path / "config.json", train.dataclasses.asdict(config) | changes)
    train.write_json(path / "strength.json", {})
    return str(path)


def foreign(path: Path) -> str:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    return str(path)


def own_sft(path: Path, record: dict | None) -> str:
    path.mkdir()
    (path / "notes.txt").write_text("")
    if record is not None:
        train.write_json(path / "sft.json", record)
    return str(path)


def folder(path: Path) -> str:
    path.mkdir(parents=True)
    return str(path)


def table(directory: Path, *lines: str) -> str:
    return broken(directory / "a.csv", "\n".join(lines).encode())


def hh(directory: Path, data: bytes) -> str:
    broken(Path(folder(directory / "hh" / "helpful-base")) / "train.jsonl.gz", data)
    return str(directory / "hh")


def changed(directory: Path, name: str, text: str) -> Path:
    """A file of a run that somebody changed."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return directory / name


TRAIN = {
    "choice": (lambda d: ["--dist", "beta"], ["--dist", "'beta'", "gamma"]),
    "number": (lambda d: ["--beta-lr", "fast"], ["--beta-lr", "'fast'"]),
    "unknown flag": (lambda d: ["--betalr", "1"], ["--betalr"]),
    "abbreviated flag": (lambda d: ["--beta-l", "1"], ["--beta-l"]),
    "negative": (lambda d: ["--lr", "-1"], ["--lr", "-1.0", "> 0"]),
    "nan": (lambda d: ["--rate", "nan"], ["--rate", "nan"]),
    "loc": (lambda d: ["--loc", "inf"], ["--loc", "inf"]),
    "lengths": (lambda d: ["--max-length", "64"], ["--max-prompt-length 64", "--max-length 64"]),
    "micro-batch": (lambda d: ["--micro-batch-tokens", "100"], ["--micro-batch-tokens 100", "256"]),
    "unknown data set": (lambda d: ["--dataset", "hhh"], ["--dataset 'hhh'", "demo"]),
    "no such file": (lambda d: ["--dataset", f"{d}/none.jsonl"], ["none.jsonl", "does not exist"]),
    "missing column": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", [{"prompt": "p", "chosen": "c"}])],
        ["a.jsonl", "column rejected", "prompt, chosen"],
    ),
    "huge seed": (lambda d: ["--seed", "9" * 30], ["--seed", "9" * 30, "below 2**63"]),
    "strength out of range": (lambda d: ["--rate", "1e300"], ["rate=inf", "less extreme"]),
    "no mean": (lambda d: ["--dist", "lognormal", "--loc", "1000"], ["loc=1000", "mean inf"]),
    "too many draws": (lambda d: ["--samples", "1000000000"], ["--samples 1000000000", "65536"]),
    "not text in a flag": (lambda d: ["--annotator-column", "\udce9"], [r"\udce9", "retype"]),
    "name too long": (lambda d: ["--sft-dir", "x" * 300], ["x" * 40, "255", "shorten"]),
    "beyond the context": (
        lambda d: ["--max-length", "2048", "--micro-batch-tokens", "8192"],
        ["--max-length 2048", "1024", "lower"],
    ),
    "directory for a file": (lambda d: ["--dataset", folder(d / "a.jsonl")], ["a.jsonl", "is no file"]),
    "column twice": (
        lambda d: ["--dataset", table(d, "prompt,chosen,chosen,rejected", "p,a,b,c")],
        ["chosen", "rename"],
    ),
    "comma in a field": (
        lambda d: ["--dataset", table(d, "prompt,chosen,rejected", "Hello, you,a,b")],
        ["a.csv, row 1", "quote its commas"],
    ),
    "open quote": (lambda d: ["--dataset", table(d, "prompt,chosen,rejected", '"p,a,b')], ["a.csv", "CSV", "repair"]),
    "rows without text": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", [{"prompt": 1, "chosen": [], "rejected": None}] * 9)],
        ["9 rows read", "field is not a string 9", "more data"],
    ),
    "annotator column": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", PAIRS), "--annotator-column", "who"],
        ["column who", "prompt, chosen, rejected", "add it"],
    ),
    "a thousand columns": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", [{f"k{i}": i} for i in range(1001)])],
        ["a.jsonl", "1000 columns"],
    ),
    "empty archive": (lambda d: ["--dataset", "hh", "--data-dir", hh(d, b"")], ["no rows", "train.jsonl.gz"]),
    "no archive": (lambda d: ["--dataset", "hh", "--data-dir", hh(d, b"{}")], ["train.jsonl.gz", "not a gzipped file"]),
    "config.json of a run": (
        lambda d: ["--output-dir", str(changed(d / "run", "config.json", "[]").parent)],
        ["config.json", "list", "repair"],
    ),
    "SFT directory is a file": (lambda d: ["--sft-dir", broken(d / "s", b"")], ["--sft-dir", "no directory", "choose"]),
    "no rows": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [])], ["a.jsonl", "no rows"]),
    "not JSON": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [*PAIRS, "{no"])], ["a.jsonl, line 401", "not JSON"]),
    "not an object": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [*PAIRS, "3"])], ["line 401", "int"]),
    "not text": (lambda d: ["--dataset", broken(d / "a.jsonl", b"\xff\xfe{}\n")], ["a.jsonl", "cannot be read"]),
    "broken parquet": (lambda d: ["--dataset", broken(d / "a.parquet", b"PAR1")], ["a.parquet", "Parquet"]),
    "empty split": (lambda d: ["--dataset", jsonl(d / "a.jsonl", PAIRS[:1])], ["split", "empty", "a.jsonl"]),
    "fewer pairs than a batch": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", PAIRS), "--batch-size", "512"],
        ["train pairs", "400 rows", "512", "--batch-size"],
    ),
    "data_dir without the data": (lambda d: ["--dataset", "hh", "--data-dir", str(d)], ["--data-dir", "jsonl.gz"]),
    "data set out of reach": (lambda d: ["--dataset", "hh"], ["Anthropic/hh-rlhf", "--data-dir"]),
    "model out of reach": (lambda d: ["--model", "nobody/nothing"], ["--model nobody/nothing", "local directory"]),
    "model directory empty": (lambda d: ["--model", str(d)], ["--model", "config.json"]),
    "model without EOS": (lambda d: ["--model", model_without_eos(d / "m")], ["no EOS", "eos_token"]),
    "another run's directory": (
        lambda d: ["--output-dir", finished_run(d / "run", lr=3.0)],
        ["--output-dir", "lr 3.0 there, 0.0001 here"],
    ),
    "finished run": (lambda d: ["--output-dir", finished_run(d / "run")], ["finished", "another directory"]),
    "not a run's directory": (lambda d: ["--output-dir", foreign(d / "mine")], ["not empty", "config.json"]),
    "unwritable": (lambda d: ["--output-dir", broken(d / "file", b"")], ["--output-dir", "cannot be written"]),
    "SFT directory of something else": (lambda d: ["--sft-dir", own_sft(d / "s", None)], ["--sft-dir", "checkpoint"]),
    "SFT of another model": (
        lambda d: ["--sft-dir", own_sft(d / "s", {"model": "pythia"})],
        ["--sft-dir", "model 'pythia' there, 'tiny' here"],
    ),
}


REMEDY = re.compile(
    r"\b(pass|choose|remove|repair|lower|raise|rename|retype|shorten|add|fetch|export|set|give|leave|quote|name|split|"
    r"restore|make it|put|download|correct|generate|see --help|must be|at least|incomplete|another directory)\b"
)


def check(code: int, captured: str, name: str, expected: list[str]) -> None:
    assert code == 2
    assert captured.startswith(f"{name}: error: ")
    assert captured.count("\n") == 1, captured
    assert REMEDY.search(captured), captured
    for text in expected:
        assert text.lower() in captured.lower(), (text, captured)


@pytest.mark.parametrize("case", TRAIN)
def test_train(case, tmp_path, capfd):
    flags, expected = TRAIN[case]
    given = flags(tmp_path)
    output = [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "out")]
    code = train.main(["--preset", "tiny", *given, *output])
    check(code, capfd.readouterr().err, "train.py", expected)
    assert not (tmp_path / "out").exists()


PLACES = {
    "SFT under a file": (
        lambda d: ["--sft-dir", broken(d / "f", b"") + "/sft"],
        ["--sft-dir", "/f ", "choose another"],
    ),
    "cache under a file": (
        lambda d: ["--reference-cache", broken(d / "f", b"") + "/c"],
        ["--reference-cache", "/f ", "choose another"],
    ),
    "cache is a directory": (lambda d: ["--reference-cache", folder(d / "c")], ["--reference-cache", "name a file"]),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_are_tried_before_the_work(case, tmp_path, capfd):
    flags, expected = PLACES[case]
    code = train.main(["--preset", "tiny", *flags(tmp_path), "--output-dir", str(tmp_path / "out")])
    check(code, capfd.readouterr().err, "train.py", expected)


def test_batch_size_and_ranks(tmp_path):
    config = train.parse_config(["--preset", "tiny", "--output-dir", str(tmp_path)])
    with pytest.raises(train.UserError, match="--batch-size 64 is not a multiple of the 3 ranks"):
        train.run(config, train.World(0, 3, torch.device("cpu")), contextlib.ExitStack())


def policy(path: Path) -> str:
    train.quiet_libraries()  # a bar of save_pretrained is not what is looked at
    finished_run(path)
    small = LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(path / "policy")
    train.byte_tokenizer().save_pretrained(path / "policy")
    return str(path / "policy")


def without_config(path: Path) -> str:
    given = policy(path)
    (path / "config.json").unlink()
    return given


def run_with(path: Path, **changes: object) -> str:
    """The policy of a run whose config.json was changed."""
    given = policy(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return given


def run_of(path: Path, metrics: str, strength: str = "{}") -> str:
    policy(path)
    changed(path, "metrics.jsonl", metrics)
    changed(path, "strength.json", strength)
    return str(path)


STEP = '{"examples": 1, "beta/mean": 1.0, "beta/variance": 1.0, "beta/cv": 1.0}\n'
MARGINS: dict[str, tuple[Callable, list[str]]] = {
    "not a model": (lambda d: ["--policy", str(d)], ["--policy", "config.json"]),
    "not a run's policy": (lambda d: ["--policy", without_config(d / "r")], ["config.json does not exist"]),
    "too many pairs": (lambda d: ["--policy", policy(d / "r"), "--pairs", "9999"], ["--pairs 9999", "demo", "only"]),
    "too few pairs": (lambda d: ["--policy", policy(d / "r"), "--pairs", "1"], ["--pairs", "2", "1"]),
    "baseline": (lambda d: ["--policy", policy(d / "r"), "--baseline", f"{d}/none"], ["none", "config.json"]),
    "seed": (lambda d: ["--policy", policy(d / "r"), "--seed", "-1"], ["--seed", "at least 0", "-1"]),
    "tokens": (
        lambda d: ["--policy", policy(d / "r"), "--micro-batch-tokens", "-1"],
        ["--micro-batch-tokens", "at least 0", "-1"],
    ),
    "attribute": (
        lambda d: ["--policy", policy(d / "r"), "--by", "age"],
        ["--by age", "choose from conviction, region"],
    ),
    "twice": (lambda d: ["--policy", *[policy(d / "r")] * 2], ["--policy", "r/policy", "leave one out"]),
    "output": (
        lambda d: ["--policy", policy(d / "r"), "--output-dir", broken(d / "f", b"")],
        ["--output-dir", "/f ", "choose another"],
    ),
    "run's config of another type": (
        lambda d: ["--policy", run_with(d / "r", max_length="128")],
        ["r/config.json", "--max-length '128'", "restore"],
    ),
    "run's config out of range": (
        lambda d: ["--policy", run_with(d / "r", rate=float("nan"))],
        ["r/config.json", "--rate", "nan", "restore"],
    ),
    "run's config of another version": (
        lambda d: ["--policy", run_with(d / "r", colour=1)],
        ["r/config.json", "differs in colour", "pass"],
    ),
    "run's metrics": (
        lambda d: ["--policy", run_of(d / "r", '{"examples": 1}\n') + "/policy"],
        ["r/metrics.jsonl", "beta/mean", "make it again"],
    ),
    "run's metrics are no objects": (
        lambda d: ["--policy", run_of(d / "r", "3\n") + "/policy"],
        ["r/metrics.jsonl", "'3'", "remove it"],
    ),
}


@pytest.mark.parametrize("case", MARGINS)
def test_margins(case, tmp_path, capfd):
    flags, expected = MARGINS[case]
    code = evaluate.main(["margins", *flags(tmp_path)])
    check(code, capfd.readouterr().err, "evaluate.py", expected)


MEAN = {"mean": 1.0, "low": 0.5, "high": 1.5}
GROUPS = {"groups": {"x": {"n": 3, "small": False, "gamma": MEAN}}, "micro": {"gamma": MEAN}, "macro": {"gamma": MEAN}}
FIGURES: dict[str, tuple[Callable, list[str]]] = {
    "no run": (lambda d: ["--runs", f"{d}/none"], ["--runs", "none", "config.json"]),
    "two of one name": (lambda d: ["--runs", *[run_of(d / "r", STEP)] * 2], ["--runs", "/r ", "rename one"]),
    "empty metrics": (lambda d: ["--runs", run_of(d / "r", "")], ["r: its metrics.jsonl is empty", "pass"]),
    "no family": (lambda d: ["--runs", run_of(d / "r", STEP)], ["r/strength.json", "family", "make it again"]),
    "impossible strength": (
        lambda d: ["--runs", run_of(d / "r", STEP, '{"family": "gamma", "concentration": -1.0, "rate": 1.0}')],
        ["r/strength.json", "-1.0", "make it again"],
    ),
    "no margins": (lambda d: ["--margins", str(changed(d, "m.json", "{}"))], ["m.json", "not written by", "pass"]),
    "margins of another shape": (
        lambda d: ["--margins", str(changed(d, "m.json", '{"subgroup_margins": {"sum": {"age": 3}}}'))],
        ["m.json", "int", "make it again"],
    ),
    "margins without gains": (
        lambda d: ["--margins", str(changed(d, "m.json", json.dumps({"subgroup_margins": {"sum": {"a": GROUPS}}})))],
        ["m.json", "subgroup_gains", "make it again"],
    ),
    "half a file": (
        lambda d: ["--margins", str(changed(d, "m.json", '{"sub'))],
        ["m.json", "line 1 column 2", "repair"],
    ),
    "nested too deep": (
        lambda d: ["--margins", str(changed(d, "m.json", "[" * 10**5))],
        ["m.json", "recursion", "repair"],
    ),
    "output": (
        lambda d: ["--runs", run_of(d / "r", STEP), "--output-dir", broken(d / "f", b"")],
        ["--output-dir", "/f ", "choose another"],
    ),
}


@pytest.mark.parametrize("case", FIGURES)
def test_figures(case, tmp_path, capfd):
    flags, expected = FIGURES[case]
    given = flags(tmp_path)
    output = [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "figures")]
    check(evaluate.main(["figures", *given, *output]), capfd.readouterr().err, "evaluate.py", expected)


def part(directory: Path, text: str) -> list[str]:
    changed(directory / "answers", "r.jsonl.part0", text + "\n")
    return ["--output-dir", str(directory / "answers"), "--url", "http://127.0.0.1:9/v1", "--prompts", "2"]


GENERATE: dict[str, tuple[Callable, list[str]]] = {
    "prompts": (lambda d: ["--prompts", "9" * 40], ["--prompts", "at most", "9" * 40]),
    "temperature": (lambda d: ["--temperature", "nan"], ["--temperature", "nan", ">= 0"]),
    "batch": (lambda d: ["--batch-size", "0"], ["--batch-size", "at least 1", "0"]),
    "part without ids": (lambda d: part(d / "a", "{}"), ["r.jsonl.part0", "id", "make it again"]),
    "part without text": (lambda d: part(d / "a", '{"id": "x", "output": 3}'), ["r.jsonl.part0", "no text"]),
    "settings": (
        lambda d: ["--output-dir", str(changed(d / "a", "r.json", "[]").parent), "--prompts", "2"],
        ["r.json", "list", "repair"],
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case, tmp_path, capfd):
    flags, expected = GENERATE[case]
    (tmp_path / "a").mkdir()
    code = evaluate.main(["generate", "--policy", policy(tmp_path / "r"), *flags(tmp_path)])
    check(code, capfd.readouterr().err, "evaluate.py", expected)


NOWHERE = "http://127.0.0.1:9/v1"
CACHED = {"key": "k", "preference": 1.5, "kind": "hard", "mass": None, "model": "m", "fingerprint": ""}
CACHED |= {"prompt_tokens": 1, "completion_tokens": 1}


def cache(directory: Path, **changes: object) -> list[str]:
    changed(directory / "out", "cache.jsonl", json.dumps(CACHED | changes) + "\n")
    return ["--output-dir", str(directory / "out")]


def answer_file(directory: Path, **changes: object) -> list[str]:
    return ["--policy", jsonl(directory / "p.jsonl", [{"instruction": "q", "output": "a"} | changes])]


JUDGE: dict[str, tuple[Callable, list[str]]] = {
    "host": (lambda d: ["--judge-url", "http://[::1"], ["--judge-url 'http://[::1'", "http://127.0.0.1"]),
    "port": (lambda d: ["--judge-url", "http://x:99999/v1"], ["--judge-url 'http://x:99999/v1'", "http://127.0.0.1"]),
    "concurrency": (lambda d: ["--concurrency", "1000000"], ["--concurrency", "at most 1000", "1000000"]),
    "prices": (lambda d: ["--prices", "nan", "2"], ["--prices", "nan", ">= 0"]),
    "no template": (lambda d: ["--template", f"{d}/t.json"], ["t.json", "no such file", "name another"]),
    "id": (lambda d: answer_file(d, id=[1]), ["p.jsonl, line 1", "id is not a string"]),
    "cluster": (lambda d: answer_file(d, cluster={}), ["p.jsonl, line 1", "cluster is not a string"]),
    "settings of the answers": (
        lambda d: [[], changed(d, "p.json", '{"run": {"dist": [1]}}')][0],
        ["p.json ", "unhashable", "make it again"],
    ),
    "cached preference": (lambda d: cache(d, preference=9), ["cache.jsonl", "preference 9", "make it again"]),
    "cached mass": (lambda d: cache(d, mass="x"), ["cache.jsonl", "str", "make it again"]),
    "cached tokens": (lambda d: cache(d, prompt_tokens=-1), ["cache.jsonl", "-1", "make it again"]),
    "cached key": (lambda d: cache(d, key=[]), ["cache.jsonl", "unhashable", "make it again"]),
}


@pytest.mark.parametrize("case", JUDGE)
def test_judge(case, tmp_path, capfd):
    flags, expected = JUDGE[case]
    for name, text in (("p", "a"), ("b", "b")):
        jsonl(tmp_path / f"{name}.jsonl", [{"instruction": "q", "output": text}])
    given = ["--policy", f"{tmp_path}/p.jsonl", "--baseline", f"{tmp_path}/b.jsonl", "--judge-url", NOWHERE]
    code = evaluate.main(["judge", *given, "--judge-model", "m", *flags(tmp_path)])
    check(code, capfd.readouterr().err, "evaluate.py", expected)


def judgements(directory: Path, row: dict | None = None, **changes: object) -> list[str]:
    values = {"id": "i", "cluster": "c", "kind": "hard", "baseline_hash": "h", "preference": 1.5}
    values |= {"policy_length": 3, "baseline_length": 4}
    whole = {"policy": "p", "baseline": "b", "run": {}, "judge": {"answered_by": ["m"]}, "rows": [values | (row or {})]}
    return [str(changed(directory, "p-vs-b.json", json.dumps(whole | changes)))]


WINRATE: dict[str, tuple[Callable, list[str]]] = {
    "preference": (lambda d: judgements(d, {"preference": 9}), ["p-vs-b.json", "[1, 2]", "9"]),
    "preference is text": (lambda d: judgements(d, {"preference": "x"}), ["p-vs-b.json", "'x'"]),
    "negative length": (lambda d: judgements(d, {"policy_length": -1}), ["p-vs-b.json", "policy_length", "-1"]),
    "huge length": (lambda d: judgements(d, {"policy_length": 10**400}), ["p-vs-b.json", "too large"]),
    "cluster": (lambda d: judgements(d, {"cluster": None}), ["p-vs-b.json", "no text"]),
    "no rows": (lambda d: judgements(d, rows=[]), ["p-vs-b.json", "no rows"]),
    "run": (lambda d: judgements(d, run={"dist": "gamma"}), ["p-vs-b.json", "dataset"]),
    "learning rate": (lambda d: judgements(d, run={"dist": "gamma", "beta_lr": "x"}), ["p-vs-b.json", "str"]),
    "judge": (lambda d: judgements(d, judge=3), ["p-vs-b.json", "int"]),
    "no file": (lambda d: [f"{d}/none.json"], ["none.json", "no such file", "name another"]),
}


@pytest.mark.parametrize("case", WINRATE)
def test_winrate(case, tmp_path, capfd):
    files, expected = WINRATE[case]
    code = evaluate.main(["winrate", "--judgements", *files(tmp_path)])
    check(code, capfd.readouterr().err, "evaluate.py", expected)


@pytest.mark.parametrize("given", [[], ["figure"], ["margins"], ["margins", "--policy", "x", "--pair", "3"]])
def test_command_line_of_evaluate(given, capfd):
    check(evaluate.main(given), capfd.readouterr().err, "evaluate.py", [given[-2] if len(given) > 3 else "", "--help"])


VERIFY: dict[str, tuple[Callable, list[str]]] = {
    "abbreviated flag": (lambda d: ["--ful"], ["--ful", "--help"]),
    "unknown check": (lambda d: ["weight"], ["weight", "choose from", "weights"]),
    "no such file": (lambda d: ["--readme", f"{d}/none.md"], ["--readme", "none.md", "pass"]),
    "directory": (lambda d: ["--readme", str(d)], ["--readme", "directory", "pass"]),
    "no markers": (lambda d: ["--readme", broken(d / "r.md", b"x")], ["r.md", "verify:begin", "put both"]),
    "both": (lambda d: ["weights", "--readme", broken(d / "r.md", b"x")], ["r.md", "leave out"]),
    "not results": (
        lambda d: [["weights"], changed(d, "verify.json", '{"weights": 3}')][0],
        ["verify.json", "TypeError", "restore"],
    ),
    "half a file": (lambda d: [["weights"], changed(d, "verify.json", "{")][0], ["verify.json", "line 1", "restore"]),
    "unwritable": (lambda d: [["weights"], folder(d / "verify.md")][0], [": error: ", "cannot be written", "writable"]),
}


@pytest.mark.parametrize("case", VERIFY)
def test_verify(case, tmp_path, capfd, monkeypatch):
    flags, expected = VERIFY[case]
    monkeypatch.setattr(verify, "RESULTS", tmp_path)
    monkeypatch.setattr(verify, "run", lambda *_: pytest.fail("a check was run"))
    monkeypatch.setattr(verify.sys, "argv", ["verify", *flags(tmp_path)])
    check(verify.main(), capfd.readouterr().err, "verify", expected)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["train.py", "--lr", "-1"], "train.py"),
        (["evaluate.py", "margins", "--policy", "no\nwhere"], "evaluate.py"),
        (["-m", "verify", "nothing"], "verify"),
    ],
    ids=["train", "evaluate", "verify"],
)
def test_in_a_process_of_its_own(command, name):
    done = run_command(*command)
    check(done.returncode, done.stderr, name, [])
    assert done.stdout == ""


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_debug_shows_where(main, capfd):
    assert main(["--betalr", "1"]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert main(["--betalr", "1", "--debug"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("Traceback")
    assert "in parse_args" in error
    assert "error: " in error.splitlines()[-1]


def test_what_breaks_a_line_is_escaped(tmp_path, capfd):
    data = jsonl(tmp_path / "a.jsonl", [{"pro\nmpt\x1b[2J": 1}])
    check(train.main(["--preset", "tiny", "--dataset", data]), capfd.readouterr().err, "train.py", [r"pro\nmpt\x1b[2J"])


def test_reference_cache_of_another_pass(tmp_path):
    cache = tmp_path / "reference.safetensors"
    train.write_scores(cache, {"train": train.np.zeros((1, 2))}, {"weights": "w", "dtype": "x"})
    with pytest.raises(
        train.UserError, match=r"reference.safetensors is of another pass \(weights 'w' there, 'v' here\)"
    ):
        train.read_scores(cache, {"weights": "v", "dtype": "x"})
    cache.write_bytes(b"half a fi")
    with pytest.raises(train.UserError, match="cannot be read"):
        train.read_scores(cache, {})


def test_unknown_split():
    with pytest.raises(train.UserError, match="split 'dev' is unknown: one of train, validation, test"):
        train.load_preferences("demo", "dev")


def test_figures_need_the_extra(monkeypatch):
    monkeypatch.setitem(evaluate.sys.modules, "matplotlib", None)
    with pytest.raises(train.UserError, match=r"mixdpo\[plots\]"):
        evaluate.load_pyplot()
