"""python -m verify [names ...] [--full]: runs the checks, prints one table, writes it and the figures.

Results are in verify/results. A run of some checks replaces their entries in verify.json and leaves the others as they
are. Each entry keeps the hash of the mixdpo.py that it judged, so that one judged against another file is marked as
such in the table.
Exit status: 0 all rows pass, 1 a row failed, 2 a mistake in what was asked for.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import mpmath
import torch

import mixdpo
from verify import plots
from verify.table import FAILED, Row, number

CHECKS = (
    "closed_form",
    "series_bound",
    "point_mass",
    "identities",
    "gradients",
    "monte_carlo",
    "quadrature",
    "paper_numerics",
    "paper_training",
    "paper_demo",
    "storage_precision",
    "optimizer_scale",
    "recovery",
    "overhead",
    "paper_arithmetic",
    "weights",
)
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- verify:begin -->", "<!-- verify:end -->"


class UserError(Exception):
    """A mistake of the user's: main() prints it as one line and returns 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def fingerprint() -> str:
    return hashlib.sha256(Path(mixdpo.__file__).read_bytes()).hexdigest()[:16]


def run(name: str, full: bool) -> dict:
    """One check: its rows, its figures (saved), and what they were measured with."""
    module = importlib.import_module(f"verify.{name}")
    start = time.perf_counter()
    try:
        rows = module.check(full)
        for title, figure in module.figures(full).items() if hasattr(module, "figures") else ():
            plots.save(figure, RESULTS, title)
    except Exception as error:
        traceback.print_exc()
        rows = [Row(f"{name} runs to its end", f"verify/{name}.py", "no error", repr(error)[:200], "none", FAILED)]
    return {
        "title": (module.__doc__ or name).strip().splitlines()[0].rstrip("."),
        "rows": [asdict(row) for row in rows],
        "full": full,
        "seconds": round(time.perf_counter() - start, 1),
        "mixdpo": fingerprint(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "mpmath": mpmath.__version__},
    }


def write(path: Path, text: str) -> None:
    """Beside, then renamed: a reader never sees half a file."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read(path: Path) -> dict:
    """The saved results; raises UserError for a file that no run left."""
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        markdown(saved), short(saved)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} does not hold saved results ({type(e).__name__}: {e}): restore or remove it") from e
    return saved


def rows_of(entry: dict) -> list[Row]:
    return [Row(**row) for row in entry["rows"]]


def markdown(results: dict) -> str:
    lines = ["# Numerical verification", "", "Written by `nox -s verify`; do not edit.", ""]
    for name, entry in results.items():
        stale = "" if entry["mixdpo"] == fingerprint() else " Judged another version of mixdpo.py."
        versions = ", ".join(f"{k} {v}" for k, v in entry["versions"].items())
        scale = "full" if entry["full"] else "default"
        lines += [f"## {name}", "", f"{entry['title']}. {entry['seconds']} s, {scale} size, {versions}.{stale}", ""]
        lines += ["| claim | source | expected | measured | bound | verdict |", "|---|---|---|---|---|---|"]
        for row in rows_of(entry):
            cells = (row.claim, row.source, row.expected, number(row.measured), number(row.bound), row.verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def short(results: dict) -> str:
    """One line per check, its first row as the example: the README's form."""
    lines = ["| check | rows | for example | measured | bound |", "|---|---|---|---|---|"]
    for name, entry in results.items():
        rows = rows_of(entry)
        judged = [row for row in rows if row.verdict != "reported"]
        passed = f"{sum(row.ok for row in judged)} of {len(judged)} pass" if judged else f"{len(rows)} reported"
        first = (judged or rows)[0]
        cells = (f"`{name}`", passed, first.claim, number(first.measured), number(first.bound))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def into_readme(table: str, readme: Path, begin: str = BEGIN, end: str = END) -> None:
    """Replaces what stands between the two markers."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"--readme {readme} cannot be read ({e}): pass a Markdown file") from e
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"--readme {readme} has no {begin} ... {end}: put both where the table should stand")
    write(readme, f"{before}{begin}\n{table}\n{end}{after}")


def show(name: str, entry: dict) -> None:
    print(f"\n{name}: {entry['title']} ({entry['seconds']} s)")
    for row in rows_of(entry):
        print(f"  {row.verdict:8} | {row.claim} | {row.source} | expected {row.expected} | "
              f"measured {number(row.measured)} | bound {number(row.bound)}", flush=True)  # fmt: skip


def main() -> int:
    try:
        return verify()
    except UserError as e:
        print(f"verify: error: {e}", file=sys.stderr)
        return 2


def verify() -> int:
    # No abbreviations: --ful would start an hour of work.
    parser = Parser(prog="python -m verify", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="check", help=f"any of {', '.join(CHECKS)}; none: all")
    parser.add_argument("--full", action="store_true", help="more points and replications (up to an hour)")
    parser.add_argument("--readme", type=Path, help="only put the short table of the saved results into this file")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CHECKS]
    if unknown:
        raise UserError(f"no check named {', '.join(unknown)}: choose from {', '.join(CHECKS)}")
    if args.readme and (args.names or args.full):
        raise UserError(f"--readme {args.readme} runs no check: leave out the names and --full, or it")
    # The tensors are small: a second thread gains little, and loses much when the other core is busy.
    torch.set_num_threads(1)
    path = RESULTS / "verify.json"
    saved = read(path)
    if args.readme:
        into_readme(short(saved), args.readme)
        return 0
    try:
        RESULTS.mkdir(exist_ok=True)
        write(RESULTS / "verify.md", markdown(saved))
    except OSError as e:
        raise UserError(f"{RESULTS} cannot be written ({e.strerror}): make it a writable directory") from e
    ran = {}
    for name in args.names or CHECKS:
        ran[name] = run(name, args.full)
        show(name, ran[name])
        # After every check, in the order of CHECKS: an interrupted run keeps what it finished.
        saved = {key: entry for key in CHECKS if (entry := ran.get(key) or saved.get(key))}
        write(path, json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
        write(RESULTS / "verify.md", markdown(saved))
    rows = [row for entry in ran.values() for row in rows_of(entry)]
    verdicts = ("passed", "failed", "oracle", "reported")
    count = ", ".join(f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in verdicts)
    seconds = sum(entry["seconds"] for entry in ran.values())
    print(f"\n{count}; {len(ran)} checks in {seconds:.0f} s")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
