"""Win rates end to end against a server that nobody here wrote: `transformers serve`.

Trains small policies, generates in this process and through the server, compares the two, teaches a small model to
answer with m or M, lets it judge through the same server, and prints the table. The server gives no log-probs, so this
is also the proof that the choice is then taken from the text, and labelled so.
"""

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import evaluate
import train

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def run(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def make_judge(path: Path, steps: int = 60) -> None:
    """A byte-level Llama of 0.1 M parameters that ends every conversation with m or M: m if the first answer is longer,
    as far as it learns that."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = train.byte_tokenizer()
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes, **special)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for _ in range(4):
            words = ["word " * rng.randint(1, 12) for _ in range(2)]
            texts = {"instruction": "word?", "first": words[0], "second": words[1]}
            messages = evaluate.fill(evaluate.TEMPLATE, texts)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            target = tokenizer.encode("m" if len(words[0]) >= len(words[1]) else "M")
            logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target)) / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"judge: loss {loss.item():.3f} nats after {steps} steps (0.693: either identifier, by chance)")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def serve(log: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as f, subprocess.Popen([*command, "--device", "cpu"], stdout=f, stderr=f) as process:
        try:
            for _ in range(240):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with status {process.returncode}: see {log}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/judge")
    parser.add_argument("--prompts", default="48")
    args = parser.parse_args()
    runs = Path(args.output_dir)
    shutil.rmtree(runs, ignore_errors=True)
    small = ["--preset", "tiny", "--max-pairs", "640", "--batch-size", "32", "--sft-dir", str(runs / "sft")]
    for name in ("dpo", "gamma"):
        run("train.py", *small, "--dist", name, "--output-dir", str(runs / name))
    policies = [str(runs / name) for name in ("dpo/policy", "gamma/policy", "sft")]
    ask = ["--prompts", args.prompts, "--max-new-tokens", "64"]
    # Sampled, as the demo's prompts repeat; the answers through the server are greedy, to be compared.
    sampled = ["--temperature", "0.7", "--output-dir", str(runs / "answers")]
    answers = runs / "answers"
    run("evaluate.py", "generate", "--policy", *policies, *ask, *sampled)
    run("evaluate.py", "generate", "--policy", policies[1], *ask, "--output-dir", str(runs / "greedy"))
    make_judge(runs / "judge-model")
    with serve(runs / "server.log") as url:
        served = ["--url", url, "--concurrency", "2", "--output-dir", str(runs / "served")]
        run("evaluate.py", "generate", "--policy", policies[1], *ask, *served)
        texts = [
            [json.loads(line)["output"] for line in (runs / where / "gamma.jsonl").read_text().splitlines()]
            for where in ("greedy", "served")
        ]
        equal = sum(here == there for here, there in zip(*texts, strict=True))
        print(f"gamma: {equal} of {len(texts[0])} answers are the same in this process and through the server")
        judge = ["--policy", str(answers / "dpo.jsonl"), str(answers / "gamma.jsonl")]
        judge += ["--baseline", str(answers / f"{runs.name}-sft.jsonl"), "--output-dir", str(runs / "judgements")]
        judge += ["--judge-url", url, "--judge-model", str(runs / "judge-model"), "--concurrency", "4"]
        run("evaluate.py", "judge", *judge)
        run("evaluate.py", "judge", *judge)  # all from the cache
    run("evaluate.py", "winrate", "--judgements", *map(str, sorted((runs / "judgements").glob("*-vs-*.json"))))
    return 0 if equal >= 0.9 * len(texts[0]) else 1


if __name__ == "__main__":
    sys.exit(main())
