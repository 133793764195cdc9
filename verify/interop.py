"""python -m verify.interop [README.md]: runs the README's snippets, plain loop and TRL, as they stand there.

Needs TRL. The fenced Python block under each heading is extracted and executed with a small random Llama, a tokenizer
built here and sixteen made-up pairs; then the claims made for it are asserted: the strength and the policy move, the
loss is mixdpo_loss on the same log-probs, the strength has its own learning rate, and the checkpoint holds it.
"""

import copy
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import tokenizers
import torch
import transformers
import trl
from torch import Tensor

import mixdpo

HEADINGS = ("A plain loop", "TRL")
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "yes", "no", "maybe", "please", "why"]


def snippet(readme: str, heading: str) -> str:
    """The first fenced Python block below a heading of any level."""
    section = re.search(rf"^#+ {re.escape(heading)}\s*$(.*?)(?=^#+ (?!.*```)|\Z)", _masked(readme), re.M | re.S)
    if not section:
        raise SystemExit(f"no heading {heading!r} in the README")
    block = re.search(r"^```python\n(.*?)^```", readme[section.start(1) : section.end(1)], re.M | re.S)
    if not block:
        raise SystemExit(f"no Python block below {heading!r} in the README")
    return block.group(1)


def _masked(readme: str) -> str:
    """The text with the '#' of fenced blocks blanked, in place: comments are not headings."""
    return re.sub(r"^```.*?^```", lambda m: m.group().replace("#", " "), readme, flags=re.M | re.S)


def tiny_model(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def pairs() -> list[dict[str, str]]:
    letters = "abcdefghijklmnop"
    return [
        {"prompt": f"please {c} why ", "chosen": f"yes {c} {letters[i - 1]}", "rejected": "no maybe no"}
        for i, c in enumerate(letters)
    ]


def log_probs(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Written apart from TRL's and from the README's: double precision, one token at a time."""
    logits = model(ids).logits.double()
    total = torch.zeros(len(ids), dtype=torch.float64)
    for t in range(1, ids.shape[1]):
        normal = torch.logsumexp(logits[:, t - 1], -1)
        total = total + mask[:, t] * (logits[torch.arange(len(ids)), t - 1, ids[:, t]] - normal)
    return total


def say(text: str, ok: bool) -> None:
    print(("ok    " if ok else "WRONG ") + text, flush=True)
    if not ok:
        raise SystemExit(1)


def changed(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def plain_loop(code: str) -> None:
    policy, reference = tiny_model(0), tiny_model(0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (6, 2, 4, 12), generator=generator)
    mask = (torch.arange(12) >= 5).long().expand(4, 12)
    batches = [{"chosen": c, "rejected": r, "chosen_mask": mask, "rejected_mask": mask} for c, r in ids]
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    space: dict[str, Any] = {"policy": policy, "reference": reference, "batches": batches}
    exec(compile(code, "README.md: a plain loop", "exec"), space)
    strength = space["strength"]
    say("plain loop: the policy moved", changed(policy, before))
    start = mixdpo.Gamma(concentration=2.0, rate=16.7)
    say(
        f"plain loop: the strength moved, mean {start.mean:.6f} -> {strength.mean:.6f}",
        strength.mean.item() != start.mean.item(),
    )


def trl_loss(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """DPOTrainer's loss on a collated batch, and mixdpo_loss on log-probs computed here."""
    torch.manual_seed(0)  # the same draws, where the strength draws
    loss = trainer.compute_loss(trainer.model, batch)
    ids, mask = batch["input_ids"], batch["completion_mask"]
    with torch.no_grad():
        chosen, rejected = log_probs(trainer.model, ids, mask).chunk(2)
        reference_chosen, reference_rejected = log_probs(trainer.ref_model, ids, mask).chunk(2)
    strength = getattr(trainer.beta, "strength", None) or mixdpo.PointMass(trainer.beta)
    torch.manual_seed(0)
    noise = None
    if isinstance(strength, mixdpo.LogNormal) and strength.estimator == "monte_carlo":
        noise = torch.randn(len(chosen), strength.samples)
    ours, _, _ = mixdpo.mixdpo_loss(chosen, rejected, reference_chosen, reference_rejected, strength, noise)
    return loss.detach(), ours.mean().detach()


def with_trl(code: str, folder: str) -> None:
    model, ref_model, tokenizer = tiny_model(0), tiny_model(0), tiny_tokenizer()
    dataset = datasets.Dataset.from_list(pairs())
    args = trl.DPOConfig(
        output_dir=folder, per_device_train_batch_size=4, num_train_epochs=2, save_steps=4, logging_steps=2,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    space: dict[str, Any] = {
        "model": model, "ref_model": ref_model, "tokenizer": tokenizer, "dataset": dataset, "args": args
    }  # fmt: skip
    exec(compile(code, "README.md: TRL", "exec"), space)
    trainer: Any = space["trainer"]
    strength: Any = model.strength
    say(f"TRL: DPOTrainer is TRL's own, {trainer.state.global_step} steps", type(trainer) is trl.DPOTrainer)
    say("TRL: the policy moved", changed(model, before))
    say(
        f"TRL: the strength moved, mean {2 / 16.7:.6f} -> {strength.mean:.6f}, cv {2**-0.5:.6f} -> {strength.cv:.6f}",
        abs(strength.mean.item() - 2 / 16.7) > 1e-6,
    )
    groups = trainer.optimizer.param_groups
    own = [g for g in groups if any(p is q for p in g["params"] for q in strength.parameters())]
    say(
        f"TRL: learning rates {[g['initial_lr'] for g in groups]}, the strength's two parameters in one group",
        len(own) == 1 and len(own[0]["params"]) == 2 and own[0]["initial_lr"] == 1e-4 and len(groups) == 2,
    )
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ref_model.load_state_dict(tiny_model(1).state_dict())  # another reference, so that margins are well away from 0
    for name, beta in (
        ("Gamma, learned", trainer.beta),
        ("LogNormal, quadrature", type(trainer.beta)(mixdpo.LogNormal(estimator="quadrature"))),
        ("LogNormal, Monte Carlo", type(trainer.beta)(mixdpo.LogNormal())),
        ("PointMass(0.1)", type(trainer.beta)(mixdpo.PointMass(0.1))),
        ("TRL's own beta = 0.1", 0.1),
    ):
        trainer.beta = beta
        theirs, ours = trl_loss(trainer, batch)
        gap = abs(theirs.item() - ours.item())
        say(f"TRL: loss {theirs:.7f} is mixdpo_loss on the same log-probs, {name}: {gap:.1e} apart", gap < 1e-6)
    checkpoint = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[-1]
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    held = {name: weights.get(f"strength.{name}") for name, _ in strength.named_parameters()}
    say(
        f"TRL: {checkpoint.name} holds {', '.join(f'strength.{name}' for name in held)} as trained",
        all(value is not None and torch.equal(value, strength.get_parameter(name)) for name, value in held.items()),
    )
    saved = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    say("TRL: the checkpoint loads as a plain model", not hasattr(saved, "strength"))
    resumed(code, space, folder, checkpoint, copy.deepcopy(strength))


def resumed(code: str, space: dict[str, Any], folder: str, checkpoint: Path, last: Any) -> None:
    """Two halves: the snippet again on a fresh model, resumed from the middle, must end where the first run ended."""
    middle = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    code = code.replace("trainer.train()", f"trainer.train(resume_from_checkpoint={str(middle)!r})")
    again: dict[str, Any] = {**space, "model": tiny_model(0), "ref_model": tiny_model(0)}
    exec(compile(code, "README.md: TRL, resumed", "exec"), again)
    got: Any = again["model"].strength
    gap = max(abs(got.mean.item() - last.mean.item()), abs(got.cv.item() - last.cv.item()))
    say(f"TRL: resumed from {middle.name}, the strength ends where it did: {gap:.1e} apart", gap < 1e-7)


def main() -> None:
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md").read_text(encoding="utf-8")
    transformers.logging.set_verbosity_error()
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    plain_loop(snippet(readme, HEADINGS[0]))
    with tempfile.TemporaryDirectory() as folder:
        with_trl(snippet(readme, HEADINGS[1]), folder)
    print("both snippets do what the README says")


if __name__ == "__main__":
    main()
