"""train.py against its oracles: hand-made rows, plain Hugging Face forwards, single-process runs."""

import dataclasses
import functools
import gzip
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import train
from tests.conftest import SMALL, metrics, run_command

# --- tokens


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((10, 20, 30), (10, 20, 30)),  # fits
        ((70, 20, 30), (70, 20, 30)),  # a long prompt that fits is not touched
        ((100, 20, 28), (100, 20, 28)),  # exactly max_length
        ((100, 20, 29), (64, 20, 29)),  # the prompt alone is cut
        ((100, 70, 10), (64, 64, 10)),  # prompt and the longer response
        ((10, 130, 10), (10, 64, 10)),  # a short prompt stays, responses still go to max_length - max_prompt_length
        ((0, 200, 200), (0, 64, 64)),
    ],
)
def test_truncation_is_the_rule_of_the_reference_code(lengths, expected):
    prompt, chosen, rejected = (list(range(n)) for n in lengths)
    p, c, r = train.truncate(prompt, chosen, rejected, 128, 64, [])
    assert (len(p), len(c), len(r)) == expected
    assert p == prompt[len(prompt) - len(p) :]  # the end of the prompt, the start of the responses
    assert c == chosen[: len(c)]
    assert r == rejected[: len(r)]


def test_bos_is_kept_when_the_prompt_is_cut():
    p, _, _ = train.truncate(list(range(100)), [1] * 40, [1] * 40, 128, 64, [777])
    assert p == [777, *range(37, 100)]


def preferences(*triples: tuple[str, str, str]) -> train.datasets.Dataset:
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*triples, strict=True)), strict=True))
    return train.datasets.Dataset.from_dict(columns)


def test_responses_end_in_exactly_one_eos_and_text_is_data():
    tokenizer = train.byte_tokenizer()
    eos = tokenizer.eos_token_id
    rows = preferences(("Q <|endoftext|>", " a <|endoftext|>", " b"), ("é\n\n", " ünï 😀", " \x00"))
    pairs, counts = train.tokenize(rows, tokenizer, 128, 64)
    for texts, prompt, *responses in zip(rows, pairs.prompts, pairs.chosen, pairs.rejected, strict=True):
        assert tokenizer.decode(prompt) == texts["prompt"]
        assert eos not in prompt
        for response, text in zip(responses, (texts["chosen"], texts["rejected"]), strict=True):
            assert response.index(eos) == len(response) - 1
            assert tokenizer.decode(response[:-1]) == text
    assert counts["used"] == 2


def test_what_truncation_does_is_counted():
    long = "x" * 200
    rows = preferences(
        ("p", " yes", " no"),
        (long, " yes", " no"),  # prompt cut
        ("p", " " + long, " no"),  # one response cut
        (long, " " + long + "1", " " + long + "2"),  # both cut, and now the same
    )
    pairs, counts = train.tokenize(rows, train.byte_tokenizer(), 128, 64)
    assert counts == {
        "pairs": 4,
        "prompt_cut": 2,
        "response_cut": 2,
        "eos_lost": 3,
        "dropped_control": 0,
        "dropped_empty": 0,
        "dropped_identical": 1,
        "used": 3,
    }
    assert pairs.rows == [0, 1, 2]


def test_bos_follows_the_tokenizers_own_convention():
    tokenizer = train.byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    rows = preferences(("p", " a", " b"))
    assert train.tokenize(rows, tokenizer, 128, 64)[0].prompts == [
        tokenizer("p", add_special_tokens=False)["input_ids"]
    ]
    template = train.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    from tokenizers.processors import TemplateProcessing

    template.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    puts_bos = train.PreTrainedTokenizerFast(tokenizer_object=template, bos_token="<s>", eos_token="<|endoftext|>")
    prompts = train.tokenize(rows, puts_bos, 128, 64)[0].prompts
    assert prompts == [[puts_bos.bos_token_id, *tokenizer("p", add_special_tokens=False)["input_ids"]]]


# --- scoring


def random_pairs(count: int = 7) -> train.Pairs:
    rng = np.random.default_rng(0)
    columns = [[rng.integers(0, 50, rng.integers(1, 20)).tolist() for _ in range(count)] for _ in range(3)]
    return train.Pairs(*columns, list(range(count)))


def plain_logps(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """One response alone, no padding, no mask, the shift by one written out."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) + t - 1, token] for t, token in enumerate(response))


ARCHITECTURES = {  # and whether a prompt can be shared between responses
    "llama": (LlamaConfig, {}, True),
    "gpt_neox": (GPTNeoXConfig, {}, True),
    "gemma": (GemmaConfig, {"head_dim": 8}, True),
    "gemma2 (soft-capped logits)": (Gemma2Config, {"head_dim": 8, "sliding_window": 64}, True),
    "phi": (PhiConfig, {}, True),
    "qwen2": (Qwen2Config, {}, True),
    "qwen3": (Qwen3Config, {"head_dim": 8}, True),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, True),
    "mistral, window as long as the rows": (MistralConfig, {"sliding_window": 35}, True),
    "mistral, window of a token less": (MistralConfig, {"sliding_window": 34}, False),
    "gemma3, every second layer a short window": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 8}, False),
    "bloom (ALiBi)": (BloomConfig, {"n_layer": 2, "n_head": 4}, False),
}


def small_model(name: str, tied: bool, dtype: torch.dtype) -> torch.nn.Module:
    family, changes, _ = ARCHITECTURES[name]
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = family(**shape | changes, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture
def no_float32(monkeypatch):
    """Norms and eager attention of the library go through float32 also in a float64 model: not while this lasts."""
    to, softmax, wide = torch.Tensor.to, torch.nn.functional.softmax, {torch.float32: torch.float64}
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kw: to(x, *(wide.get(a, a) for a in args), **kw))


def relative(got: Any, expected: Any) -> float:
    """Largest difference over all tensors, in units of each tensor's largest entry."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_architectures_are_shared_or_refused_but_always_right(name, tied, dtype, bound, request, capsys):
    """Values and gradients of every parameter, against each response alone in a plain forward."""
    if dtype == torch.float64:
        request.getfixturevalue("no_float32")
    train.say_once.cache_clear()
    model, pairs, shared = small_model(name, tied, dtype), random_pairs(), ARCHITECTURES[name][2]
    assert train.check_sharing(model, pairs, torch.device("cpu")) == shared
    assert ("cannot share a prompt" in capsys.readouterr().out) != shared
    logps = train.score_pairs(model, pairs, range(len(pairs)), "cpu")
    plain = torch.stack(
        [
            torch.stack([plain_logps(model, p, r) for p, r in zip(pairs.prompts, responses, strict=True)])
            for responses in (pairs.chosen, pairs.rejected)
        ]
    )
    assert relative([logps], [plain]) < bound
    weight = torch.tensor([[1.0], [-0.5]], dtype=dtype)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (logps, plain))
    assert relative(ours, theirs) < bound


def test_micro_batches_sum_to_the_whole_batch():
    """Gradients, per parameter, and their norm in float32: micro-batches of one or two pairs against all in one."""
    config = train.parse_config(["--preset", "tiny", "--output-dir", "unused"])
    rng = np.random.default_rng(0)
    columns = [[rng.integers(0, 250, rng.integers(1, 60)).tolist() for _ in range(24)] for _ in range(3)]
    pairs = train.Pairs(*columns, list(range(24)))
    reference = torch.from_numpy(rng.normal(-100, 20, (24, 2))).float()
    found = []
    with train.start_processes() as world:
        for budget, parts in ((100_000, 1), (256, 11)):
            network = train.load_model("tiny", "float32", world, pairs)
            strength = train.make_strength(config)
            assert len(train.deal(pairs.lengths, 1, budget)) == parts
            step = dataclasses.replace(config, micro_batch_tokens=budget)
            train.preference_gradients(step, 1, list(range(24)), pairs, reference, network, strength, world)
            gradients = [p.grad for p in strength.parameters()] + [p.grad.full_tensor() for p in network.parameters()]
            found.append([*gradients, train.clip_policy(network, 1.0)])
    for whole, parts in zip(*found, strict=True):
        assert (parts - whole).norm() < 1e-6 * whole.norm()


@pytest.mark.parametrize("economy", ["activation_checkpointing", "compile_blocks"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_economies_leave_the_gradients_alone(economy, monkeypatch):
    pairs, found, seen = random_pairs(), [], []
    forward, compile_module = LlamaDecoderLayer.forward, torch.nn.Module.compile

    def count(self, *args, **kwargs):
        seen.append("forward")
        return forward(self, *args, **kwargs)

    def backend(graph, inputs):
        seen.append("graph")
        return graph.forward

    if economy == "activation_checkpointing":
        monkeypatch.setattr(LlamaDecoderLayer, "forward", count)
    # What dynamo captures, without the minutes of inductor.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    with train.start_processes() as world:
        for chosen in ({}, {economy: True}):
            network = train.load_model("tiny", "float32", world, pairs, **chosen)
            seen.clear()
            loss = functools.partial(train.score_pairs, network, pairs, device="cpu")
            train.backward_in_parts(network, [range(7)], lambda part, loss=loss: loss(part).sum())
            found.append([p.grad.full_tensor() for p in network.parameters()])
    assert seen == ["forward"] * 8 if economy == "activation_checkpointing" else "graph" in seen  # of four blocks
    assert relative(found[1], found[0]) < 1e-5


def test_logps_of_a_model_known_by_hand():
    """A bigram table: the log-prob of a token is a function of the token before it, so the shift can be read off."""
    table = torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused = torch.nn.Identity(), torch.nn.Parameter(torch.zeros(1))

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=self.head(table[input_ids]))

    logp = table.log_softmax(-1)
    pairs = train.Pairs([[1, 2], [3]], [[4, 5, 9], [6, 9]], [[7, 9], [8, 1, 2, 9]], [0, 1])
    chosen, rejected = train.score_pairs(Bigram().double(), pairs, [0, 1], "cpu")
    expected = [logp[2, 4] + logp[4, 5] + logp[5, 9], logp[3, 6] + logp[6, 9]]
    torch.testing.assert_close(chosen, torch.stack(expected))
    expected = [logp[2, 7] + logp[7, 9], logp[3, 8] + logp[8, 1] + logp[1, 2] + logp[2, 9]]
    torch.testing.assert_close(rejected, torch.stack(expected))


lengths = st.lists(st.integers(1, 180), min_size=1, max_size=80)


@given(lengths, st.integers(1, 8), st.integers(180, 2000))
def test_deal_gives_every_row_once_in_equal_shares_within_the_budget(lengths, ranks, budget):
    plan = train.deal(lengths, ranks, budget)
    dealt = [i for batch in plan for rank in batch for i in rank]
    assert sorted(i for i in dealt if i >= 0) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == ranks
        assert len({len(rank) for rank in batch}) == 1
        for rank in batch:
            assert len(rank) * max((lengths[i] for i in rank if i >= 0), default=0) <= budget or len(rank) == 1


def test_data_order_is_a_function_of_seed_and_epoch():
    once = list(train.batches(10, 4, 2, seed=5))
    assert once == list(train.batches(10, 4, 2, seed=5))
    assert [len(b) for b in once] == [4, 4, 2, 4, 4, 2]
    assert sorted(i for b in once[:3] for i in b) == sorted(i for b in once[3:] for i in b) == list(range(10))
    assert once[:3] != once[3:]
    assert list(train.batches(10, 4, 1, seed=5)) == once[:3]


def test_draws_are_a_function_of_seed_and_step():
    config = train.parse_config(["--dist", "lognormal"])
    first = train.draws(config, 3, 8, torch.device("cpu"))
    assert first.shape == (8, 16)
    assert torch.equal(first, train.draws(config, 3, 8, torch.device("cpu")))
    assert not torch.equal(first, train.draws(config, 4, 8, torch.device("cpu")))
    # A shorter last batch sees the same rows.
    assert torch.equal(first[:5], train.draws(config, 3, 5, torch.device("cpu")))
    assert train.draws(train.parse_config(["--dist", "gamma"]), 3, 8, torch.device("cpu")) is None


# --- data

HH = "\n\nHuman: {}\n\nAssistant:{}"
HH_ROWS = [
    (HH.format("Hi", " Hello"), HH.format("Hi", " Go away"), None),
    (HH.format("Hi", " Same"), HH.format("Hi", " Same "), "identical responses"),
    (HH.format("Hi", " "), HH.format("Hi", " Yes"), "empty response"),
    (HH.format("Hi", " Yes"), HH.format("Hi", ""), "empty response"),
    (HH.format("Hi", " Yes"), HH.format("Ho", " Yes"), "prompts differ"),
    (HH.format("Hi", " Yes"), HH.format("Hi", " No") + "\n\nHuman: why", "last turn is Human"),
    ("no tags at all", HH.format("Hi", " No"), "no Assistant turn"),
    (HH.format("Hi", " Yes"), 7, "field is not a string"),
]


def write_hh(directory: Path, rows: list, name: str = "test") -> Path:
    path = directory / "helpful-base" / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r, *_ in rows)
    return directory


def test_hh_quirks_are_skipped_under_their_reason(tmp_path):
    rows = train.read_preferences("hh", str(write_hh(tmp_path, HH_ROWS)))
    assert rows["dropped"][:] == [reason for *_, reason in HH_ROWS]
    assert rows[0]["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (" Hello", " Go away")
    assert (rows[0]["subset"], rows[0]["annotator"], rows[0]["conversation"]) == ("helpful-base", None, "Hi")


def dialogue(i: int, turns: int) -> tuple[str, str]:
    start = "".join(HH.format(f"question {i}" if t == 0 else "more", " answer") for t in range(turns))
    return start + HH.format("and", " good"), start + HH.format("and", " bad")


def test_hh_is_split_by_conversation_and_no_conversation_is_in_two_splits(tmp_path):
    rows = [dialogue(i, turns) for i in range(200) for turns in (1, 2)]
    splits, summary = train.split_preferences(train.read_preferences("hh", str(write_hh(tmp_path, rows))))
    seen = [set(splits[name]["conversation"]) for name in train.SPLITS]
    assert all(seen)
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert summary["rows"]["train"] + summary["rows"]["validation"] + summary["rows"]["test"] == 400
    assert "carved 80/10/10 by opening" in summary["split"]


def test_a_test_file_stays_the_test_split_and_its_conversations_leave_train(tmp_path):
    write_hh(tmp_path, [dialogue(i, 1) for i in range(100)], "train")
    write_hh(tmp_path, [dialogue(i, 2) for i in range(90, 110)], "test")
    splits, summary = train.split_preferences(train.read_preferences("hh", str(tmp_path)))
    assert len(splits["test"]) == 20
    lost = {f"{name} row whose opening is also in test": n for name, n in (("train", 9), ("validation", 1))}
    assert summary["rows_dropped"] == lost
    assert not set(splits["train"]["conversation"]) & set(splits["test"]["conversation"])


def test_local_files_agree_and_keep_attributes(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": "a\nb", "rejected": 'c "d"', "annotator": f"u{i % 9}", "age": "old"}
        for i in range(60)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "p.csv", "w", newline="") as f:
        writer = train.csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    train.datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    loaded = [train.load_preferences(str(tmp_path / f"p.{s}"), "train").to_list() for s in ("jsonl", "csv", "parquet")]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0][0] | {"prompt": ""} == rows[0] | {
        "prompt": "",
        "conversation": None,
        "turn": None,
        "choice_set": None,
    } | {"annotator": loaded[0][0]["annotator"]}


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "p.jsonl"
    for text in ("old", "new"):
        rows = [{"prompt": f"p{i}", "chosen": text, "rejected": "c"} for i in range(50)]
        path.write_text("\n".join(map(json.dumps, rows)))
        assert set(train.load_preferences(str(path), "train")["chosen"]) == {text}


def test_demo_is_drawn_from_the_mixed_logit_model():
    value = {word: v for v, words in train.DEMO_WORDS.items() for word in words}

    def quality(text: str) -> int:
        return sum(value.get(word.strip(".,"), 0) for word in text.split())

    def right(heterogeneity: float, conviction: str | None = None) -> float:
        """Share of choices that agree with quality among pairs that differ by one."""
        rows = list(train.read_demo([], heterogeneity))
        steps = [quality(r["chosen"]) - quality(r["rejected"]) for r in rows if conviction in (None, r["conviction"])]
        return steps.count(1) / (steps.count(1) + steps.count(-1))

    assert abs(right(0.0) - 1 / (1 + math.exp(-2))) < 0.03  # four standard errors of 1,700 pairs
    assert abs(right(0.0, "weaker") - right(0.0, "stronger")) < 0.06
    assert right(1.5, "stronger") - right(1.5, "weaker") > 0.15


def test_the_real_hh_test_files():
    data = os.environ.get("MIXDPO_DATA")
    if not data or not Path(data, "hh-rlhf").is_dir():
        pytest.skip("MIXDPO_DATA does not name a folder with hh-rlhf/, a copy of the hub's repository")
    rows = train.read_preferences("hh", str(Path(data, "hh-rlhf")))
    reasons = train.Counter(rows["dropped"][:])
    assert len(rows) == 8552
    del reasons[None]
    assert reasons == {"identical responses": 36, "empty response": 11, "prompts differ": 17, "last turn is Human": 2}


# --- whole runs


def test_a_run_leaves_what_it_promises(one_process):
    assert {p.name for p in one_process.iterdir()} == {
        "checkpoints", "config.json", "data.json", "lock", "metrics.jsonl", "policy", "reference.safetensors", "sft",
        "strength.json",
    }  # fmt: skip
    lines = metrics(one_process)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4]
    assert [line["examples"] for line in lines if "train/loss" in line] == [32, 64, 96, 101]
    first = lines[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same
    assert first["eval/reference_gap"] < 1e-4
    assert first["eval/n"] == 33
    strength = json.loads((one_process / "strength.json").read_text())
    assert strength["mean"] == pytest.approx(strength["concentration"] / strength["rate"])
    assert strength["concentration"] != 2.0
    assert lines[-1]["beta/cv"] == strength["cv"]
    data = json.loads((one_process / "data.json").read_text())
    assert data["rows_read"] == 4800
    assert data["tokenised"]["train"]["used"] == 101


def test_the_exported_policy_loads_and_scores_as_trained(one_process):
    model = AutoModelForCausalLM.from_pretrained(one_process / "policy")
    assert type(model).__name__ == model.config.architectures[0] == "LlamaForCausalLM"
    assert next(model.parameters()).dtype == torch.float32
    config = train.Config(**json.loads((one_process / "config.json").read_text()))
    rows = train.sample(train.load_preferences("demo", "validation"), 33, 0)
    pairs, _ = train.tokenize(rows, AutoTokenizer.from_pretrained(one_process / "policy"), config.max_length, 64)
    with torch.no_grad():
        chosen, rejected = train.score_pairs(model.eval(), pairs, range(33), "cpu")
    last = metrics(one_process)[-1]
    assert last["eval/logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert last["eval/logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)


def test_the_first_update_is_what_a_plain_loop_computes(one_process):
    """Loss and gradient norms of update 1 from the SFT checkpoint, without FSDP, micro-batches or sharing."""
    config = train.Config(**json.loads((one_process / "config.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(one_process / "sft")
    rows = train.sample(train.load_preferences("demo", "train"), 101, 0)
    pairs, _ = train.tokenize(rows, tokenizer, config.max_length, config.max_prompt_length)
    batch = next(train.batches(101, 32, 1, 0))
    model = AutoModelForCausalLM.from_pretrained(one_process / "sft").eval()
    logps = [
        torch.stack([plain_logps(model, pairs.prompts[i], side[i]) for i in batch])
        for side in (pairs.chosen, pairs.rejected)
    ]
    strength = train.Gamma(2.0, 16.7)
    losses, *_ = train.mixdpo_loss(*logps, *(x.detach() for x in logps), strength)
    losses.mean().backward()
    first = next(line for line in metrics(one_process) if "train/loss" in line)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert first["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert first["train/logps/chosen"] == pytest.approx(logps[0].mean().item(), rel=1e-5)


@pytest.mark.parametrize("dist", ["gamma", "lognormal"])
def test_two_processes_equal_one(one_process, tmp_path, dist):
    shared = ["--dist", dist, "--sft-dir", str(one_process / "sft")]
    one, two = (one_process if dist == "gamma" else tmp_path / "one"), tmp_path / "two"
    if dist != "gamma":
        assert train.main([*SMALL, *shared, "--output-dir", str(one)]) == 0
    done = run_command("train.py", *SMALL, *shared, "--output-dir", str(two), processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        # Accuracies of a policy that still is the reference count the signs of rounding noise.
        for name in [n for n in a if "accuracies" not in n and n != "train/examples_per_second"]:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (a["step"], name)
    for name, weight in load_file(one / "policy" / "model.safetensors").items():
        torch.testing.assert_close(weight, load_file(two / "policy" / "model.safetensors")[name], rtol=1e-3, atol=1e-4)
    strengths = [json.loads((run / "strength.json").read_text()) for run in (one, two)]
    assert strengths[0]["cv"] == pytest.approx(strengths[1]["cv"], rel=1e-3)


def test_bfloat16_compute_over_float32_weights(one_process, tmp_path):
    done = run_command(
        "train.py", *SMALL, "--dist", "dpo", "--policy-dtype", "bfloat16", "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    first = metrics(tmp_path / "run")[0]
    assert 0 < first["eval/reference_gap"] < 2  # logged, because bf16 policy and fp32 reference differ at step 0
    assert {line["beta/cv"] for line in metrics(tmp_path / "run")} == {0.0}


def test_fixed_parameters_stay_fixed(one_process, tmp_path):
    shared = ["--sft-dir", str(one_process / "sft"), "--reference-cache", str(one_process / "reference.safetensors")]
    run = tmp_path / "fixed"
    assert train.main([*SMALL, "--dist", "gamma", "--beta-lr", "0", *shared, "--output-dir", str(run)]) == 0
    assert all(line["beta/mean"] == pytest.approx(2.0 / 16.7) for line in metrics(run))
    assert all(line["beta/cv"] == metrics(run)[0]["beta/cv"] for line in metrics(run))
    assert not json.loads((run / "strength.json").read_text())["learned"]


def test_the_tiny_preset_learns(tmp_path):
    """From random weights to held-out accuracy well above chance; flags given explicitly win over the preset."""
    run = tmp_path / "run"
    done = run_command("train.py", "--preset", "tiny", "--seed", "1", "--max-pairs", "1280", "--output-dir", str(run))
    assert done.returncode == 0, done.stderr
    sft = json.loads((run / "sft" / "sft.json").read_text())
    assert sft["losses"][-1] < 0.5 * sft["losses"][0]
    first, *_, last = [line for line in metrics(run) if "eval/loss" in line]
    assert last["examples"] == 1280
    assert first["eval/rewards/accuracies"] < 0.6
    assert last["eval/rewards/accuracies"] > 0.65  # three standard errors of 280 pairs above one half is 0.59
    assert last["eval/loss"] < 0.62 < first["eval/loss"]


def test_nothing_is_stepped_on_a_bad_loss(monkeypatch, one_process, tmp_path):
    original = train.mixdpo_loss

    def poisoned(*args, **kwargs):
        losses, chosen, rejected = original(*args, **kwargs)
        return losses * math.nan, chosen, rejected

    monkeypatch.setattr(train, "mixdpo_loss", poisoned)
    shared = ["--sft-dir", str(one_process / "sft"), "--reference-cache", str(one_process / "reference.safetensors")]
    with pytest.raises(RuntimeError, match=r"update 1: loss or gradient is not finite.*rows with a bad loss: \[\d"):
        train.main([*SMALL, *shared, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "policy").exists()
    saved = json.loads((tmp_path / "run" / "diagnostics.json").read_text())
    assert (saved["step"], len(saved["rows"]), saved["concentration"]) == (1, 32, pytest.approx(2.0))
    assert {row["loss"] for row in saved["rows"]} == {"nan"}
    assert len({row["row"] for row in saved["rows"]}) == 32
