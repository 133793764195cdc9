"""Preference training with MixDPO or DPO: one command from preference pairs to an exported policy.

Try it (no network, no GPU, about a minute):

    python train.py --preset tiny --dist gamma

Train a real model on 8 GPUs, or on one:

    torchrun --nproc_per_node 8 train.py --dist gamma --model EleutherAI/pythia-2.8b --dataset hh
    python train.py --dist lognormal --dataset my_pairs.jsonl --output-dir runs/mine

The stages, in the order of this file: read the preference data and split it; tokenise and truncate, counting what is
lost; SFT on the chosen responses (once per model and data set, share it with --sft-dir); one pass of the reference
model, whose log-probs are cached (share them with --reference-cache); training of the policy; export.

A run leaves in --output-dir: config.json (every flag), data.json (rows read, dropped, truncated, and why),
metrics.jsonl (one object a line), reference.safetensors, checkpoints/, policy/ (loads with from_pretrained) and
strength.json. The same command again goes on with a run that was interrupted; status 75 says that it can.

Every rank is a process under FSDP2, also when there is only one, so that there is one code path. Data order and Monte
Carlo draws are functions of the seed and the position in the data: they do not depend on the number of ranks.
"""

import argparse
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import transformers
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, async_save, load
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import mixdpo
from mixdpo import Gamma, LogNormal, PointMass, mixdpo_loss

Strength = PointMass | LogNormal | Gamma


class UserError(Exception):
    """A mistake of the user's: main() prints it as one line and exits with status 2."""

    status = 2


class Unwritable(UserError):
    """No space, or no permission, in the middle of a run: one line and status 1; the last checkpoint is whole."""

    status = 1


class Interrupted(UserError):
    """A signal came and the run has saved its state: one line and status 75, EX_TEMPFAIL, "try again"."""

    status = 75


# --- configuration: the single source of flags, help and config.json -------------------------------------------------


def flag(default: Any, help: str, bound: str = "> 0") -> Any:
    """bound: of a number: "> 0", ">= 0" or "" for any finite value."""
    return field(default=default, metadata={"help": help, "bound": bound})


@dataclass(frozen=True)
class Config:
    dist: Literal["dpo", "lognormal", "gamma"] = flag("gamma", "distribution of the preference strength beta")
    preset: Literal["none", "tiny"] = flag(
        "none", "tiny: random-weight model, byte tokenizer, demo data; other flags win"
    )
    model: str = flag("EleutherAI/pythia-2.8b", "hub id or local directory (safetensors); 'tiny' is built in code")
    dataset: str = flag("hh", "prism, community-alignment, hh, demo, or a .jsonl, .csv or .parquet file")
    data_dir: str = flag("", "local copy of the data set's hub repository, instead of a download")
    pairing: Literal["all", "one"] = flag(
        "all", "prism, community-alignment: chosen against each other candidate, or one"
    )
    language: str = flag("en", "community-alignment: assigned language to keep; all for every one")
    annotator_column: str = flag("annotator", "own file: the column that names the annotator")
    output_dir: str = flag("", "where the run goes; runs/<model>-<dataset>-<dist> when empty")
    sft_dir: str = flag("", "SFT checkpoint to start from, trained there if absent; <output-dir>/sft when empty")
    reference_cache: str = flag(
        "", "reference log-probs, shared by a sweep; <output-dir>/reference.safetensors when empty"
    )

    beta: float = flag(0.1, "dpo: the fixed strength")
    loc: float = flag(-2.3, "lognormal: initial mean of log beta", "")
    scale: float = flag(0.6, "lognormal: initial standard deviation of log beta")
    estimator: Literal["monte_carlo", "quadrature"] = flag("monte_carlo", "lognormal: the paper's, or deterministic")
    samples: int = flag(16, "lognormal: Monte Carlo draws per pair")
    concentration: float = flag(2.0, "gamma: initial shape")
    rate: float = flag(16.7, "gamma: initial rate")
    beta_lr: float = flag(1e-4, "learning rate of the strength parameters; 0 keeps them fixed", ">= 0")

    batch_size: int = flag(64, "pairs per update, over all ranks")
    eval_batch_size: int = flag(32, "pairs scored at once in evaluation and in the reference pass, over all ranks")
    micro_batch_tokens: int = flag(
        0, "tokens a rank holds at once, padding included; 0: as memory allows; lower it when memory is short", ">= 0"
    )
    activation_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, slower")
    compile: bool = flag(False, "torch.compile each block: minutes at the start, for long runs on a GPU")
    lr: float = flag(5e-7, "learning rate of the policy (RMSprop)")
    warmup: int = flag(150, "updates of linear warm-up, then constant", ">= 0")
    max_grad_norm: float = flag(1.0, "clipping of the policy's gradient; the strength's gradient is not clipped")
    max_length: int = flag(128, "tokens of prompt and response together")
    max_prompt_length: int = flag(64, "tokens kept of a prompt that has to be cut (its end)")
    eval_every: int = flag(1984, "examples between evaluations, rounded down to whole updates")
    eval_pairs: int = flag(425, "validation pairs per evaluation")
    max_pairs: int = flag(55_000, "training pairs, sampled after the split")
    epochs: int = flag(1, "passes over the training pairs")
    seed: int = flag(0, "seeds the split, the sampling, the order, the draws and random weights", ">= 0")
    sft_lr: float = flag(5e-7, "learning rate of SFT (RMSprop, same warm-up)")
    sft_epochs: int = flag(1, "passes of SFT over the chosen responses", ">= 0")
    save_every: int = flag(9_920, "examples between checkpoints, rounded down to whole updates; one is at the end")
    keep: int = flag(2, "checkpoints kept")
    resume: bool = flag(True, "go on with an unfinished run in --output-dir; --no-resume refuses it")
    policy_dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "compute dtype over float32 master weights")
    reference_dtype: Literal["bfloat16", "tfloat32", "float32"] = flag(
        "float32", "compute dtype of the reference pass; tfloat32: float32 with the GPU's shorter products"
    )
    logger: Literal["none", "tensorboard", "wandb"] = flag("none", "where metrics go beside metrics.jsonl")
    demo_heterogeneity: float = flag(
        0.5, "demo: coefficient of variation of the annotators' strength, 0 for none", ">= 0"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # 0.9 M parameters; 62 updates of SFT and 31 of preference training, about a minute on two cores.
    "tiny": {
        "model": "tiny",
        "dataset": "demo",
        "max_pairs": 1984,
        "eval_every": 640,
        "lr": 1e-4,
        "warmup": 5,
        "beta_lr": 1e-3,
        "sft_lr": 1e-3,
        "sft_epochs": 2,
        "policy_dtype": "float32",
    },
}

# What a run leaves may be compared and shared whatever these are.
LOCATION_FLAGS = ("output_dir", "sft_dir", "reference_cache", "data_dir", "preset", "keep", "resume", "logger")


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show where an error was raised, too")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in sys.argv[1:] if args is None else args:
            if not word.isprintable():  # bytes of another encoding could neither be written into a file nor printed
                self.error(f"{word!r} holds characters that are no text: rename or retype it")
            if max(map(len, word.encode().split(b"/"))) > 255:
                self.error(f"{word[:40]}... is longer than a name can be (255 bytes): shorten it")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def printable(text: str) -> str:
    """Text from outside on one line: what would break it, or steer a terminal, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def report_error(program: str, error: UserError | OSError, argv: Sequence[str] | None) -> int:
    """Prints a mistake, or a disk that takes no more, as one line, after its traceback with --debug; returns the exit
    status. Raises any other OSError."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            raise error
        place, rank = error.filename or "a file", "0"  # other ranks do not know of it
        error = Unwritable(f"{place} cannot be read or written ({error.strerror}): mend that and start again")
    if rank == "0":
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exception(error)
        print(f"{program}: {'' if error.status == 75 else 'error: '}{printable(str(error))}", file=sys.stderr)
    return error.status


def parse_config(argv: Sequence[str] | None = None) -> Config:
    parser = Parser(prog="train.py", description=__doc__)
    for f in dataclasses.fields(Config):
        kind: dict[str, Any] = {"type": f.type, "metavar": getattr(f.type, "__name__", "").upper()}
        if get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        elif f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} (default: {f.default!r})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    preset = parser.parse_args(argv).preset
    parser.set_defaults(**PRESETS[preset])
    values = vars(parser.parse_args(argv))
    del values["debug"]
    config = Config(**values)
    name = f"{Path(config.model).name}-{Path(config.dataset).stem}-{config.dist}"
    output_dir = config.output_dir or f"runs/{name}"
    return check_config(
        dataclasses.replace(
            config,
            output_dir=output_dir,
            sft_dir=config.sft_dir or f"{output_dir}/sft",
            reference_cache=config.reference_cache or f"{output_dir}/reference.safetensors",
        )
    )


def check_config(config: Config) -> Config:
    for f in dataclasses.fields(Config):
        value, bound = getattr(config, f.name), f.metadata["bound"]
        if get_origin(f.type) is Literal:
            fits = value in get_args(f.type)
        else:  # a config.json may write 1 for 1.0
            fits = type(value) is f.type or (f.type is float and type(value) is int)
        if not fits:
            raise UserError(f"--{f.name.replace('_', '-')} {value!r} is not of its type: see --help")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            inside = {"> 0": value > 0, ">= 0": value >= 0, "": True}[bound]
            size = "finite" if f.type is float else "below 2**63"
            if not (abs(value) < (math.inf if f.type is float else 2**63) and inside):
                raise UserError(
                    f"--{f.name.replace('_', '-')} must be {size}{' and ' * bool(bound)}{bound}, got {value}"
                )
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"--max-prompt-length {config.max_prompt_length} leaves no room for a response in --max-length "
            f"{config.max_length}: lower the first or raise the second"
        )
    if 0 < config.micro_batch_tokens < 2 * config.max_length:
        raise UserError(
            f"--micro-batch-tokens {config.micro_batch_tokens} cannot hold one pair of --max-length "
            f"{config.max_length}: at least {2 * config.max_length}, or 0 to choose it from memory"
        )
    if config.samples > 2**16:
        raise UserError(
            f"--samples {config.samples} draws for every pair of a batch fill the memory: choose {2**16} or fewer"
        )
    if not 1e-100 < config.demo_heterogeneity < 1e100 and config.demo_heterogeneity:
        raise UserError(f"--demo-heterogeneity must be 0 or in (1e-100, 1e100), got {config.demo_heterogeneity}")
    strength = make_strength(config)
    mean, variance = strength.mean.item(), strength.variance.item()
    if not (0 < mean < math.inf and variance < math.inf):
        raise UserError(
            f"{strength} has mean {mean:g} and variance {variance:g} in float32, which have to be finite and > 0: give "
            "less extreme parameters"
        )
    return config


# --- files: written aside, then renamed, so that a half-written file is never taken for a whole one ------------------


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes durable what a file holds, or which names a directory holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises Unwritable for no space and the like, which is an OSError from Python alone."""
    try:
        yield
    except (Exception, CheckpointException) as e:
        if not isinstance(e, (OSError, CheckpointException)) and "(os error " not in str(e):
            raise
        raise Unwritable(
            f"{path} cannot be written ({str(e).strip().splitlines()[-1]}): make room and start again, the run goes on"
        ) from e


def publish(aside: Path, place: Path) -> None:
    """Makes the files of a directory durable and puts it in its place."""
    for file in aside.rglob("*"):
        sync(file)
    sync(aside)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(aside, place)
    sync(place.parent)


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({e}): repair or remove it, or name another") from e
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}: repair or remove it")
    return value


def writable_directory(flag: str, path: Path) -> Path:
    """The directory, made if absent; raises UserError, before the work, where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be written ({e.strerror}): choose another directory") from e
    return path


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k} {old.get(k)!r} there, {new.get(k)!r} here" for k in keys)


def unfinished(path: str) -> Path:
    """Where the state is kept of what is being made at `path`."""
    return Path(f"{Path(path)}.part")


def hold(flag: str, path: Path, lock: contextlib.ExitStack) -> None:
    """Locks a directory until `lock` is closed. The system's lock goes with the process: a crash leaves none behind."""
    path.mkdir(parents=True, exist_ok=True)
    handle = lock.enter_context(open(path / "lock", "w"))  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{flag} {path} is in use by another run: wait for it, or choose another directory") from None


def claim_output_dir(config: Config, lock: contextlib.ExitStack) -> None:
    """Locks the directory and writes config.json, or refuses one that holds another run or something else."""
    path = Path(config.output_dir)
    mine = {k: v for k, v in dataclasses.asdict(config).items() if k not in LOCATION_FLAGS}
    try:
        if (path / "config.json").exists():
            found = read_json(path / "config.json")
            theirs = {k: v for k, v in found.items() if k not in LOCATION_FLAGS}
            if theirs != mine:
                raise UserError(
                    f"--output-dir {path} holds a run of another configuration ({differences(theirs, mine)}): "
                    "choose another directory"
                )
            if (path / "strength.json").exists():
                raise UserError(
                    f"--output-dir {path} holds this very run, finished: choose another directory to repeat it"
                )
            if not config.resume:
                raise UserError(
                    f"--output-dir {path} holds this run, unfinished: leave out --no-resume to go on with it, "
                    "or choose another directory"
                )
        elif path.exists() and any(p.name not in ("sft", "lock", "config.json.tmp") for p in path.iterdir()):
            raise UserError(f"--output-dir {path} is not empty and holds no config.json: choose another directory")
        hold("--output-dir", path, lock)
        write_json(path / "config.json", dataclasses.asdict(config))
    except OSError as e:
        raise UserError(f"--output-dir {path} cannot be written ({e}): choose another directory") from e


# --- data: every loader yields prompt, chosen, rejected, annotator, conversation, turn, and attribute columns --------

# choice_set links the rows that come from judgements of the same candidates; null where nothing can be linked.
COLUMNS = ("prompt", "chosen", "rejected", "annotator", "conversation", "turn", "choice_set")
# source: the split that the file itself names, or null. opening: the first human turn, which no two splits may share.
# dropped: null, or the reason why the row is not used.
INTERNAL = ("source", "opening", "dropped")
SPLITS = ("train", "validation", "test")
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # rows cached by other code are not taken for ours
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

Row = dict[str, Any]


LONGEST_LINE = 2**26  # bytes of a line or a CSV field: far above any answer, far below what would fill the memory
MOST_EXPANSION = 100  # of a .gz file above that size; text shrinks 3 to 10 times
MOST_COLUMNS = 1000
LONGEST_TEXT = 2**20  # characters of a prompt or a response; longer rows are dropped, and counted


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file or a .gz of one; raises UserError for a line or an expansion beyond the limits."""
    most = max(LONGEST_LINE, MOST_EXPANSION * path.stat().st_size)
    read = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        while line := f.readline(LONGEST_LINE + 1):
            read += len(line)
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path} has a line of more than {LONGEST_LINE} bytes: split or remove it")
            if read > most:
                raise UserError(f"{path} expands to more than {most} bytes, too many for its size: unpack it yourself")
            yield line.decode("utf-8-sig" if read == len(line) else "utf-8")  # spreadsheets put a mark before the first


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line of a .jsonl or .jsonl.gz file."""
    number = 0
    try:
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise UserError(
                        f"{path}, line {number}: expected a JSON object, got {type(value).__name__}: repair or remove "
                        "the line"
                    )
                if "\\ud" in line.lower():
                    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
                yield number, value
    except UnicodeEncodeError as e:
        raise UserError(f"{path}, line {number}: a lone surrogate is no text ({e.reason}): repair or remove it") from e
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise UserError(f"{path}, after line {number}: cannot be read ({e}): the file may be incomplete") from e
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
        raise UserError(f"{path}, line {number}: not JSON ({reason}): repair or remove the line") from e


def text_row(prompt: list[str], chosen: Any, rejected: Any, **values: Any) -> Row:
    """prompt: human and assistant texts in turn, ending with a human one, all written in HH's dialogue format.

    The prompt ends at the colon of "Assistant:", so a response starts with its one space.
    """
    row: Row = dict.fromkeys((*COLUMNS, *INTERNAL)) | {"opening": prompt[0].strip(), "turn": len(prompt) // 2} | values
    tags = itertools.cycle((HUMAN, ASSISTANT))
    row["prompt"] = "".join(f"{tag} {text.strip()}" for tag, text in zip(tags, prompt, strict=False)) + ASSISTANT
    return row | {"chosen": f" {chosen.strip()}", "rejected": f" {rejected.strip()}"}


def dropped_row(reason: str) -> Row:
    return dict.fromkeys((*COLUMNS, *INTERNAL)) | {"dropped": reason}


def split_hh(text: str) -> tuple[str, str]:
    """(dialogue up to and with its last "Assistant:", the rest)."""
    cut = text.rfind(ASSISTANT) + len(ASSISTANT)
    return text[:cut], text[cut:]


def hh_row(chosen: Any, rejected: Any) -> Row:
    """One HH comparison; its prompt is kept to the letter."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return dropped_row("field is not a string")
    if ASSISTANT not in chosen or ASSISTANT not in rejected:
        return dropped_row("no Assistant turn")
    prompt, chosen = split_hh(chosen)
    other, rejected = split_hh(rejected)
    if HUMAN in chosen or HUMAN in rejected:
        return dropped_row("last turn is Human")
    if prompt != other:
        return dropped_row("prompts differ")
    opening = prompt.split(ASSISTANT)[0].removeprefix(HUMAN)
    turn = prompt.count(HUMAN) - 1
    return text_row([opening], chosen, rejected, conversation=opening.strip(), turn=turn) | {"prompt": prompt}


def read_hh(files: list[str]) -> Iterator[Row]:
    for file in files:
        path = Path(file)
        for _, source in read_lines(path):
            row = hh_row(source.get("chosen"), source.get("rejected"))
            yield row | {"source": path.name.split(".")[0], "subset": path.parent.name}


def pick(others: list[Any], pairing: str, key: str) -> list[Any]:
    """With pairing "one" a single candidate, drawn by a hash of the key and never by its position."""
    if pairing == "all" or not others:
        return others
    return [others[int(uniform(0, key) * len(others))]]


PRISM_ATTRIBUTES = ("conversation_type", "age", "gender", "education", "employment_status", "ethnicity", "region")
PRISM_TYPES = {"conversation_id": str, "turn": int, "user_id": str, "user_prompt": str, "model_response": str}


def prism_people(path: Path) -> dict[str, dict[str, str | None]]:
    people = {}
    for number, row in read_lines(path):
        if not isinstance(row.get("user_id"), str):
            raise UserError(f"{path}, line {number}: no user_id: download the file again")
        if row["user_id"] in people:
            raise UserError(f"{path}, line {number}: {row['user_id']} was there before: download the file again")
        nested = {"ethnicity": ("ethnicity", "simplified"), "region": ("location", "special_region")}
        person = {name: row.get(name) for name in ("age", "gender", "education", "employment_status")}
        try:
            person |= {name: (row.get(outer) or {}).get(inner) for name, (outer, inner) in nested.items()}
        except AttributeError:
            raise UserError(
                f"{path}, line {number}: ethnicity or location is no object: download the file again"
            ) from None
        people[row["user_id"]] = person
    return people


def read_prism(files: list[str], pairing: str) -> Iterator[Row]:
    """files: utterances.jsonl and survey.jsonl. Every utterance is a chosen one, or a row, used or dropped.

    Grouped by (conversation_id, turn), as interaction_id does not follow the order of turns. On later turns two equal
    responses are both marked as chosen: such a turn is no comparison, but it is part of the history.
    """
    utterances, survey = map(Path, files)
    people = prism_people(survey)
    conversations: dict[str, dict[int, list[Row]]] = {}
    for number, row in read_lines(utterances):
        if missing := [name for name in (*PRISM_TYPES, "if_chosen") if name not in row]:
            raise UserError(f"{utterances}, line {number}: no column {missing[0]}: is this PRISM's utterances.jsonl?")
        if not all(type(row[name]) is kind for name, kind in (PRISM_TYPES | {"if_chosen": bool}).items()):
            yield dropped_row("field of another type")
        elif row["user_id"] not in people:
            raise UserError(f"{utterances}, line {number}: {row['user_id']} is not in {survey}: download both again")
        else:
            conversations.setdefault(row["conversation_id"], {}).setdefault(row["turn"], []).append(row)
    for conversation, turns in conversations.items():
        history: list[str] = []
        known = True  # whether the dialogue up to this turn is known
        for turn in sorted(turns):
            candidates = [c | {"model_response": c["model_response"].replace("EMPTY STRING", "")} for c in turns[turn]]
            chosen = [c for c in candidates if c["if_chosen"]]
            others = [c for c in candidates if not c["if_chosen"]]
            prompts = {c["user_prompt"] for c in candidates}
            reason = None
            if not known or turn != len(history) // 2:
                reason = "an earlier turn is missing"
            elif len(prompts) > 1 or len({c["user_id"] for c in candidates}) > 1:
                reason = "candidates of one turn disagree on the prompt or the user"
            elif len(chosen) != 1:
                reason = "no chosen response" if not chosen else "more than one chosen response"
            if reason:
                yield from (dropped_row(reason) for _ in candidates)
            else:
                key = f"{conversation}:{turn}"
                person = people[chosen[0]["user_id"]] | {"conversation_type": chosen[0].get("conversation_type")}
                drawn = pick(others, pairing, key)
                for other in drawn:
                    yield text_row(
                        [*history, *prompts],
                        chosen[0]["model_response"],
                        other["model_response"],
                        annotator=chosen[0]["user_id"],
                        conversation=conversation,
                        choice_set=key,
                        **person,
                    )
                yield from (dropped_row("not drawn (--pairing one)") for _ in range(len(others) - len(drawn)))
            known = known and len(prompts) == 1 and len({c["model_response"] for c in chosen}) == 1
            if known:
                history += [*prompts, chosen[0]["model_response"]]


CA_TURNS = ("first", "second", "third", "fourth")
CA_ATTRIBUTES = tuple(
    f"annotator_{name}" for name in ("age", "gender", "education_level", "political", "ethnicity", "country")
)


def read_community_alignment(files: list[str], pairing: str, language: str) -> Iterator[Row]:
    """One CSV, a row a conversation of up to four turns, each with four candidates and the preferred one's name."""
    path = Path(files[0])
    needed = ["conversation_id", "annotator_id", "assigned_lang", *CA_ATTRIBUTES]
    for turn in CA_TURNS:
        needed += [
            f"{turn}_turn_prompt",
            *(f"{turn}_turn_response_{x}" for x in "abcd"),
            f"{turn}_turn_preferred_response",
        ]
    for row in read_table(path):
        if missing := [name for name in needed if name not in row]:
            raise UserError(f"{path} lacks the column {missing[0]}: is this the Community Alignment CSV?")
        if language not in ("all", row["assigned_lang"]):
            yield dropped_row(f"language is not {language}")
            continue
        history: list[str] = []
        people = {name: row[name] or None for name in CA_ATTRIBUTES}
        for turn in CA_TURNS:
            prompt, preferred = row[f"{turn}_turn_prompt"], row[f"{turn}_turn_preferred_response"]
            candidates = {f"response_{x}": row[f"{turn}_turn_response_{x}"] for x in "abcd"}
            if not prompt.strip():
                if turn == "first":
                    yield dropped_row("no first prompt")
                break
            if preferred not in candidates or not candidates[preferred].strip():
                yield dropped_row("the preferred response is not given" if preferred else "no preference stated")
                break
            chosen = candidates.pop(preferred)
            # Sorted, so that nothing can depend on the slot, which annotators do favour.
            others = sorted(text for text in candidates.values() if text.strip())
            choice_set = digest(history, prompt, sorted([chosen, *others]))
            for other in pick(others, pairing, choice_set):
                yield text_row(
                    [*history, prompt],
                    chosen,
                    other,
                    annotator=row["annotator_id"] or None,
                    conversation=row["conversation_id"],
                    choice_set=choice_set,
                    **people,
                )
            if not others:
                yield dropped_row("no other response")
            history += [prompt, chosen]


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        yield from (row for _, row in read_lines(path))
    elif path.suffix == ".csv":
        try:
            csv.field_size_limit(LONGEST_LINE)
            table = csv.DictReader(text_lines(path), strict=True)
            if twice := [name for name, n in Counter(table.fieldnames or ()).items() if n > 1]:
                raise UserError(f"{path} has the column {twice[0]} more than once: rename or remove one")
            for number, row in enumerate(table, 1):
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, row {number}: not as many fields as columns: quote its commas, or fetch the file "
                        "again"
                    )
                yield row
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{path} cannot be read as CSV ({e}): repair it, or convert it to .jsonl") from e
    else:
        try:
            yield from datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        except (OSError, ValueError, ArrowException, DatasetGenerationError) as e:
            raise UserError(f"{path} cannot be read as Parquet ({e.__cause__ or e}): the file may be incomplete") from e


def read_local(files: list[str], attributes: list[str], annotator_column: str) -> Iterator[Row]:
    """A user's own table, texts to the letter; any column but those of COLUMNS is an attribute."""
    names = {"annotator": annotator_column, "conversation": "conversation"} | {name: name for name in attributes}
    for source in read_table(Path(files[0])):
        row: Row = dict.fromkeys((*COLUMNS, *INTERNAL)) | {k: source.get(name) for k, name in names.items()}
        texts = {k: source.get(k) for k in ("prompt", "chosen", "rejected")}
        if all(isinstance(text, str) for text in texts.values()):
            yield row | texts
        else:
            yield row | {"dropped": "field is not a string"}


DEMO_TOPICS = (
    "river harbour market garden library station bakery museum valley bridge castle orchard island theatre".split()
)
DEMO_WORDS = {
    1: "lovely splendid superb charming radiant gentle".split(),
    0: "plain common usual ordinary typical average".split(),
    -1: "dreadful shabby dismal awful rotten gloomy".split(),
}


def read_demo(_: list[str], heterogeneity: float, annotators: int = 120, pairs_each: int = 40) -> Iterator[Row]:
    """Choices drawn from the mixed logit model with a known strength distribution; no text of anybody's.

    A response holds three adjectives worth +1, 0 or -1; its quality is their sum. Annotator i prefers the first of two
    responses with probability sigma(2 s_i * difference), s_i ~ Gamma with mean 1 and cv = heterogeneity (1 for all if
    0). Attributes: `conviction` (the weaker and the stronger half of the annotators) is planted, `region` is noise.
    """
    rng = np.random.default_rng(20260106)
    shape = 1 / heterogeneity**2 if heterogeneity else math.inf
    strengths = rng.gamma(shape, 1 / shape, annotators) if heterogeneity else np.ones(annotators)
    stronger = np.argsort(np.argsort(strengths)) >= annotators // 2
    regions = rng.choice(["north", "south", "east", "west"], annotators)
    for i in range(annotators):
        for j in range(pairs_each):
            topic = DEMO_TOPICS[rng.integers(len(DEMO_TOPICS))]
            values = rng.integers(-1, 2, (2, 3))
            words = [[DEMO_WORDS[v][rng.integers(6)] for v in row] for row in values.tolist()]
            texts = [f" The {topic} is {a}, {b} and {c}." for a, b, c in words]
            difference = int(values[0].sum() - values[1].sum())
            first = rng.random() < 1 / (1 + math.exp(-2 * strengths[i] * difference))
            chosen, rejected = texts if first else texts[::-1]
            yield text_row(
                [f"Visit {i * pairs_each + j}. What is the {topic} like?"],
                chosen,
                rejected,
                annotator=f"annotator{i}",
                conversation=f"annotator{i}-{j}",
                conviction="stronger" if stronger[i] else "weaker",
                region=str(regions[i]),
            )


def hub_copy(repository: str, data_dir: str, patterns: list[str], dataset: str) -> Path:
    """The local copy of a data set's repository, downloaded (these files alone) unless --data-dir names one."""
    if data_dir:
        return Path(data_dir)
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise UserError(
            f"data set {repository} cannot be reached ({str(e).splitlines()[0]}): pass --data-dir with a local copy of "
            "the repository, or --dataset demo"
        ) from e


def need_files(directory: Path, found: list[Path], names: str, repository: str) -> list[str]:
    if not found or not all(path.is_file() for path in found):
        raise UserError(f"--data-dir {directory} holds no {names}: pass a whole copy of {repository}")
    return [str(path) for path in found]


HH_ID, HH_SUBSETS = (
    "Anthropic/hh-rlhf",
    ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
)
PRISM_ID, CA_ID = "HannahRoseKirk/prism-alignment", "facebook/community-alignment-dataset"
DATASETS = "prism, community-alignment, hh, demo, or a .jsonl, .csv or .parquet file"


def read_preferences(
    dataset: str,
    data_dir: str = "",
    *,
    pairing: str = "all",
    language: str = "en",
    annotator_column: str = "annotator",
    heterogeneity: float = 0.5,
) -> datasets.Dataset:
    """All rows of a data set: COLUMNS, its attributes, INTERNAL. Cached by `datasets`, keyed by files and options."""
    attributes: tuple[str, ...]
    reader: Callable[..., Iterator[Row]]
    options: dict[str, Any] = {}
    files: list[str] = []
    if dataset == "demo":
        attributes, reader, options = ("conviction", "region"), read_demo, {"heterogeneity": heterogeneity}
    elif dataset == "hh":
        directory = hub_copy(HH_ID, data_dir, [f"{subset}/*.jsonl.gz" for subset in HH_SUBSETS], dataset)
        found = [path for subset in HH_SUBSETS for path in sorted((directory / subset).glob("*.jsonl.gz"))]
        files = need_files(directory, found, f"{{{','.join(HH_SUBSETS)}}}/*.jsonl.gz", HH_ID)
        attributes, reader = ("subset",), read_hh
    elif dataset == "prism":
        directory = hub_copy(PRISM_ID, data_dir, ["utterances.jsonl", "survey.jsonl"], dataset)
        found = [directory / "utterances.jsonl", directory / "survey.jsonl"]
        files = need_files(directory, found, "utterances.jsonl and survey.jsonl", PRISM_ID)
        attributes, reader, options = PRISM_ATTRIBUTES, read_prism, {"pairing": pairing}
    elif dataset == "community-alignment":
        # v1.1 is one file, v1.0 two, of which the filtered one is its authors' choice for training.
        names = ["community_alignment.csv", "data/filtered_community_alignment.csv"]
        directory = hub_copy(CA_ID, data_dir, names, dataset)
        found = [path for name in names if (path := directory / name).is_file()][:1]
        files = need_files(directory, found, " or ".join(names), CA_ID)
        attributes, reader, options = (
            CA_ATTRIBUTES,
            read_community_alignment,
            {"pairing": pairing, "language": language},
        )
    elif Path(dataset).suffix in (".jsonl", ".csv", ".parquet"):
        path = Path(data_dir, dataset)
        if not path.is_file():
            raise UserError(f"--dataset {path} does not exist, or is no file: pass {DATASETS}")
        columns: dict[str, None] = {}
        for row in read_table(path):
            columns |= dict.fromkeys(row)
            if len(columns) > MOST_COLUMNS:
                raise UserError(f"{path} has more than {MOST_COLUMNS} columns: remove those that are not needed")
        needed = ["prompt", "chosen", "rejected", *([annotator_column] if annotator_column != "annotator" else [])]
        if missing := [c for c in needed if c not in columns]:
            found_columns = ", ".join(columns) or "no rows"
            raise UserError(f"{path} lacks the column {missing[0]} (found: {found_columns}): rename or add it")
        attributes = tuple(c for c in columns if c not in (*COLUMNS, *INTERNAL, annotator_column))
        files, reader = [str(path)], read_local
        options = {"attributes": list(attributes), "annotator_column": annotator_column}
    else:
        raise UserError(f"--dataset {dataset!r} is unknown: pass {DATASETS}")

    stamps = [(str(Path(f).resolve()), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    features = {name: datasets.Value("string") for name in (*COLUMNS, *attributes, *INTERNAL)}
    features["turn"] = datasets.Value("int32")
    defaults = dict.fromkeys(features)
    labels = ("annotator", "conversation", *attributes)

    def rows() -> Iterator[Row]:
        row = None
        for row in reader(files, **options):
            if row["dropped"] is None:
                row["dropped"] = unusable(row)
            row |= {name: str(row[name]) for name in labels if row.get(name) is not None}
            yield defaults | row
        if row is None:
            raise UserError(f"--dataset {dataset}: no rows in {', '.join(files)}: pass files that hold some")

    try:
        return datasets.Dataset.from_generator(
            rows, features=datasets.Features(features), fingerprint=digest("rows", CODE, dataset, stamps, options)
        )
    except DatasetGenerationError as e:
        raise (e.__cause__ if isinstance(e.__cause__, UserError) else e) from None


def unusable(row: Row) -> str | None:
    if not row["prompt"]:
        return "empty prompt"
    if not (row["chosen"].strip() and row["rejected"].strip()):
        return "empty response"
    if max(len(row[name]) for name in ("prompt", "chosen", "rejected")) > LONGEST_TEXT:
        return f"text of more than {LONGEST_TEXT:,} characters"
    return "identical responses" if row["chosen"] == row["rejected"] else None


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def uniform(seed: int, group: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the group."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64


def split_preferences(rows: datasets.Dataset, seed: int = 0) -> tuple[dict[str, datasets.Dataset], dict[str, Any]]:
    """Splits by annotator where every row has one, else by opening, conversation or prompt; and counts every row.

    80 / 10 / 10 % of the units in the order of a hash of (seed, unit); where the files bring a test split it stays, and
    5 % of the other units become validation. No opening (or prompt, where there is none) is in two splits: test and
    validation lose the rows whose opening is in train, or train those in test where the test split is the files' own.
    """
    dropped, source = rows["dropped"][:], rows["source"][:]
    used = [i for i, reason in enumerate(dropped) if reason is None]
    for unit in ("annotator", "opening", "conversation", "prompt"):
        units = rows[unit][:]
        if all(units[i] is not None for i in used):
            break
    texts = [opening or prompt for opening, prompt in zip(rows["opening"][:], rows["prompt"][:], strict=True)]
    has_test = {"train", "test"} <= set(source)
    free = sorted({units[i] for i in used if not (has_test and source[i] == "test")}, key=lambda u: uniform(seed, u))
    cuts = [round(share * len(free)) for share in ((0.95, 1.0) if has_test else (0.8, 0.9))]
    split_of = {u: SPLITS[(rank >= cuts[0]) + (rank >= cuts[1])] for rank, u in enumerate(free)}
    assigned = {i: "test" if has_test and source[i] == "test" else split_of[units[i]] for i in used}
    first = ("test", "train", "validation") if has_test else ("train", "test", "validation")
    of = {name: {texts[i] for i in used if assigned[i] == name} for name in SPLITS}
    counts = Counter(reason for reason in dropped if reason is not None)
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for i, name in assigned.items():
        if clash := [other for other in first[: first.index(name)] if texts[i] in of[other]]:
            counts[f"{name} row whose opening is also in {clash[0]}"] += 1
        else:
            members[name].append(i)
    summary = {
        "rows_read": len(rows),
        "rows_dropped": dict(counts),
        "split": f"{'test files kept, 95/5' if has_test else 'carved 80/10/10'} by {unit}, seed {seed}",
        "rows": {name: len(index) for name, index in members.items()},
    }
    return {name: rows.select(index).remove_columns(list(INTERNAL)) for name, index in members.items()}, summary


def load_preferences(
    dataset: str, split: str, data_dir: str | None = None, *, seed: int = 0, **options: Any
) -> datasets.Dataset:
    """One split (train, validation or test) of a preference data set: COLUMNS and the attribute columns.

    dataset: prism, community-alignment, hh, demo, or a .jsonl, .csv or .parquet file. data_dir: a local copy of the
    hub's repository. options: those of read_preferences (pairing, language, annotator_column, heterogeneity).
    Raises UserError for an unknown data set or split, a missing column, an unreadable file, or an empty split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown: one of {', '.join(SPLITS)}")
    splits, _ = split_preferences(read_preferences(dataset, data_dir or "", **options), seed)
    if not len(splits[split]):
        raise UserError(f"the {split} split of {dataset} is empty: pass a larger file")
    return splits[split]


def data_options(config: Config) -> dict[str, Any]:
    names = ("pairing", "language", "annotator_column")
    return {name: getattr(config, name) for name in names} | {"heterogeneity": config.demo_heterogeneity}


def sample(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """At most `count` rows, seeded, in the order of the data."""
    if len(rows) <= count:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))


# --- tokens: prompt and responses tokenised apart, joined as ids, exactly one EOS, last ------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus EOS and padding."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")


def locate_model(model: str) -> str:
    """A local directory for a hub id or a directory; only safetensors, JSON and tokenizer files are ever fetched."""
    if model == "tiny" or Path(model, "config.json").is_file():
        return model
    if Path(model).is_dir():
        raise UserError(f"--model {model} holds no config.json: pass a directory written by save_pretrained")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return huggingface_hub.snapshot_download(model, allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise UserError(
            f"--model {model} cannot be reached on the hub ({str(e).splitlines()[0]}): pass a local directory, or "
            "--model tiny"
        ) from e


def load_tokenizer(model: str) -> Any:
    if model == "tiny":
        return byte_tokenizer()
    model_config(model)  # which the tokenizer reads, too
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as e:  # what malformed files make tokenizers raise goes up to bare Exception
        raise UserError(f"model {model} has no tokenizer that loads ({brief(e)}): save one beside it") from e
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {model}: its tokenizer has no EOS token, so responses cannot end: set eos_token in it")
    return tokenizer


def model_config(model: str) -> transformers.PretrainedConfig:
    if model == "tiny":
        tokenizer = byte_tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as e:  # as above: any wrong value in the file ends somewhere else in transformers
        raise UserError(f"model {model} has no config.json that loads ({brief(e)}): repair it") from e
    # It could name a kernel on the hub, which is code; and no other kind takes a mask for each row.
    if (attention := config._attn_implementation) not in (None, "sdpa", "eager"):
        raise UserError(f"model {model}: config.json asks for the attention {attention!r}: remove it, or write sdpa")
    return config


def brief(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def stored_weights(model: Path) -> dict[str, int]:
    """Number of values of each tensor in the safetensors files of a directory, from their headers alone."""
    names = ["model.safetensors"]
    if not (model / names[0]).is_file() and (index := model / "model.safetensors.index.json").is_file():
        shards = read_json(index)
        if not all(isinstance(shards.get(part), dict) and shards[part] for part in ("metadata", "weight_map")):
            raise UserError(f"{index} has no metadata or weight_map: fetch the model again")
        names = sorted(set(map(str, shards["weight_map"].values())))
        # A path could lead to any file of this machine, which hash_weights would not see either.
        if outside := [name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"]:
            raise UserError(f"{index} names {outside[0]!r}, no safetensors file beside it: do not use this model")
    sizes: dict[str, int] = {}
    for path in [model / name for name in names]:
        if not path.is_file():
            raise UserError(f"{path} does not exist: pass a model with all its safetensors files (no others are read)")
        try:
            with safe_open(path, "numpy") as f:
                sizes |= {name: math.prod(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} cannot be read ({e}): it may be incomplete, fetch it again") from e
    return sizes


def check_model(model: str, tokenizer: Any) -> tuple[transformers.PretrainedConfig, int]:
    """(configuration, number of parameters) of a causal model; raises UserError before anything of its size is made.

    Its config.json may ask for no more parameters than its weights hold, and weights are safetensors files beside it.
    """
    config = model_config(model)
    text = config.get_text_config()
    if model == "tiny":
        sizes, stored = {}, math.inf
    else:
        sizes = stored_weights(Path(model))
        stored = sum(sizes.values())
    if Path(model, "adapter_config.json").exists() or hasattr(config, "quantization_config"):
        raise UserError(f"model {model} is an adapter or quantised: merge it into full weights, and pass these")
    # Building modules on meta takes no memory, but time for each of them.
    for name, value in text.to_dict().items():
        most = len(sizes) if sizes and name in ("num_hidden_layers", "n_layer") else stored
        if name.startswith(("num_", "n_")) and isinstance(value, int) and value > most:
            raise UserError(
                f"model {model}: {name} {value} of config.json does not fit its weights ({most}): repair it"
            )
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"model {model}: config.json describes no causal model ({brief(e)}): repair it") from e
    parameters = sum(p.numel() for p in network.parameters())
    if parameters > stored:
        raise UserError(
            f"model {model}: config.json asks for {parameters:,} parameters, its weights hold {stored:,}: pass "
            "files that belong together"
        )
    if text.vocab_size < len(tokenizer):
        raise UserError(
            f"model {model} has {text.vocab_size} tokens, the tokenizer {len(tokenizer)}: pass files that belong "
            "together"
        )
    return config, parameters


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # split_special_tokens: text that spells a special token is data, not control.
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, max_prompt_length: int, bos: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """The rule of the DPO reference code; `prompt` without BOS, responses with EOS.

    If prompt + longer response exceed max_length, the last max_prompt_length tokens of the prompt are kept (BOS counts
    as one of them); if they still do, both responses are cut to max_length - max_prompt_length, and a cut response has
    no EOS.
    """
    longer = max(len(chosen), len(rejected))
    if len(bos) + len(prompt) + longer > max_length:
        prompt = prompt[max(0, len(prompt) - max_prompt_length + len(bos)) :]
    if len(bos) + len(prompt) + longer > max_length:
        room = max_length - max_prompt_length
        chosen, rejected = chosen[:room], rejected[:room]
    return bos + prompt, chosen, rejected


@dataclass(frozen=True)
class Pairs:
    """Token ids of preference pairs; `rows` are their positions in the split they come from."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Sequence[int]) -> "Pairs":
        prompts, chosen, rejected = (
            [column[i] for i in index] for column in (self.prompts, self.chosen, self.rejected)
        )
        return Pairs(prompts, chosen, rejected, [self.rows[i] for i in index])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair's row: prompt, chosen and rejected."""
        return [sum(map(len, row)) for row in zip(self.prompts, self.chosen, self.rejected, strict=True)]

    def key(self) -> str:
        return digest(self.prompts, self.chosen, self.rejected)


def tokenize(
    rows: datasets.Dataset, tokenizer: Any, max_length: int, max_prompt_length: int
) -> tuple[Pairs, dict[str, int]]:
    """Pairs ready to score, and what tokenisation and truncation did to them.

    Identical and empty pairs are dropped; so are those whose text becomes a special token all the same: word and
    unigram vocabularies hold them as ordinary entries.
    """
    eos = [tokenizer.eos_token_id]
    # BOS only where the tokenizer's own convention puts one.
    start = tokenizer("")["input_ids"]
    bos = start[:1] if tokenizer.bos_token_id is not None and start[:1] == [tokenizer.bos_token_id] else []
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def convert(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        parts = [encode(tokenizer, batch[name]) for name in ("prompt", "chosen", "rejected")]
        out: dict[str, list[Any]] = {
            name: [] for name in ("prompts", "chosen", "rejected", "prompt_cut", "eos_lost", "control")
        }
        for prompt, chosen, rejected in zip(*parts, strict=True):
            p, c, r = truncate(prompt, chosen + eos, rejected + eos, max_length, max_prompt_length, bos)
            out["prompts"].append(p)
            out["chosen"].append(c)
            out["rejected"].append(r)
            out["prompt_cut"].append(len(p) < len(bos) + len(prompt))
            out["eos_lost"].append((len(c) <= len(chosen)) + (len(r) <= len(rejected)))
            out["control"].append(not control.isdisjoint(itertools.chain(prompt, chosen, rejected)))
        return out

    backend = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    fingerprint = digest("tokens", CODE, rows._fingerprint, backend, eos, bos, max_length, max_prompt_length)
    encoded = rows.map(
        convert, batched=True, remove_columns=rows.column_names, new_fingerprint=fingerprint, desc="tokenise"
    )
    columns = {name: encoded[name][:] for name in encoded.column_names}
    lost = columns["eos_lost"]
    counts = {"pairs": len(rows), "prompt_cut": sum(columns["prompt_cut"]), "response_cut": sum(map(bool, lost))}
    counts |= {"eos_lost": sum(lost), "dropped_control": 0, "dropped_empty": 0, "dropped_identical": 0}
    keep = []
    every = Pairs(columns["prompts"], columns["chosen"], columns["rejected"], list(range(len(rows))))
    for i, (prompt, chosen, rejected) in enumerate(zip(every.prompts, every.chosen, every.rejected, strict=True)):
        if columns["control"][i]:
            counts["dropped_control"] += 1
        elif not prompt or eos in (chosen, rejected):
            counts["dropped_empty"] += 1
        elif chosen == rejected:
            counts["dropped_identical"] += 1
        else:
            keep.append(i)
    return every.select(keep), counts | {"used": len(keep)}


# --- scoring: a pair is one row [prompt | chosen | rejected], so that its prompt is computed once --------------------


class Rows(NamedTuple):
    """A micro-batch: B rows of W tokens, padded on the right; N response tokens in all, of which R responses a row."""

    input_ids: Tensor  # (B, W)
    position_ids: Tensor  # (B, W), each response continues the prompt's
    attention_mask: Tensor  # (B, 1, W, W), True where a query may look
    predictors: Tensor  # (N,), for each response token the place in the flattened (B, W) of the token before it
    targets: Tensor  # (N,), its id
    places: Tensor  # (2, N), its response (counted r * B + b) and its place in that response
    shape: tuple[int, int, int]  # (R, B, tokens of the longest response)


def build_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu"
) -> Rows:
    """responses: B token lists for each of the R responses that share a prompt (two for pairs, one for SFT)."""
    batch = len(prompts)
    rows = [[prompt, *rest] for prompt, *rest in zip(prompts, *responses, strict=True)]
    width = max(sum(map(len, row)) for row in rows)
    ids = np.zeros((batch, width), dtype=np.int64)
    positions = np.zeros_like(ids)
    segments = np.zeros_like(ids)  # 0 padding, 1 prompt, 2, 3, ... responses
    predictors: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for b, row in enumerate(rows):
        start, prompt = 0, len(row[0])
        for segment, tokens in enumerate(row):
            span = slice(start, start + len(tokens))
            ids[b, span] = tokens
            positions[b, span] = np.arange(len(tokens)) + (prompt if segment else 0)
            segments[b, span] = segment + 1
            if segment:
                # The first token of every response is predicted by the last one of the prompt.
                before = np.arange(start - 1, start + len(tokens) - 1)
                before[0] = prompt - 1
                predictors.append(b * width + before)
                response = np.full(len(tokens), (segment - 1) * batch + b)
                places.append(np.stack([response, np.arange(len(tokens))]))
            start += len(tokens)
    kind = torch.from_numpy(segments).to(device)
    query, key = kind[:, :, None], kind[:, None, :]
    itself = torch.eye(width, dtype=torch.bool, device=device)
    causal = torch.ones_like(itself).tril()
    # Padding looks at itself: a row of the mask without any True gives NaN in some attention kernels.
    mask = (causal & (key != 0) & ((key == query) | (key == 1))) | itself
    targets = np.concatenate([tokens for _, *rest in rows for tokens in rest]).astype(np.int64)
    return Rows(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device),
        mask[:, None],
        torch.from_numpy(np.concatenate(predictors)).to(device),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(np.concatenate(places, -1)).to(device),
        (len(responses), batch, max(len(tokens) for response in responses for tokens in response)),
    )


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] for logits (N, V) and targets (N,): (N,), in float32 or wider.

    The gradient is made in the memory of the one tensor that is saved: of cross_entropy's three passes over new memory
    of the size of the logits, the largest of a step, one is left. A second backward raises, as the tensor has changed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.save_for_backward(logps, targets)
        return logps.gather(-1, targets[:, None]).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logps, targets = ctx.saved_tensors
        logits_gradient = logps.exp_().mul_(-gradient[:, None])
        return logits_gradient.scatter_add_(-1, targets[:, None], gradient[:, None]), None


def response_logps(model: nn.Module, rows: Rows) -> Tensor:
    """log pi(y|x) summed over the response's tokens (EOS included), (R, B), in float32 or wider.

    The head sees only the hidden states that predict a response token. A hook in front of it, and not a head of our
    own behind the base model, keeps whatever the model does to its logits (a soft cap, a scale) and works under FSDP.
    """
    # Added to the attention scores: a mask of booleans is understood by SDPA, but misread by other attentions.
    mask = torch.zeros_like(rows.attention_mask, dtype=next(model.parameters()).dtype)
    mask = mask.masked_fill(~rows.attention_mask, -math.inf)
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, rows.predictors),))
    try:
        logits = model(
            input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
        ).logits
    finally:
        hook.remove()
    logps = TokenLogps.apply(logits, rows.targets)
    responses, batch, longest = rows.shape
    # Sums of rows of a table: index_add would add in another order each time on a GPU.
    table = logps.new_zeros(responses * batch, longest)
    return table.index_put(tuple(rows.places), logps).sum(-1).view(responses, batch)


def plain_logps(model: nn.Module, prompts: Sequence[Sequence[int]], responses: Any, device: Any) -> Tensor:
    """The same for one response a row, the way every causal model understands: padded right, an ordinary mask."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[b, : len(row)] = torch.tensor(row)
        real[b, : len(row)] = 1
        scored[b, len(prompt) : len(row)] = 1
    ids, real, scored = ids.to(device), real.to(device), scored.to(device)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (logps * scored[:, 1:]).sum(-1)


def score(model: nn.Module, prompts: Sequence[Any], responses: Sequence[Sequence[Any]], device: Any) -> Tensor:
    """Log-probs (R, B) of the R responses that share each of B prompts, by the way that check_sharing found right."""
    if getattr(model, "plain_rows", False):
        return torch.stack([plain_logps(model, prompts, response, device) for response in responses])
    return response_logps(model, build_rows(prompts, responses, device))


def score_pairs(model: nn.Module, pairs: Pairs, index: Sequence[int], device: torch.device | str) -> Tensor:
    """Log-probs of some of the pairs, (2, len(index)): chosen, rejected."""
    some = pairs.select(index)
    return score(model, some.prompts, [some.chosen, some.rejected], device)


@functools.cache
def say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


@torch.no_grad()
def check_sharing(model: nn.Module, pairs: Pairs, device: torch.device) -> bool:
    """Compares shared rows with plain ones on the longest pairs, and falls back to plain rows if they differ.

    Some architectures cannot share a prompt: those whose positions are not position_ids (ALiBi), or whose attention is
    cut to a window, by the mask that a shared row replaces, where a response is longer than the window.
    """
    lengths = [
        len(p) + max(len(c), len(r)) for p, c, r in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)
    ]
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    shares = all(window is None or max(lengths) <= window for window in windows)
    if shares:
        some = pairs.select(sorted(range(len(pairs)), key=lambda i: -lengths[i])[:4])
        plain = torch.stack([plain_logps(model, some.prompts, r, device) for r in (some.chosen, some.rejected)])
        tokens = torch.tensor([[len(r) for r in side] for side in (some.chosen, some.rejected)], device=device)
        try:
            model.plain_rows = False  # type: ignore[assignment]
            apart = ((score_pairs(model, some, range(len(some)), device) - plain).abs() / tokens).max().item()
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
            apart = math.inf
        # float32 rounding leaves 1e-5 nat per token; a wrong mask or position leaves tenths.
        shares = apart < 1e-3
    model.plain_rows = not shares  # type: ignore[assignment]
    if not shares:
        say_once(f"{type(model).__name__} cannot share a prompt between two responses: plain rows are used, slower")
    return shares


def deal(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches for every rank: [micro-batch][rank] -> positions, -1 where a rank has nothing to do.

    lengths: tokens of each example's row. Sorted by length and dealt in turn, so that ranks have equal numbers of rows
    of nearly equal length; filled greedily so that rows * longest <= budget (at least one row). Every rank gets the
    same number of rows in each, which the collectives of FSDP need.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    turns = [order[i : i + ranks] for i in range(0, len(order), ranks)]
    turns[-1] = turns[-1] + [-1] * (ranks - len(turns[-1]))
    batches: list[list[list[int]]] = []
    for turn in turns:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0][0]] <= budget:
            batches[-1].append(turn)
        else:
            batches.append([turn])
    return [[[turn[rank] for turn in batch] for rank in range(ranks)] for batch in batches]


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    def print(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)

    def bar(self, total: int, description: str, unit: str = "pair", initial: int = 0) -> tqdm:
        # disable=None: silent when stderr is not a terminal.
        return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=True if self.rank else None)

    def gather(self, values: Tensor) -> Tensor:
        """(n, m) on every rank -> (size * n, m), the same on all."""
        out = torch.empty(self.size * len(values), *values.shape[1:], dtype=values.dtype, device=values.device)
        dist.all_gather_single(out, values.contiguous())
        return out

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0 goes ahead (and fills the caches), the others follow, or raise what it raised for the user."""
        problem: list[UserError | None] = [None]
        if self.rank:
            dist.broadcast_object_list(problem, 0)
            if problem[0]:
                raise problem[0]
        try:
            yield
        except UserError as e:
            problem = [e]
            raise
        finally:
            if not self.rank:
                dist.broadcast_object_list(problem, 0)


def meet(store: Any, rank: int, size: int) -> Any:
    """The part of the store that the ranks alive now have to themselves.

    torchrun keeps its store when it starts ranks again, and those of several machines are not started together: they
    would read the addresses of the dead, or wait for them. So rank 0 lists who has come, until all who are on the list
    answer.
    """
    me = uuid.uuid4().hex
    store.set(f"come/{rank}", me)
    while True:
        if rank == 0:
            store.set("list", ",".join(store.get(f"come/{r}").decode() for r in range(size)))
        names = store.get("list").decode()
        if names.split(",")[rank] != me:
            time.sleep(0.05)
            continue
        place = digest(names)
        store.set(f"{place}/{rank}", "here")
        with contextlib.suppress(dist.DistStoreError):  # some have died: when others come, they are listed
            store.wait([f"{place}/{r}" for r in range(size)] if rank == 0 else [f"{place}/all"], timedelta(seconds=1))
            store.set(f"{place}/all", "here")
            return dist.PrefixStore(place, store)


@contextlib.contextmanager
def start_processes() -> Iterator[World]:
    """Joins the processes of torchrun, or makes a group of one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    store = meet(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device if cuda else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def micro_batch_tokens(architecture: transformers.PretrainedConfig, parameters: int, world: World) -> int:
    """Tokens of a micro-batch that fit in memory, of which half is kept free, up to where more are no faster."""
    text = architecture.get_text_config()
    hidden = text.hidden_size
    # What the backward pass needs of a token: the tensors of each block, and logits with their gradient.
    per_token = (
        4 * text.num_hidden_layers * (12 * hidden + 5 * (getattr(text, "intermediate_size", None) or 4 * hidden))
    )
    per_token += 12 * text.vocab_size
    if world.device.type == "cuda":
        memory, most = torch.cuda.get_device_properties(world.device).total_memory, 16_384
    else:
        # Beyond this a CPU waits for fresh memory pages.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory, most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks, 1024
    # Weights, gradient, RMSprop's average, and room for what is gathered.
    free = max(0, memory - 16 * parameters // world.size) // 2
    tokens = torch.tensor(min(most, free // per_token), device=world.device)
    dist.all_reduce(tokens, dist.ReduceOp.MIN)
    return int(tokens.item())


def pretrained(model: str, seed: int = 0) -> nn.Module:
    """Float32 weights on the CPU, from safetensors alone (or random ones for "tiny"); dropout off."""
    torch.manual_seed(seed)
    if model == "tiny":
        return AutoModelForCausalLM.from_config(model_config(model), dtype=torch.float32).eval()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, config=model_config(model), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"model {model} cannot be loaded ({str(e).splitlines()[0]})") from e
    network, report = loaded
    if missing := sorted(report["missing_keys"]):  # they would be random
        raise UserError(f"model {model}: its files hold no {missing[0]} ({len(missing)} missing): pass whole weights")
    return network.eval()


def load_model(
    model: str,
    compute: str,
    world: World,
    pairs: Pairs,
    seed: int = 0,
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
) -> nn.Module:
    """float32 master weights, sharded over the ranks by FSDP2, computing in `compute`; dropout off.

    Rank 0 alone reads the weights and sends them round. There it is checked on the longest of `pairs`, before sharding,
    that the model can share prompts.
    """
    whole: nn.Module | None = None
    shares = torch.ones((), device=world.device)
    with world.rank_zero_first():
        if world.rank == 0:
            whole = pretrained(model, seed).to(world.device)
            shares.fill_(check_sharing(whole, pairs, world.device))
            whole.cpu()
    dist.broadcast(shares, 0)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(model_config(model), dtype=torch.float32).eval()
    network.plain_rows = not shares.item()
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if compute == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in network.modules():
        if type(module).__name__ in set(network._no_split_modules or ()):
            if activation_checkpointing:
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
            if compile_blocks:
                module.compile(dynamic=True)  # micro-batches differ in both sizes
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    network.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, {} if whole is None else whole.state_dict(), options=options)
    # The rotary frequencies are in no checkpoint: they too come from rank 0.
    values = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in network.named_buffers():
        if name in values:
            buffer.copy_(values[name])
        dist.broadcast(buffer, 0)
    return network


def export(
    network: nn.Module, tokenizer: Any, path: Path, world: World, sft_record: dict[str, Any] | None = None
) -> None:
    """Whole float32 weights as safetensors, with the tokenizer: what from_pretrained reads; and sft.json for SFT."""
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with world.rank_zero_first(), writing(path):
        if world.rank == 0:
            aside = path.with_name(path.name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            # A plain instance: fully_shard has renamed the class of `network`, and the name would go into config.json.
            with torch.device("meta"):
                plain = AutoModelForCausalLM.from_config(network.config, dtype=torch.float32)
            plain.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
            if sft_record:
                write_json(aside / "sft.json", sft_record)
            publish(aside, path)


# --- checkpoints: an interrupted run, started again, ends bit for bit where an uninterrupted one does ----------------

STOP = threading.Event()  # a signal came: the loops save after the step and stop


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and SIGINT set STOP; a second one ends the process at once."""

    def stop(number: int, frame: Any) -> None:
        STOP.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    STOP.clear()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Checkpoints:
    """The state of one loop under `path`, as path/step-00000031: sharded files of every rank and manifest.json.

    Written in the background beside its place; when all ranks' files are on disk rank 0 hashes them into the manifest
    and renames. So a directory of that name is whole, or was damaged later, which the hashes show. `key` is what the
    state depends on beside the configuration.
    """

    def __init__(
        self, path: Path, keep: int, key: dict[str, Any], module: nn.Module, optimizer: Any, schedule: Any, world: World
    ) -> None:
        self.path, self.keep, self.world = path, keep, world
        # numpy's generators, which order the data, may change with its version.
        versions = {library.__name__: library.__version__ for library in (torch, transformers, np)}
        self.key = key | versions
        self.module, self.optimizer, self.schedule = module, optimizer, schedule
        self.group = dist.new_group(backend="gloo")  # its own: it communicates while the loop does
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def newest(self) -> dict[str, Any] | None:
        """The manifest of the newest whole checkpoint; those that are not whole are named."""
        for folder in sorted(self.path.glob("step-" + 8 * "[0-9]"), reverse=True):
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                if manifest.pop("digest") != digest(manifest):
                    raise ValueError("manifest.json has changed")
                for name, known in manifest["files"].items():
                    if file_hash(folder / name) != known:
                        raise ValueError(f"{name} has changed")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                self.world.print(f"checkpoint {folder} is not whole ({e}): not used")
                continue
            if manifest["key"] != self.key:
                raise UserError(
                    f"checkpoint {folder} is of another run ({differences(manifest['key'], self.key)}): restore what "
                    "it was made with, or choose another --output-dir"
                )
            return manifest
        return None

    def restore(self) -> dict[str, Any] | None:
        """Puts the newest whole checkpoint into module, optimizer and schedule; returns its progress."""
        found: list[dict[str, Any] | None] = [None]
        with self.world.rank_zero_first():
            if self.world.rank == 0:
                found = [self.newest()]
        dist.broadcast_object_list(found, 0)
        manifest = found[0]
        if manifest is None:
            return None
        state = self.state()
        load(state, checkpoint_id=self.path / manifest["name"], process_group=self.group)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"]
        )
        self.schedule.load_state_dict(manifest["schedule"])
        return manifest["progress"]

    def state(self) -> dict[str, Any]:
        module, optimizer = get_state_dict(self.module, self.optimizer)
        return {"module": module, "optimizer": optimizer}

    def save(self, step: int, progress: dict[str, Any]) -> None:
        self.wait()
        name = f"step-{step:08}"
        aside = self.path / f"{name}.tmp"
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        manifest = {"name": name, "key": self.key, "ranks": self.world.size, "progress": progress}
        manifest["schedule"] = self.schedule.state_dict()
        written = async_save(self.state(), checkpoint_id=aside, process_group=self.group)
        assert isinstance(written, Future)
        self.pending = self.thread.submit(self.finish, written, aside, manifest) if self.world.rank == 0 else written

    def finish(self, written: Future, aside: Path, manifest: dict[str, Any]) -> None:
        """On rank 0, in the background."""
        written.result()
        manifest["files"] = {p.name: file_hash(p) for p in sorted(aside.iterdir())}
        write_json(aside / "manifest.json", manifest | {"digest": digest(manifest)})
        place = self.path / manifest["name"]
        publish(aside, place)
        # Those with a later number were not whole when the run was started.
        for old in sorted(p for p in self.path.glob("step-" + 8 * "[0-9]") if p <= place)[: -self.keep]:
            shutil.rmtree(old)

    def wait(self) -> None:
        """Until what is being written is whole: rank 0 renames it, so no rank may leave before."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        with self.world.rank_zero_first(), writing(self.path):
            pending.result()

    def close(self) -> None:
        """After an error, too, what is being written is finished where it can be."""
        if self.pending:
            wait([self.pending])  # nothing collective: the other ranks may be elsewhere
        self.thread.shutdown()


# --- SFT and the reference pass --------------------------------------------------------------------------------------


def optimizer_for(groups: list[dict[str, Any]], warmup: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
    return optimizer, schedule


def batches(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Global batches of example indices; each epoch a permutation that depends on (seed, epoch) alone."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        yield from (order[start : start + batch_size] for start in range(0, count, batch_size))


def clip_policy(network: nn.Module, max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def backward_in_parts(network: nn.Module, parts: list[Any], loss_of: Callable[[Any], Tensor]) -> None:
    """Accumulates the gradient of the sum of loss_of(part); communicates once, with the last part."""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(last)
        network.set_is_last_backward(last)
        loss_of(part).backward()


Example = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response


def economies(config: Config) -> dict[str, bool]:
    return {"activation_checkpointing": config.activation_checkpointing, "compile_blocks": config.compile}


def sft_examples(pairs: Pairs) -> list[Example]:
    """The chosen responses, each once: a prompt with several pairs repeats them."""
    return sorted({(tuple(p), tuple(c)) for p, c in zip(pairs.prompts, pairs.chosen, strict=True)})


def sft_key(config: Config, examples: list[Example]) -> dict[str, Any]:
    names = ("model", "sft_lr", "sft_epochs", "batch_size", "warmup", "max_grad_norm", "policy_dtype", "seed")
    return {name: getattr(config, name) for name in names} | {"tokens": digest(examples)}


def has_sft(config: Config, examples: list[Example], tokenizer: Any) -> bool:
    """Whether --sft-dir holds a checkpoint; refuses one of another model, data or recipe. Without sft.json it is the
    user's own, and taken as it is."""
    path = Path(config.sft_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--sft-dir {path} is no directory: choose another")
    if not path.exists() or not any(path.iterdir()):
        return False
    key = sft_key(config, examples)
    if (path / "sft.json").exists():
        found = {k: v for k, v in read_json(path / "sft.json").items() if k in key}
        if found != key:
            raise UserError(f"--sft-dir {path} does not fit ({differences(found, key)}): choose another directory")
    elif not (path / "config.json").exists():
        raise UserError(f"--sft-dir {path} is not a checkpoint (no config.json): choose an empty or a new directory")
    check_model(str(path), tokenizer)
    return True


def sft(config: Config, model: str, tokenizer: Any, examples: list[Example], pairs: Pairs, world: World) -> None:
    """Trains on the chosen responses, from `model` into --sft-dir."""
    network = load_model(model, config.policy_dtype, world, pairs, config.seed, **economies(config))
    optimizer, schedule = optimizer_for([{"params": list(network.parameters()), "lr": config.sft_lr}], config.warmup)
    path, key = Path(config.sft_dir), sft_key(config, examples)
    part = unfinished(config.sft_dir)
    with contextlib.closing(Checkpoints(part, config.keep, key, network, optimizer, schedule, world)) as checkpoints:
        losses: list[float] = (checkpoints.restore() or {}).get("losses", [])
        done, last = len(losses), config.sft_epochs * math.ceil(len(examples) / config.batch_size)
        if done:
            world.print(f"SFT: goes on after update {done} of {last}")
        with world.bar(last, "SFT", "update", done) as bar:
            order = batches(len(examples), config.batch_size, config.sft_epochs, config.seed)
            for step, batch in itertools.islice(enumerate(order, 1), done, None):
                loss, stop = sft_gradients([examples[i] for i in batch], network, config.micro_batch_tokens, world)
                norm = clip_policy(network, config.max_grad_norm)
                losses.append(loss)
                if not (math.isfinite(loss) and math.isfinite(norm.item())):
                    raise RuntimeError(f"SFT update {step}: loss {loss}, gradient norm {norm}: lower --sft-lr")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if step < last and (stop or step % max(1, config.save_every // config.batch_size) == 0):
                    checkpoints.save(step, {"losses": losses})
                if step < last and stop:
                    checkpoints.wait()
                    raise Interrupted(f"interrupted and saved after SFT update {step}: the same command goes on")
        checkpoints.wait()
    record = key | {"examples": len(examples), "losses": losses}
    export(network, tokenizer, path, world, record)
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    change = f", nats per token {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
    world.print(f"SFT: {len(examples):,} examples, {len(losses)} updates{change}")


def sft_gradients(examples: list[Example], network: nn.Module, budget: int, world: World) -> tuple[float, bool]:
    """Leaves the gradient of -log pi per response token of the global batch.

    Returns that loss, and whether a signal reached any rank: the same on all.
    """
    tokens = sum(len(response) for _, response in examples)
    total = torch.zeros(2, device=world.device)

    def loss_of(members: list[list[int]]) -> Tensor:
        mine = members[world.rank]
        (logps,) = score(network, [examples[i][0] for i in mine], [[examples[i][1] for i in mine]], world.device)
        loss = -(logps * present(mine, world.device)).sum() / tokens
        total[0] += loss.detach()
        return loss * world.size

    plan = deal([len(prompt) + len(response) for prompt, response in examples], world.size, budget)
    backward_in_parts(network, plan, loss_of)
    total[1] = float(STOP.is_set())
    dist.all_reduce(total)
    loss, stop = total.tolist()
    return loss, stop > 0


def present(members: list[int], device: torch.device) -> Tensor:
    """1 for a real row, 0 for the filler of a rank that has nothing to do (-1, which indexes some other row)."""
    return torch.tensor([float(i >= 0) for i in members], device=device)


@torch.no_grad()
def score_all(network: nn.Module, pairs: Pairs, batch_size: int, budget: int, world: World, name: str) -> np.ndarray:
    """Log-probs of all pairs, (len(pairs), 2), chosen and rejected, the same on every rank."""
    result = np.full((len(pairs), 2), np.nan)
    lengths = pairs.lengths
    by_length = sorted(range(len(pairs)), key=lambda i: (-lengths[i], i))
    with world.bar(len(pairs), name) as bar:
        for start in range(0, len(pairs), batch_size):
            batch = by_length[start : start + batch_size]
            for members in deal([lengths[i] for i in batch], world.size, budget):
                index = [batch[i] for i in members[world.rank]]
                scores = score_pairs(network, pairs, index, world.device).double()
                rows = world.gather(scores.T).cpu().numpy()
                for i, values in zip((i for rank in members for i in rank), rows, strict=True):
                    if i >= 0:
                        result[batch[i]] = values
            bar.update(len(batch))
    return result


def hash_weights(path: Path) -> str:
    sha = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        sha.update(bytes.fromhex(file_hash(file)))
    return sha.hexdigest()[:32]


def reference_key(config: Config, splits: dict[str, Pairs]) -> dict[str, str]:
    """What reference log-probs depend on."""
    key = {"weights": hash_weights(Path(config.sft_dir)), "dtype": config.reference_dtype}
    return key | {f"{name}_tokens": pairs.key() for name, pairs in splits.items()}


def write_scores(path: Path, scores: dict[str, np.ndarray], key: dict[str, str]) -> None:
    aside = path.with_name(path.name + ".tmp")
    sums = {f"sha256_{name}": hashlib.sha256(values.tobytes()).hexdigest() for name, values in scores.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(scores, aside, metadata=key | sums)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)


def read_scores(path: Path, key: dict[str, str]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as f:
            found = f.metadata() or {}
            scores = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"--reference-cache {path} cannot be read ({e}): remove it") from e
    sums = {name: found.pop(f"sha256_{name}", None) for name in scores}
    if found != key:
        raise UserError(
            f"--reference-cache {path} is of another pass ({differences(found, key)}): remove it, or name another"
        )
    if changed := [n for n, values in scores.items() if hashlib.sha256(values.tobytes()).hexdigest() != sums[n]]:
        raise UserError(f"--reference-cache {path} is damaged (the values of {changed[0]} have changed): remove it")
    return scores


def reference_pass(
    config: Config, splits: dict[str, Pairs], key: dict[str, str], world: World
) -> dict[str, np.ndarray]:
    """Reference log-probs of the pairs of every split, (n, 2); from --reference-cache when it is the same pass.

    Scored in parts of --save-every pairs, each kept beside the cache until all are there.
    """
    path = Path(config.reference_cache)
    if path.exists():
        with world.rank_zero_first():
            scores = read_scores(path, key)
        world.print(f"reference: log-probs taken from {path}")
        return scores
    network = load_model(config.sft_dir, config.reference_dtype, world, splits["train"])
    # Without gradients a micro-batch holds no activations: four times the tokens fit.
    budget = 4 * config.micro_batch_tokens
    batch = max(config.eval_batch_size, config.batch_size)
    parts = unfinished(config.reference_cache)
    scores = {}
    torch.backends.cuda.matmul.fp32_precision = "tf32" if config.reference_dtype == "tfloat32" else "ieee"
    for name, pairs in splits.items():
        found: list[np.ndarray] = []
        for start in range(0, len(pairs), config.save_every):
            part = parts / f"{name}-{start:09}.safetensors"
            own = key | {"part": part.name, "pairs": str(config.save_every)}
            saved: list[np.ndarray | None] = [None]
            if world.rank == 0 and part.exists():
                with contextlib.suppress(UserError):  # of another pass, or damaged: made again
                    saved = [read_scores(part, own)["logps"]]
            dist.broadcast_object_list(saved, 0)
            values = saved[0]
            if values is None:
                some = pairs.select(range(start, min(start + config.save_every, len(pairs))))
                values = score_all(network, some, batch, budget, world, f"reference, {name}")
                if world.rank == 0:
                    write_scores(part, {"logps": values}, own)
                stop = torch.tensor(float(STOP.is_set()), device=world.device)
                dist.all_reduce(stop)
                if stop.item():
                    raise Interrupted(f"interrupted in the reference pass, saved in {parts}: the same command goes on")
            found.append(values)
        scores[name] = np.concatenate(found)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with world.rank_zero_first():
        if world.rank == 0:
            write_scores(path, scores, key)
            shutil.rmtree(parts)
    world.print(f"reference: {sum(map(len, splits.values())):,} pairs scored once")
    return scores


# --- preference training ---------------------------------------------------------------------------------------------


def make_strength(config: Config, device: torch.device | str = "cpu") -> Strength:
    learnable = config.beta_lr > 0
    if config.dist == "dpo":
        return PointMass(config.beta, device=device)
    if config.dist == "gamma":
        return Gamma(config.concentration, config.rate, learnable=learnable, device=device)
    return LogNormal(config.loc, config.scale, config.estimator, config.samples, learnable=learnable, device=device)


def draws(config: Config, step: int, count: int, device: torch.device) -> Tensor | None:
    """Standard normal draws (count, samples) for the rows of a global batch: a function of seed and step alone.

    Step 0 is evaluation, which sees the same draws each time; updates count from 1.
    """
    if config.dist != "lognormal" or config.estimator != "monte_carlo":
        return None
    rng = np.random.default_rng([config.seed, 1, step])
    return torch.from_numpy(rng.standard_normal((count, config.samples), dtype=np.float32)).to(device)


def row_metrics(values: np.ndarray) -> dict[str, float]:
    """values: (n, 5) loss, chosen and rejected reward, chosen and rejected log-prob; a metric is one mean over rows."""
    loss, chosen, rejected, chosen_logps, rejected_logps = values.T
    return {
        "loss": loss.mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        # A tie counts one half, so that an untrained policy reads 0.5.
        "rewards/accuracies": (chosen > rejected).mean() + 0.5 * (chosen == rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
        "n": len(values),
    }


def beta_metrics(strength: Strength) -> dict[str, float]:
    return {f"beta/{name}": getattr(strength, name).item() for name in ("mean", "variance", "cv")}


def strength_values(strength: Strength) -> dict[str, float]:
    names = [name for name in ("beta", "loc", "scale", "concentration", "rate") if hasattr(strength, name)]
    return {name: getattr(strength, name).item() for name in names}


class Logger:
    """Repeats metrics.jsonl to --logger, under the same names, with the configuration; and a table at the end."""

    def __init__(self, config: Config, step: int) -> None:
        """step: the update that the run goes on after."""
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote after its checkpoint is written again.
            self.tensorboard = SummaryWriter(self.path.parent / "tensorboard", purge_step=step + 1 if step else 0)
            self.tensorboard.add_text("config", table_of(dataclasses.asdict(config)))
        elif config.logger == "wandb":
            import wandb

            place = {"project": "mixdpo", "name": self.path.parent.name, "dir": self.path.parent}
            try:
                self.wandb = wandb.init(**place, config=dataclasses.asdict(config), resume="auto")
            except wandb.Error as e:
                raise UserError(
                    f"--logger wandb: {brief(e)}: set WANDB_API_KEY, or WANDB_MODE=offline, and start again"
                ) from e

    def log(self, step: int, examples: int, prefix: str, metrics: dict[str, float], strength: Strength) -> None:
        row = {"step": step, "examples": examples} | {f"{prefix}/{k}": v for k, v in metrics.items()}
        row |= beta_metrics(strength)
        with writing(self.path), open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)

    def table(self, values: dict[str, Any]) -> None:
        if self.tensorboard:
            self.tensorboard.add_text("final", table_of(values))
        if self.wandb:
            import wandb

            rows = [[name, str(value)] for name, value in values.items()]
            self.wandb.log({"final": wandb.Table(["name", "value"], data=rows)})

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def table_of(values: dict[str, Any]) -> str:
    return "\n".join(
        ["| name | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())]
    )


def evaluate_policy(
    config: Config, network: nn.Module, strength: Strength, pairs: Pairs, reference: np.ndarray, world: World
) -> dict[str, float]:
    """Metrics of the policy on held-out pairs, with the same loss as in training, and its gap to the reference."""
    logps = score_all(network, pairs, config.eval_batch_size, 4 * config.micro_batch_tokens, world, "evaluation")
    with torch.no_grad():
        policy_chosen, policy_rejected = torch.from_numpy(logps).to(world.device).unbind(-1)
        reference_chosen, reference_rejected = torch.from_numpy(reference).to(world.device).unbind(-1)
        losses, chosen, rejected = mixdpo_loss(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            strength,
            noise=draws(config, 0, len(pairs), world.device),
        )
    values = np.stack([t.cpu().numpy() for t in (losses, chosen, rejected)], -1)
    gap = np.abs(logps - reference).mean()
    return row_metrics(np.concatenate([values, logps], -1)) | {"reference_gap": gap}


def preference_gradients(
    config: Config,
    step: int,
    batch: list[int],
    pairs: Pairs,
    reference_logps: Tensor,
    network: nn.Module,
    strength: Strength,
    world: World,
) -> Tensor:
    """Leaves the gradient of the mean loss over the global batch in policy and strength, the same on every rank.

    Returns (filler included) (rows, 7) on every rank: position in the batch (-1 for filler), loss, chosen and rejected
    reward, chosen and rejected log-prob, and whether a signal reached the row's rank.
    """
    noise = draws(config, step, len(batch), world.device)
    records: list[Tensor] = []

    def loss_of(members: list[list[int]]) -> Tensor:
        mine = members[world.rank]
        index = [batch[i] for i in mine]
        logps, reference = score_pairs(network, pairs, index, world.device), reference_logps[index].T
        mine_noise = None if noise is None else noise[mine]
        losses, chosen, rejected = mixdpo_loss(
            logps[0], logps[1], reference[0], reference[1], strength, noise=mine_noise
        )
        position = torch.tensor(mine, dtype=torch.float64, device=world.device)
        records.append(torch.stack([position, losses.detach(), chosen, rejected, *logps.detach()], -1))
        # FSDP averages over ranks: times the number of ranks, over the global count, gives the mean over the batch.
        return (losses * present(mine, world.device)).sum() * world.size / len(batch)

    lengths = pairs.select(batch).lengths
    backward_in_parts(network, deal(lengths, world.size, config.micro_batch_tokens), loss_of)
    for gradient in [p.grad for p in strength.parameters() if p.grad is not None]:
        # The strength module is outside FSDP: its gradient is averaged by hand.
        dist.all_reduce(gradient)
        gradient /= world.size
    rows = torch.cat(records)
    return world.gather(torch.cat([rows, torch.full_like(rows[:, :1], float(STOP.is_set()))], -1))


def check_finite(
    values: np.ndarray, norms: list[float], step: int, batch: list[int], pairs: Pairs, strength: Strength, path: Path
) -> None:
    """Stops before the optimiser step, with what is needed to find the cause, also as a JSON file."""
    bad = ~np.isfinite(values).all(-1)
    if not bad.any() and all(map(math.isfinite, norms)):
        return
    rows = sorted(pairs.rows[batch[int(i)]] for i in values[bad, 0])
    margins = values[~bad, 2] - values[~bad, 3]
    span = f"[{margins.min():.4g}, {margins.max():.4g}]" if len(margins) else "none finite"
    fields = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    every = [
        {"row": pairs.rows[batch[int(v[0])]]} | {name: repr(x) for name, x in zip(fields, v[1:].tolist(), strict=True)}
        for v in values
    ]
    if dist.get_rank() == 0:
        write_json(
            path, {"step": step, "gradient_norms": list(map(repr, norms)), "rows": every} | strength_values(strength)
        )
    raise RuntimeError(
        f"update {step}: loss or gradient is not finite, the policy was not changed. Training rows with a bad loss: "
        f"{rows or 'none'}; reward margins of the others {span}; gradient norms {norms}; {strength}; "
        f"every row is in {path}"
    )


def train(
    config: Config,
    splits: dict[str, Pairs],
    reference: dict[str, np.ndarray],
    key: dict[str, str],
    network: nn.Module,
    world: World,
) -> Strength:
    """Trains policy and strength, from the newest checkpoint if there is one; `key`: of the reference log-probs."""
    pairs, held_out = splits["train"], splits["validation"]
    strength = make_strength(config, world.device)
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "lr": config.lr}]
    if list(strength.parameters()):
        # RMSprop is scale-free: at the policy's lr of 5e-7 a strength parameter would move 5e-4 in a whole run.
        groups.append({"params": list(strength.parameters()), "lr": config.beta_lr})
    optimizer, schedule = optimizer_for(groups, config.warmup)
    reference_logps = torch.from_numpy(reference["train"]).to(world.device)
    last = config.epochs * math.ceil(len(pairs) / config.batch_size)
    eval_steps = max(1, config.eval_every // config.batch_size)
    save_steps = max(1, config.save_every // config.batch_size)
    output = Path(config.output_dir)
    path = output / "metrics.jsonl"

    def evaluate(step: int) -> None:
        metrics = evaluate_policy(config, network, strength, held_out, reference["validation"], world)
        if world.rank == 0:
            logger.log(step, examples, "eval", metrics, strength)
        beta = ", ".join(f"{name} {value:.4g}" for name, value in beta_metrics(strength).items())
        world.print(
            f"{examples:>7,} examples: held-out loss {metrics['loss']:.4f}, accuracy "
            f"{metrics['rewards/accuracies']:.3f}, reward margin {metrics['rewards/margins']:+.4f}, {beta}"
        )

    state = nn.ModuleDict({"policy": network, "strength": strength})
    mine = key | {"mixdpo": file_hash(Path(mixdpo.__file__))}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(output / "checkpoints", config.keep, mine, state, optimizer, schedule, world)
            )
        )
        progress = checkpoints.restore() or {"step": 0, "examples": 0, "metrics_bytes": 0}
        examples = progress["examples"]
        with world.rank_zero_first():
            if world.rank == 0:
                cut_metrics(path, progress["metrics_bytes"])
                logger = stack.enter_context(contextlib.closing(Logger(config, progress["step"])))
        if progress["step"]:
            world.print(f"goes on after update {progress['step']} of {last}")
        else:
            evaluate(0)
        order = batches(len(pairs), config.batch_size, config.epochs, config.seed)
        with world.bar(config.epochs * len(pairs), "train", initial=examples) as bar:
            for step, batch in itertools.islice(enumerate(order, 1), progress["step"], None):
                began = time.perf_counter()
                rows = preference_gradients(config, step, batch, pairs, reference_logps, network, strength, world)
                norm = clip_policy(network, config.max_grad_norm)
                beta_norm = nn.utils.get_total_norm([p.grad for p in strength.parameters() if p.grad is not None])
                # The one wait for the device in a step: everything that the host needs comes in one copy.
                *flat, grad_norm, beta_grad_norm = torch.cat([rows.flatten(), norm[None], beta_norm[None]]).tolist()
                values = np.array(flat).reshape(rows.shape)
                stop = values[:, 6].any()
                values = values[values[:, 0] >= 0, :6]
                norms = [grad_norm, beta_grad_norm]
                check_finite(values, norms, step, batch, pairs, strength, output / "diagnostics.json")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                examples += len(batch)
                metrics = row_metrics(values[:, 1:]) | {"grad_norm": grad_norm, "beta_grad_norm": beta_grad_norm}
                metrics["examples_per_second"] = len(batch) / (time.perf_counter() - began)
                if world.rank == 0:
                    logger.log(step, examples, "train", metrics, strength)
                bar.update(len(batch))
                bar.set_postfix(loss=f"{metrics['loss']:.4f}")
                if step % eval_steps == 0 or step == last:
                    evaluate(step)
                if step % save_steps == 0 or step == last or stop:
                    check_strength(strength, world)
                    size = 0
                    if world.rank == 0:
                        sync(path)
                        size = path.stat().st_size
                    checkpoints.save(step, {"step": step, "examples": examples, "metrics_bytes": size})
                if stop and step != last:
                    checkpoints.wait()
                    raise Interrupted(f"interrupted and saved after update {step}: the same command goes on")
        checkpoints.wait()
        if world.rank == 0:
            counts = read_json(output / "data.json")["tokenised"]["train"]
            logger.table(strength_values(strength) | beta_metrics(strength) | counts)
    return strength


def cut_metrics(path: Path, size: int) -> None:
    """Cuts off the lines that were written after the checkpoint: they will be written again."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise UserError(
            f"{path} has {there} bytes, {size} when the checkpoint was made: restore it, or remove checkpoints/ beside "
            "it to train again"
        )
    if there:
        os.truncate(path, size)


def check_strength(strength: Strength, world: World) -> None:
    """Raises RuntimeError if ranks have come apart; warns, once, of parameters that have drifted far away."""
    if parameters := list(strength.parameters()):
        ranks = world.gather(torch.cat([p.detach() for p in parameters])[None])
        if not (ranks == ranks[0]).all():
            raise RuntimeError(f"the strength parameters differ between ranks: {ranks.tolist()}")
    for name, value in strength_values(strength).items():
        if name != "loc" and not 1e-3 < value < 1e4:
            say_once(f"warning: {name} of the strength has left [0.001, 10000]: lower --beta-lr, or 0 to keep it fixed")


# --- the run ---------------------------------------------------------------------------------------------------------


def counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in reasons.items()) or "none"


def prepare(config: Config, tokenizer: Any, world: World) -> tuple[dict[str, Pairs], dict[str, Any]]:
    """Token pairs of the training and validation splits, and data.json."""
    with world.rank_zero_first():
        rows, summary = split_preferences(
            read_preferences(config.dataset, config.data_dir, **data_options(config)), config.seed
        )
        splits: dict[str, Pairs] = {}
        report: dict[str, Any] = {"dataset": config.dataset} | summary | {"tokenised": {}}
        for name, limit in (("train", config.max_pairs), ("validation", config.eval_pairs)):
            if not len(rows[name]):
                raise UserError(
                    f"the {name} split of --dataset {config.dataset} is empty ({summary['rows_read']} rows read, "
                    f"dropped: {counted(summary['rows_dropped'])}): pass more data"
                )
            splits[name], report["tokenised"][name] = tokenize(
                sample(rows[name], limit, config.seed), tokenizer, config.max_length, config.max_prompt_length
            )
    for name, counts in report["tokenised"].items():
        if counts["used"] < (minimum := config.batch_size if name == "train" else 1):
            raise UserError(
                f"--dataset {config.dataset}: {counts['used']} {name} pairs are left of {summary['rows_read']} rows, "
                f"fewer than {minimum} (--batch-size): pass more data or lower it"
            )
    return splits, report


def run(config: Config, world: World, held: contextlib.ExitStack) -> None:
    """The stages in their order; `held` keeps the locks, and the handlers of signals, until it is closed."""
    for name in ("batch_size", "eval_batch_size"):
        if getattr(config, name) % world.size:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)} is not a multiple of the {world.size} ranks: "
                "change one of them"
            )
    if config.logger != "none" and not importlib.util.find_spec(config.logger):
        raise UserError(
            f"--logger {config.logger} needs {config.logger}: pip install 'mixdpo[loggers]', or pip install it"
        )
    with world.rank_zero_first():
        model = locate_model(config.model)
    tokenizer = load_tokenizer(model)
    architecture, parameters = check_model(model, tokenizer)
    context = getattr(architecture.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > context:
        raise UserError(
            f"--max-length {config.max_length} is beyond the {context} positions of {config.model}: lower it"
        )
    if not config.micro_batch_tokens:
        # A run that goes on keeps the size it started with: sums are rounded by micro-batch.
        started = Path(config.output_dir) / "config.json"
        tokens = read_json(started).get("micro_batch_tokens") if started.exists() else None
        tokens = tokens or max(2 * config.max_length, micro_batch_tokens(architecture, parameters, world))
        config = dataclasses.replace(config, micro_batch_tokens=tokens)
    splits, report = prepare(config, tokenizer, world)
    updates = config.epochs * math.ceil(len(splits["train"]) / config.batch_size)
    strength = make_strength(config)
    learned = f"learned at lr {config.beta_lr:g}" if list(strength.parameters()) else "fixed"
    world.print(
        f"{strength} {learned}; {config.model} ({architecture.model_type}, {parameters:,} parameters); "
        f"{config.dataset}: {len(splits['train']):,} pairs, {updates} updates of {config.batch_size}, "
        f"{len(splits['validation'])} held out; {world.size} x {world.device.type}; "
        f"policy {config.policy_dtype}, reference {config.reference_dtype}; micro-batches of "
        f"{config.micro_batch_tokens:,} tokens"
    )
    world.print(f"data: {report['rows_read']:,} rows, {report['split']}; dropped: {counted(report['rows_dropped'])}")
    for name, counts in report["tokenised"].items():
        world.print(f"tokens, {name}: " + ", ".join(f"{k.replace('_', ' ')} {n:,}" for k, n in counts.items()))
    examples = sft_examples(splits["train"])
    ready = has_sft(config, examples, tokenizer)
    dist.barrier()  # every rank has looked before rank 0 writes
    with world.rank_zero_first():
        if world.rank == 0:
            claim_output_dir(config, held)
            writable_directory("--sft-dir", Path(config.sft_dir).parent)
            writable_directory("--reference-cache", Path(config.reference_cache).parent)
            if Path(config.reference_cache).is_dir():
                raise UserError(f"--reference-cache {config.reference_cache} is a directory: name a file")
            # What runs share is made by one of them at a time.
            if not ready:
                hold("--sft-dir", unfinished(config.sft_dir), held)
                if has_sft(config, examples, tokenizer):
                    raise UserError(f"--sft-dir {config.sft_dir} has just been made by another run: start again")
            if not Path(config.reference_cache).exists():
                hold("--reference-cache", unfinished(config.reference_cache), held)
            write_json(Path(config.output_dir) / "data.json", report)

    held.enter_context(stop_signals())  # until here nothing had to be saved
    if ready:
        world.print(f"SFT: taken from {config.sft_dir}")
    else:
        sft(config, model, tokenizer, examples, splits["train"], world)
    key = reference_key(config, splits)
    reference = reference_pass(config, splits, key, world)
    gc.collect()
    network = load_model(config.sft_dir, config.policy_dtype, world, splits["train"], **economies(config))
    strength = train(config, splits, reference, key, network, world)
    output = Path(config.output_dir)
    export(network, tokenizer, output / "policy", world)
    if world.rank == 0:
        summary = {"family": config.dist, "learned": bool(list(strength.parameters()))} | strength_values(strength)
        summary |= {k[5:]: v for k, v in beta_metrics(strength).items()}
        lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        *_, last = (line for line in lines if "eval/loss" in line)
        held_out = {k[5:]: v for k, v in last.items() if k.startswith("eval/")}
        card = model_card(config, summary, report["tokenised"]["train"], held_out)
        write_text(output / "policy" / "README.md", card)
        write_json(output / "strength.json", summary)  # last: it says that the run is finished
    world.print(f"{strength}: policy and strength are in {output}")


LICENCES = {
    "hh": "Anthropic HH: MIT.",
    "prism": "PRISM: human texts CC-BY-4.0, responses of models CC-BY-NC-4.0 and under the terms of their providers.",
    "community-alignment": "Community Alignment: CC-BY-4.0.",
    "demo": "Demonstration data made by train.py.",
}


def model_card(config: Config, summary: dict[str, Any], counts: dict[str, int], held_out: dict[str, float]) -> str:
    """policy/README.md. summary: strength.json; counts: of the training pairs; held_out: the last metrics."""
    base = "random weights" if config.model == "tiny" else Path(config.model).name
    # A hub id, and no directory of this machine.
    front = f"base_model: {config.model}\n" if config.model.count("/") == 1 and not Path(config.model).exists() else ""
    data = Path(config.dataset).name
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*LOCATION_FLAGS, "model", "dataset")}
    return (
        f"---\nlibrary_name: transformers\ntags: [dpo, mixdpo, preference]\n{front}---\n\n"
        f"# {base}, {config.dist} on {data}\n\n"
        "Trained by train.py of MixDPO (arXiv 2601.06180): SFT on the chosen responses, then preference training with "
        "`-log E_beta[sigma(beta * delta_r)]`. Load it with `AutoModelForCausalLM.from_pretrained`; weights are "
        "float32.\n\n"
        f"## Preference strength\n\n{table_of(summary)}\n\n"
        f"## Held-out pairs, at the end of training\n\n{table_of(held_out)}\n\n"
        "Log-probs are summed over response tokens, in nats; the preference margin is logps/chosen - logps/rejected. "
        "Margins of subgroups: `evaluate.py margins`.\n\n"
        f"## Data\n\n{LICENCES.get(config.dataset, 'A file of your own: its licence is yours to state.')} "
        "A policy may carry the conditions of the base model and of the data.\n\n"
        f"{table_of(counts)}\n\n## Settings\n\n{table_of(flags)}\n"
    )


def quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it raises, too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse_config(argv)
        quiet_libraries()
        with start_processes() as world, contextlib.ExitStack() as held:
            run(config, world, held)
    except (UserError, OSError) as e:
        return report_error("train.py", e, argv)
    except torch.OutOfMemoryError as e:
        # Of whatever rank: the others only see that it is gone.
        print(f"train.py: out of memory: lower --micro-batch-tokens ({str(e).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before stop_signals
        if os.environ.get("RANK", "0") == "0":
            print("train.py: interrupted before the training: nothing was lost", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
