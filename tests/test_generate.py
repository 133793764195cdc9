"""Answers of a policy: against a plain forward, over ranks, resumed, sampled, and through a server."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from tests.conftest import run_command
from tests.judge_server import serve


def generate(*flags: str | Path) -> int:
    return evaluate.main(
        ["generate", "--prompts", "10", "--max-new-tokens", "24", "--batch-size", "4", *map(str, flags)]
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def greedy(one_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("answers")
    assert generate("--policy", one_process / "policy", one_process / "sft", "--output-dir", output) == 0
    return output


def test_greedy_answers_equal_a_plain_forward(one_process, greedy):
    assert {p.name for p in greedy.iterdir()} == {f"gamma{s}.json{x}" for s in ("", "-sft") for x in ("", "l")}
    rows = rows_of(greedy / "gamma.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == 10
    assert [row["id"] for row in rows] == [row["id"] for row in rows_of(greedy / "gamma-sft.jsonl")]
    assert {row["generator"] for row in rows} == {"gamma"}
    tokenizer = train.byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(one_process / "policy").eval()
    test = train.load_preferences("demo", "test")
    prompts = set(zip(test["prompt"], test["annotator"], strict=True))
    for row in rows:
        assert (row["instruction"], row["cluster"]) in prompts
        ids = tokenizer(row["instruction"], add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(24):
            with torch.no_grad():
                token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert row["output"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    settings = json.loads((greedy / "gamma.json").read_text())
    assert settings["run"] == {
        "dist": "gamma",
        "beta": 0.1,
        "beta_lr": 3e-4,
        "dataset": "demo",
        "model": "tiny",
        "seed": 0,
    }
    assert (settings["temperature"], settings["max_new_tokens"], settings["seed"]) == (0.0, 24, 0)


def test_prompts_of_unequal_length_do_not_disturb_each_other(one_process):
    tokenizer = train.byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(one_process / "policy").eval()
    texts = ["Human: What is the river like?\nAssistant:", "What?", "Human: Which of them, the bakery or the museum?"]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    settings = {"seed": 0, "temperature": 0.0, "max_new_tokens": 24}
    alone = [evaluate.answer(model, tokenizer, [t], settings, 0)[0] for t in tokens]
    assert evaluate.answer(model, tokenizer, tokens, settings, 0) == alone


def test_resumed_and_over_two_ranks_it_is_the_same(one_process, greedy, tmp_path, capsys):
    whole = (greedy / "gamma.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "gamma.json").write_text((greedy / "gamma.json").read_text())
    # Rank 7 of an earlier start left some rows, and was killed in the middle of one.
    part = tmp_path / "gamma.jsonl.part7"
    part.write_text("".join(lines[:3]).replace('"output": "', '"output": "KEPT ') + lines[3][:20])
    command = ["evaluate.py", "generate", "--policy", str(one_process / "policy"), "--prompts", "10"]
    command += ["--max-new-tokens", "24", "--batch-size", "4", "--output-dir", str(tmp_path)]
    done = run_command(*command, processes=2)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "gamma.jsonl")
    assert [row["id"] for row in rows] == [json.loads(line)["id"] for line in lines]
    expected = [json.loads(line)["output"] for line in lines]
    assert [row["output"].removeprefix("KEPT ") for row in rows] == expected
    assert not part.exists()
    before = (tmp_path / "gamma.jsonl").stat().st_mtime_ns
    assert generate("--policy", one_process / "policy", "--output-dir", tmp_path) == 0
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "gamma.jsonl").stat().st_mtime_ns == before
    assert generate("--policy", one_process / "policy", "--output-dir", tmp_path, "--temperature", "1") == 2
    assert "temperature 0.0 there, 1.0 here" in capsys.readouterr().err


def test_a_batch_that_is_there_is_not_made_again(one_process, greedy, tmp_path, monkeypatch):
    (tmp_path / "gamma.json").write_text((greedy / "gamma.json").read_text())
    (tmp_path / "gamma.jsonl.part0").write_text((greedy / "gamma.jsonl").read_text())
    monkeypatch.setattr(evaluate, "answer", lambda *_: pytest.fail("generated again"))
    assert generate("--policy", one_process / "policy", "--output-dir", tmp_path) == 0
    assert (tmp_path / "gamma.jsonl").read_text() == (greedy / "gamma.jsonl").read_text()


def test_sampled_answers_depend_on_the_seed_alone(one_process, tmp_path):
    texts = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        flags = ["--policy", one_process / "policy", "--temperature", "1.5", "--output-dir", tmp_path / name]
        torch.manual_seed(int(seed) + len(texts))  # whatever the state of the process
        assert generate(*flags, "--seed", seed) == 0
        texts.append([row["output"] for row in rows_of(tmp_path / name / "gamma.jsonl")])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5
    assert texts[0] != texts[2]


def test_through_a_server(one_process, greedy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    policy, output = one_process / "policy", tmp_path / "out"
    instructions = [row["instruction"] for row in rows_of(greedy / "gamma.jsonl")]
    with serve({instructions[0]: ["500", "truncated", "drop"], instructions[-1]: ["400"]}) as server:
        assert generate("--policy", policy, "--output-dir", output, "--url", server.url) == 2
        assert "run the same command again" in capsys.readouterr().err
        asked = len(server.bodies)
        assert generate("--policy", policy, "--output-dir", output, "--url", server.url) == 0
        missing = len(server.bodies) - asked
        body = server.bodies[0]
    assert 1 <= missing < 10
    assert (body["model"], body["max_tokens"], body["temperature"]) == (str(policy), 24, 0.0)
    rows = rows_of(output / "gamma.jsonl")
    assert [row["output"] for row in rows] == [f"Answer to {text}".strip() for text in instructions]
    assert json.loads((output / "gamma.json").read_text())["url"] == server.url


def test_one_prompt_of_each_conversation(tmp_path):
    rows = [
        {
            "prompt": f"p{i}",
            "chosen": "good",
            "rejected": "bad",
            "conversation": f"c{i // 4}",
            "annotator": f"a{i // 8}",
        }
        for i in range(800)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = train.parse_config(["--preset", "tiny", "--dataset", str(tmp_path / "own.jsonl")])
    test = train.load_preferences(config.dataset, "test")
    total = len(set(test["conversation"]))
    prompts, tokens = evaluate.held_out_prompts(config, "tiny", total, 0)
    where = dict(zip(test["prompt"], test["conversation"], strict=True))
    assert len({where[p["instruction"]] for p in prompts}) == len(prompts) == len(tokens) == total
    assert [train.byte_tokenizer().decode(t) for t in tokens] == [p["instruction"] for p in prompts]
    again, _ = evaluate.held_out_prompts(config, "tiny", total // 2, 0)
    assert {p["id"] for p in again} < {p["id"] for p in prompts}
    assert again != evaluate.held_out_prompts(config, "tiny", total // 2, 1)[0]
    with pytest.raises(train.UserError, match=f"--prompts {total + 1}: .* has {total} conversations"):
        evaluate.held_out_prompts(config, "tiny", total + 1, 0)


def test_mistakes_end_before_a_model_is_loaded(one_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    policy = one_process / "policy"
    for flags, hints in (
        (["--policy", tmp_path], ["--policy", "config.json"]),
        (["--policy", policy, policy], ["gamma", "rename"]),
        (["--policy", policy, "--prompts", "99999"], ["--prompts 99999", "conversations"]),
        (["--policy", policy, "--prompts", "0"], ["--prompts", "at least 1"]),
        (["--policy", policy, "--temperature", "-1"], ["--temperature", "-1.0"]),
        (["--policy", policy, "--max-new-tokens", "1024"], ["--max-new-tokens 1024", "1024"]),
        (["--policy", policy, "--url", "nowhere"], ["--url 'nowhere'", "http://"]),
    ):
        assert generate(*flags, "--output-dir", tmp_path / "out") == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        for hint in hints:
            assert hint in captured.err, captured.err
    assert not (tmp_path / "out").exists()
