"""python -m verify.bench: whole training steps, ours against the DPO reference code's and TRL's, side by side.

One process, one run: every candidate takes its turn in every round, ratios are formed within a round, and their median
and quartiles are shown, so that what else the machine does falls on all of them. Peak memory is measured in a process
of its own for each. Before anything is timed, the log-probs of all candidates are compared.

    padded     the DPO reference code's step: chosen and rejected in one padded batch, logits at every position, and the
               same forward of the reference model
    TRL        DPOTrainer.training_step, as installed: its defaults (bfloat16 autocast, activation checkpointing), in
               float32, and "compact": scoring response positions only, as it does on a GPU
    ours       train.py's own functions at its defaults, so with Gamma: with the reference scored in each step, or taken
               from the cache
    limit      the matrix products of a step that computes every token once, and nothing else

With MIXDPO_DATA the pairs are HH's (the folder holds hh-rlhf), else the demo's. TRL is left out where it is not
installed, and the result says so. Results are in verify/results/bench.json and bench.md; `--readme README.md` only puts
the saved table there. It reports and judges nothing: the exit status is 0 also where a goal is missed.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import train
from mixdpo import dpo_loss
from verify.__main__ import RESULTS, into_readme, write
from verify.reproduce import CONFIGURATIONS
from verify.small_model import configuration, train_tokenizer

ROUNDS = 5
UPDATES = 2  # of every run of the sweep
PAIRS, MAX_LENGTH, MAX_PROMPT_LENGTH = 64, 128, 64  # the paper's batch and lengths
MODELS = ("llama", "gpt_neox")
HIDDEN, LAYERS, VOCABULARY = 256, 5, 6144  # of the parameters the head has 27 %, in Llama-3.2-1B 21 %
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Step = Callable[[], Any]


# --- pairs and models ------------------------------------------------------------------------------------------------


def load_pairs(folder: Path, count: int, max_length: int = MAX_LENGTH) -> train.Pairs:
    """Real pairs of HH, or of the demo, in the tokens of a model that make_models wrote."""
    rows = train.sample(train.load_preferences(*source()), 2 * count, 0)  # some are dropped
    pairs, _ = train.tokenize(rows, train.load_tokenizer(str(folder)), max_length, max_length // 2)
    return pairs.select(range(count))


def source() -> tuple[str, str, str]:
    data = os.environ.get("MIXDPO_DATA")
    return ("hh", "train", f"{data}/hh-rlhf") if data else ("demo", "train", "")


def make_models(folder: Path) -> None:
    """A random-weight model of each architecture, with a tokenizer of the data."""
    tokenizer = train_tokenizer(train.load_preferences(*source()), VOCABULARY)
    for name in MODELS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration(name, HIDDEN, LAYERS, len(tokenizer)))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def plain_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- the candidates: each is a whole step, from token lists to updated weights ---------------------------------------


def padded_batch(pairs: train.Pairs, index: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask, (2 * pairs, longest): chosen above rejected."""
    some = pairs.select(index)
    rows = [p + r for responses in (some.chosen, some.rejected) for p, r in zip(some.prompts, responses, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = 1
        response[i, len(some.prompts[i % len(index)]) : len(row)] = 1
    return ids, real, response


def padded_logps(model: nn.Module, ids: Tensor, real: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * response[:, 1:]).sum(-1).chunk(2)
    return chosen, rejected


def padded(folder: Path, pairs: train.Pairs, index: list[int]) -> dict[str, Any]:
    policy, reference = plain_model(folder), plain_model(folder)
    optimizer, _schedule = train.optimizer_for([{"params": list(policy.parameters()), "lr": 5e-7}], 150)

    def step() -> None:
        batch = padded_batch(pairs, index)
        chosen, rejected = padded_logps(policy, *batch)
        with torch.no_grad():
            reference_chosen, reference_rejected = padded_logps(reference, *batch)
        losses, *_ = dpo_loss(chosen, rejected, reference_chosen, reference_rejected)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def logps() -> Tensor:
        with torch.no_grad():
            return torch.stack(padded_logps(policy, *padded_batch(pairs, index)))

    return {"step": step, "logps": logps}


def ours(
    folder: Path,
    pairs: train.Pairs,
    index: list[int],
    world: train.World,
    flags: Sequence[str] = (),
    dtype: str = "float32",
    budget: int = 0,
    cached: bool = True,
    reference_logps: Tensor | None = None,
) -> dict[str, Any]:
    """The functions of train.py, as train() calls them; budget: tokens of a micro-batch, 0 for the default."""
    config = train.parse_config([*flags, "--policy-dtype", dtype, "--micro-batch-tokens", str(budget)])
    if not budget:
        architecture = train.model_config(str(folder))
        config = train.dataclasses.replace(config, micro_batch_tokens=train.micro_batch_tokens(architecture, 0, world))
    network = train.load_model(str(folder), dtype, world, pairs)
    reference = None if cached else train.load_model(str(folder), dtype, world, pairs)
    strength = train.make_strength(config)
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "lr": config.lr}]
    if list(strength.parameters()):
        groups.append({"params": list(strength.parameters()), "lr": config.beta_lr})
    optimizer, _schedule = train.optimizer_for(groups, config.warmup)
    count = iter(range(1, 10**6))

    def score(model: nn.Module) -> Tensor:
        some = pairs.select(index)
        logps = train.score_all(model, some, len(index), config.micro_batch_tokens, world, "reference")
        return torch.from_numpy(logps).float()

    if reference_logps is None:
        reference_logps = torch.zeros(len(pairs), 2)
        reference_logps[index] = score(network)

    def step() -> None:
        if reference is not None:
            reference_logps[index] = score(reference)
        train.preference_gradients(config, next(count), index, pairs, reference_logps, network, strength, world)
        train.clip_policy(network, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    made = {"step": step, "logps": lambda: score(network).T, "score": lambda: score(network)}
    return made | {"strength": strength}


def trl_step(folder: Path, pairs: train.Pairs, index: list[int], setting: str, micro_batch: int = 0) -> dict[str, Any]:
    """setting: "defaults", "float32" or "compact, cached"."""
    import datasets
    import trl
    import trl.trainer.utils as utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    cached = "cached" in setting
    tokenizer = train.load_tokenizer(str(folder))
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    plain = {} if setting == "defaults" else {"bf16": False, "gradient_checkpointing": False}
    args = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(index), report_to="none", use_cpu=True,
        disable_tqdm=True, optim="rmsprop", learning_rate=5e-7, precompute_ref_log_probs=cached, **plain,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=plain_model(folder),
        ref_model=None if cached else plain_model(folder),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    if setting == "defaults":
        trainer.model.activation_checkpointing_enable()  # as train() does
    policy = trainer.accelerator.prepare(trainer.model)  # autocast, where asked for
    collate = DataCollatorForPreference(pad_token_id=0)
    size = micro_batch or len(index)
    trainer.current_gradient_accumulation_steps = len(index) // size

    def examples(start: int) -> list[dict[str, Any]]:
        some = pairs.select(index[start : start + size])
        columns = {"prompt_ids": some.prompts, "chosen_ids": some.chosen, "rejected_ids": some.rejected}
        if cached:
            columns |= {f"ref_{side}_logps": [-100.0] * len(some) for side in ("chosen", "rejected")}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @contextlib.contextmanager
    def compact() -> Iterator[None]:
        """Off a GPU the head scores every position: here it takes the GPU's way, without its kernels."""
        original, asked = utils._use_triton, []

        def on_gpu(device: torch.device) -> bool:
            asked.append(sys._getframe(1).f_code.co_name == "_fused_forward")
            return asked[-1]

        utils._use_triton = on_gpu if "compact" in setting else original
        try:
            yield
        finally:
            utils._use_triton = original
        if "compact" in setting and not any(asked):
            raise SystemExit("TRL does not ask where it is any more: its compact head was not measured")

    def step() -> None:
        with compact():
            for start in range(0, len(index), size):
                trainer.training_step(policy, collate(examples(start)))
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def logps() -> Tensor:
        batch = collate(examples(0))
        with compact(), torch.no_grad():
            return torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))

    return {"step": step, "logps": logps}


def matmul_limit(model: nn.Module, pairs: train.Pairs, index: list[int], budget: int) -> Step:
    """The products of the linear layers (forward, and two backward), and of attention over the places that may be seen.

    In pieces of our micro-batches, without their padding, into buffers that are there: nothing faster is known here.
    """
    some = pairs.select(index)
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    width = model.config.hidden_size // heads  # type: ignore[union-attr]
    products: list[tuple[Tensor, ...]] = []

    def linear(weight: Tensor, tokens: int) -> None:
        x, y = torch.randn(tokens, weight.shape[1]), torch.randn(tokens, weight.shape[0])
        products.append((x, weight.T, y))
        products.append((y, weight, x))
        products.append((y.T, x, torch.empty_like(weight)))

    with torch.no_grad():
        for members in train.deal(some.lengths, 1, budget):
            rows = [(len(some.prompts[i]), len(some.chosen[i]), len(some.rejected[i])) for i in members[0]]
            for layer in layers:
                linear(layer.weight.detach(), sum(map(sum, rows)))
            linear(head.weight.detach(), sum(c + r for _, c, r in rows))
            for p, c, r in rows:
                seen = round((p * p / 2 + c * (p + c / 2) + r * (p + r / 2)) / (p + c + r))
                q, k = torch.randn(heads, p + c + r, width), torch.randn(heads, width, seen)
                scores = torch.empty(heads, p + c + r, seen)
                once = [(q, k, scores), (scores, k.mT, q), (scores.mT, q, torch.empty_like(k.mT))]
                products.extend(2 * once * int(model.config.num_hidden_layers))  # type: ignore[union-attr]

    def step() -> None:
        for a, b, out in products:
            torch.matmul(a, b, out=out)

    return step


# --- measuring -------------------------------------------------------------------------------------------------------


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            began = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - began)
        if number:
            print(f"round {number} of {rounds}: " + ", ".join(f"{n} {t[-1]:.2f}" for n, t in times.items()), flush=True)
    return times


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of each round."""
    low, middle, high = np.percentile(np.array(over) / np.array(under), [25, 50, 75])
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def own_process(*arguments: str, ranks: int = 1) -> Any:
    """What `python -m verify.bench ARGUMENTS` prints as its last line, in a process of its own (or several)."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "verify.bench", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def candidate(name: str, folder: Path, pairs: train.Pairs, index: list[int], world: train.World) -> dict[str, Any]:
    kind, _, setting = name.partition(", ")
    if kind == "TRL":
        return trl_step(folder, pairs, index, setting.removesuffix(", 8 pairs at once"), 8 * ("8 pairs" in setting))
    if kind == "padded":
        return padded(folder, pairs, index)
    options: dict[str, Any] = {
        "dtype": "bfloat16" if "bfloat16" in setting else "float32",
        "cached": "no cache" not in setting,
    }
    # One micro-batch, as the baseline has one.
    options["budget"] = 10**6 if "whole batch" in setting else 0
    return ours(folder, pairs, index, world, **options)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(name: str, folder: Path, world: train.World) -> int:
    """Bytes by which the peak of a step exceeds what the process holds before it: weights, gradients and averages are
    there already, from a step on two pairs."""
    pairs = load_pairs(folder, PAIRS)
    index = list(range(PAIRS))
    made = candidate(name, folder, pairs, index, world)
    some = index[2:]
    del index[2:]
    made["step"]()
    index += some
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    made["step"]()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def measure_model(name: str, folder: Path, world: train.World, rounds: int, with_trl: bool) -> dict[str, Any]:
    pairs = load_pairs(folder, PAIRS)
    index = list(range(PAIRS))
    names = ["padded", "ours, no cache", "ours, cached", "ours, no cache, bfloat16", "ours, cached, bfloat16"]
    if with_trl:
        names += ["TRL, defaults", "TRL, float32", "TRL, compact, cached", "TRL, compact, cached, 8 pairs at once"]
    made = {n: candidate(n, folder, pairs, index, world) for n in names}
    exact = made["padded"]["logps"]()
    apart = {n: (made[n]["logps"]() - exact).abs().max().item() for n in names[1:] if "8 pairs" not in n}
    if wrong := [n for n, gap in apart.items() if "bfloat16" not in n and "defaults" not in n and not gap < 1e-2]:
        raise SystemExit(f"{wrong[0]} scores other log-probs than the padded forward, {apart[wrong[0]]} apart")
    steps: dict[str, Step] = {n: made[n]["step"] for n in names}
    steps["reference pass"] = made["ours, cached"]["score"]
    budget = train.micro_batch_tokens(train.model_config(str(folder)), 0, world)
    steps["limit"] = matmul_limit(plain_model(folder), pairs, index, budget)
    print(f"{name}: log-probs differ from those of the padded forward by at most {apart}", flush=True)
    times = in_turn(steps, rounds)
    memory = ["padded", "ours, cached", "ours, cached, whole batch"] + (names[-2:] if with_trl else [])
    lengths = np.array(pairs.lengths)
    prompts = np.array([len(p) for p in pairs.prompts])
    return {
        "parameters": sum(p.numel() for p in plain_model(folder).parameters()),
        "tokens": {
            "padded": 2
            * PAIRS
            * int(max(p + max(len(c), len(r)) for p, c, r in zip(prompts, pairs.chosen, pairs.rejected, strict=True))),
            "without padding": int((lengths + prompts).sum()),
            "each once": int(lengths.sum()),
        },
        "logps_apart": apart,
        "seconds": {n: round(float(np.median(t)), 4) for n, t in times.items()},
        "over_padded": {n: ratio(t, times["padded"]) for n, t in times.items()},
        "of_limit": {n: ratio(times["limit"], times[n]) for n in times if "bfloat16" not in n and n != "limit"},
        "over_dpo": own_process("--losses", "--rounds", str(rounds), "--model", str(folder)),
        "over_trl": {n: ratio(times["ours, cached"], times[n]) for n in names if n.startswith("TRL")},
        "sweep": measure_sweep(folder, world),
        "memory": {n: own_process("--memory", n, "--model", str(folder)) for n in memory},
    }


def measure_losses(folder: Path, world: train.World, rounds: int) -> dict[str, Any]:
    """Steps of the mixtures over those of DPO. They differ by less than the noise of a round: more rounds."""
    pairs, index = load_pairs(folder, PAIRS), list(range(PAIRS))
    names = ("dpo", "lognormal", "gamma")
    made = {name: ours(folder, pairs, index, world, ["--dist", name]) for name in names}
    times = in_turn({name: m["step"] for name, m in made.items()}, 4 * rounds)
    return {name: ratio(times[name], times["dpo"]) for name in names[1:]}


def measure_sweep(folder: Path, world: train.World) -> dict[str, Any]:
    """Seconds of the paper's nine configurations: ours from one reference pass, against nine padded runs with their own
    reference model, in turn. Each run loads its models and makes UPDATES updates, each on other pairs."""
    pairs = load_pairs(folder, UPDATES * PAIRS)
    batches = [list(range(start, start + PAIRS)) for start in range(0, len(pairs), PAIRS)]
    index = batches[0].copy()

    def run(make: Callable[[], dict[str, Any]]) -> float:
        gc.collect()
        began = time.perf_counter()
        step = make()["step"]
        for batch in batches:
            index[:] = batch
            step()
        return time.perf_counter() - began

    began = time.perf_counter()
    reference = train.load_model(str(folder), "float32", world, pairs)
    budget = train.micro_batch_tokens(train.model_config(str(folder)), 0, world)
    logps = train.score_all(reference, pairs, PAIRS, budget, world, "reference")
    del reference
    seconds: dict[str, Any] = {"reference pass": time.perf_counter() - began, "padded": [], "ours": []}
    for name, flags in CONFIGURATIONS.items():
        if name != "dpo-matched":  # a tenth, of ours
            seconds["padded"].append(run(lambda: padded(folder, pairs, index)))
            cached = torch.from_numpy(logps).float()
            seconds["ours"].append(run(partial(ours, folder, pairs, index, world, flags, reference_logps=cached)))
            print(f"sweep, {name}: padded {seconds['padded'][-1]:.2f}, ours {seconds['ours'][-1]:.2f}", flush=True)
    whole = seconds["reference pass"] + sum(seconds["ours"])
    return {
        "updates": UPDATES,
        "seconds": {n: np.round(t, 4).tolist() for n, t in seconds.items()},
        "over_padded": round(whole / sum(seconds["padded"]), 4),
    }


def measure_growth(folder: Path, world: train.World, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step against batch size and length."""
    found = []
    for count, length in ((16, 128), (64, 128), (256, 128), (64, 64), (64, 256)):
        pairs, index = load_pairs(folder, count, length), list(range(count))
        steps = {n: candidate(n, folder, pairs, index, world)["step"] for n in ("padded", "ours, cached")}
        times = in_turn(steps, rounds)
        entry = {"pairs": count, "max_length": length, "over_padded": ratio(times["ours, cached"], times["padded"])}
        found.append(entry | {"seconds": {n: round(float(np.median(t)), 4) for n, t in times.items()}})
    return found


def measure_ranks(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a step by one process with all threads, and by two with half of them each, in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for ranks, seconds in times.items():
            seconds.append(own_process("--step", "--model", str(folder), ranks=ranks))
    return {
        "seconds": {str(r): round(float(np.median(t)), 4) for r, t in times.items()},
        "two_over_one": ratio(times[2], times[1]),
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(ImportError):
        import trl

        versions["trl"] = trl.__version__
    return {"processor": model, "threads": torch.get_num_threads(), "versions": versions}


# --- the table -------------------------------------------------------------------------------------------------------


def goals(result: dict[str, Any]) -> list[tuple[str, float, dict[str, float]]]:
    """(goal, bound, per model the figure); a bound is an upper one, except that of the limit."""

    def each(value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return {name: value(m) for name, m in result["models"].items()}

    def over_padded(name: str) -> dict[str, float]:
        return each(lambda m: m["over_padded"][name]["median"])

    def memory(name: str) -> dict[str, float]:
        return each(lambda m: m["memory"][name] / m["memory"]["padded"])

    rows = [
        ("step / padded, no cache", 0.45, over_padded("ours, no cache")),
        ("step / padded, cached", 0.33, over_padded("ours, cached")),
        ("bfloat16 step / padded, cached", 0.20, over_padded("ours, cached, bfloat16")),
        (
            "fraction of the matmul limit, cached (at least)",
            0.75,
            each(lambda m: m["of_limit"]["ours, cached"]["median"]),
        ),
        ("memory / padded, default micro-batches", 0.15, memory("ours, cached")),
        ("memory / padded, one micro-batch", 0.75, memory("ours, cached, whole batch")),
        ("nine-run sweep / nine padded runs", 0.36, each(lambda m: m["sweep"]["over_padded"])),
        ("lognormal step / dpo step", 1.01, each(lambda m: m["over_dpo"]["lognormal"]["median"])),
        ("gamma step / dpo step", 1.01, each(lambda m: m["over_dpo"]["gamma"]["median"])),
    ]
    if all(m["over_trl"] for m in result["models"].values()):
        # The fastest of TRL's settings is the one with the largest ratio of ours to it.
        best = each(lambda m: max(r["median"] for r in m["over_trl"].values()))
        rows.insert(3, ("step / TRL's best comparable setting, both cached", 0.50, best))
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def short(result: dict[str, Any]) -> str:
    rows = []
    for goal, bound, values in goals(result):
        met = [v >= bound if "at least" in goal else v <= bound for v in values.values()]
        verdict = "yes" if all(met) else "no" if not any(met) else "partly"
        rows.append([goal, f"{bound:.2f}", *(f"{v:.3f}" for v in values.values()), verdict])
    return table(["goal", "bound", *result["models"], "met"], rows)


def markdown(result: dict[str, Any]) -> str:
    where = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    lines = ["# Speed and memory of a training step", "", "Written by `nox -s bench`; do not edit.", ""]
    lines.append(
        f"{where['processor']}, {where['threads']} threads, {versions}; {PAIRS} pairs of {result['data']} at "
        f"{MAX_LENGTH}/{MAX_PROMPT_LENGTH} tokens, float32 if not said otherwise; medians (and quartiles) of "
        f"{result['rounds']} rounds."
    )
    lines += ["", short(result), ""]
    for name, m in result["models"].items():
        tokens = ", ".join(f"{k} {v:,}" for k, v in m["tokens"].items())
        lines += [f"## {name}, {m['parameters']:,} parameters", "", f"Tokens of a step: {tokens}.", ""]
        rows = []
        for n, seconds in m["seconds"].items():
            over = m["over_padded"][n]
            limit = f"{m['of_limit'][n]['median']:.3f}" if n in m["of_limit"] else ""
            apart = f"{m['logps_apart'][n]:.1e}" if n in m["logps_apart"] else ""
            memory = f"{m['memory'][n] / 2**20:,.0f}" if n in m["memory"] else ""
            ratios = f"{over['median']:.3f} ({over['low']:.3f} to {over['high']:.3f})"
            rows.append([n, f"{seconds:.3f}", ratios, limit, apart, memory])
        header = ["step", "seconds", "over padded", "limit over it", "log-probs differ by at most", "memory, MiB"]
        lines += [table(header, rows), ""]
        lines += [f"In one micro-batch ours takes {m['memory']['ours, cached, whole batch'] / 2**20:,.0f} MiB.", ""]
        sweep = m["sweep"]["seconds"]
        lines += [
            f"The paper's nine configurations, {m['sweep']['updates']} updates each: ours {sum(sweep['ours']):.1f} s "
            f"and {sweep['reference pass']:.1f} s for the one reference pass, nine padded runs "
            f"{sum(sweep['padded']):.1f} s. Loading the models is within, evaluation in neither.",
            "",
        ]
        dists = [[n, *(f"{r[k]:.3f}" for k in ("median", "low", "high"))] for n, r in m["over_dpo"].items()]
        lines += [table(["step over that of dpo", "median", "lower quartile", "upper"], dists), ""]
    rows = []
    for g in result["growth"]:
        seconds = [f"{value:.3f}" for value in g["seconds"].values()]
        rows.append([str(g["pairs"]), str(g["max_length"]), *seconds, f"{g['over_padded']['median']:.3f}"])
    lines += [
        "## Growth (llama)",
        "",
        table(["pairs", "max length", "padded, s", "ours, cached, s", "ratio"], rows),
        "",
    ]
    ranks = result["ranks"]
    lines += [
        f"Two processes with half the threads each take {ranks['two_over_one']['median']:.3f} of the step time of one "
        f"({ranks['seconds']['2']:.3f} s against {ranks['seconds']['1']:.3f} s, llama).",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m verify.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where bench.json and bench.md go")
    parser.add_argument("--readme", type=Path, help="only write the tables of the saved results, here too")
    parser.add_argument("--memory", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--losses", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    train.quiet_libraries()
    train.datasets.disable_progress_bars()
    path = args.output_dir / "bench.json"
    if args.readme:
        saved = json.loads(path.read_text(encoding="utf-8"))
        write(args.output_dir / "bench.md", markdown(saved))
        into_readme(short(saved), args.readme, BEGIN, END)
        return 0
    with train.start_processes() as world:
        if args.memory:
            print(measure_memory(args.memory, args.model, world))
            return 0
        if args.losses:
            print(json.dumps(measure_losses(args.model, world, args.rounds)))
            return 0
        if args.step:
            pairs = load_pairs(args.model, PAIRS)
            step = candidate("ours, cached", args.model, pairs, list(range(PAIRS)), world)["step"]
            world.print(str(float(np.median(in_turn({"step": step}, 3)["step"]))))
            return 0
        with_trl = "trl" in machine()["versions"]
        result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "data": source()[0]}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_models(folder)
            result["models"] = {m: measure_model(m, folder / m, world, args.rounds, with_trl) for m in MODELS}
            result["growth"] = measure_growth(folder / "llama", world, max(1, args.rounds // 2))
            result["ranks"] = measure_ranks(folder / "llama", max(1, args.rounds // 2))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(result, indent=1) + "\n")
    write(args.output_dir / "bench.md", markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
