"""The project's commands: `pip install nox`, then `nox -s demo`, `tests`, `lint`, `verify`, `interop`, `judge`,
`bench`, `faults`, `reproduce`, `loggers`.

Each session has its own environment under .nox/, installed once from the pinned groups of pyproject.toml.
"""

import shutil

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True
PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    # One call to pip with the pinned torch among the rest: no requirement can bring a second one.
    session.install(*nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session
def demo(session: nox.Session) -> None:
    """SFT, then DPO and MixDPO with both distributions, then margins and a figure, on the embedded data."""
    install(session, "dev")
    runs = "runs/demo"
    session.log(f"starting afresh in {runs}")
    shutil.rmtree(runs, ignore_errors=True)
    shared = ["--preset", "tiny", "--sft-dir", f"{runs}/sft", "--reference-cache", f"{runs}/reference.safetensors"]
    names = ("dpo", "lognormal", "gamma")
    for name in names:
        session.run("python", "train.py", "--dist", name, *shared, "--output-dir", f"{runs}/{name}", *session.posargs)
    policies = [f"{runs}/{name}/policy" for name in names]
    margins = ["--policy", *policies, "--baseline", f"{runs}/sft", "--output-dir", f"{runs}/margins"]
    session.run("python", "evaluate.py", "margins", *margins)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything under tests/ but test_faults.py, which takes minutes (`nox -s faults`); `-- -k NAME` for a part."""
    install(session, "dev")
    # Two workers with a thread each are faster on two cores than one worker with two.
    one_thread = {"OMP_NUM_THREADS": "1"}
    parallel = ["-n", "2", "--dist", "worksteal", "--ignore", "tests/test_faults.py"]
    session.run("python", "-m", "pytest", *parallel, *session.posargs, env=one_thread)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy on the three modules."""
    install(session, "dev", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "mixdpo.py", "train.py", "evaluate.py")


@nox.session
def verify(session: nox.Session) -> None:
    """Every numerical claim against its oracle; `nox -s verify -- NAME` for one."""
    install(session, "dev")
    session.run("python", "-m", "verify", *session.posargs)


@nox.session
def interop(session: nox.Session) -> None:
    """The README's snippets, in a plain loop and in TRL's unmodified DPOTrainer, and what is claimed of them."""
    install(session, "dev", "interop")
    session.run("python", "-m", "verify.interop", "README.md")


@nox.session
def faults(session: nox.Session) -> None:
    """Tests of faults; runs killed at 30 moments end bit for bit as undisturbed ones; a soak (an hour)."""
    install(session, "dev")
    session.run("python", "-m", "pytest", "tests/test_faults.py", env={"OMP_NUM_THREADS": "1"})
    session.run("python", "-m", "verify.faults", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Steps of train.py against the padded baseline and TRL, side by side: time, memory, log-probs (20 minutes)."""
    install(session, "dev", "interop")
    session.run("python", "-m", "verify.bench", *session.posargs)


@nox.session
def judge(session: nox.Session) -> None:
    """Win rates end to end with `transformers serve`: it answers for a policy and is the judge."""
    install(session, "dev", "judge")
    session.run("python", "-m", "verify.judge_session", *session.posargs)


@nox.session
def reproduce(session: nox.Session) -> None:
    """The paper's experiments and their report: `-- --model M --dataset D --scale tiny|small|paper`."""
    install(session, "dev")
    session.run("python", "-m", "verify.reproduce", *session.posargs)


@nox.session
def loggers(session: nox.Session) -> None:
    """What tensorboard and wandb (offline) are given; without them these tests are skipped."""
    install(session, "dev", "loggers")
    session.run("python", "-m", "pytest", "tests/test_loggers.py", *session.posargs)
