"""The project's commands: `pip install nox`, then `nox -s demo`, `tests`, `lint`, `verify`, `judge`.

All sessions but `judge` share one environment, so that torch is installed once.
"""

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True
ENVIRONMENT = ".nox/mixdpo"
PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    # The pinned torch goes in first and with the rest, so that nothing can bring a second one.
    session.install(*nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session(venv_location=ENVIRONMENT)
def demo(session: nox.Session) -> None:
    """SFT, then DPO and MixDPO with both distributions, then margins and a figure, on the embedded data."""
    install(session, "dev")
    runs = "runs/demo"
    session.run("python", "-c", f"import shutil; shutil.rmtree('{runs}', ignore_errors=True)", silent=True)
    shared = ["--preset", "tiny", "--sft-dir", f"{runs}/sft", "--reference-cache", f"{runs}/reference.safetensors"]
    names = ("dpo", "lognormal", "gamma")
    for name in names:
        session.run("python", "train.py", "--dist", name, *shared, "--output-dir", f"{runs}/{name}", *session.posargs)
    policies = [f"{runs}/{name}/policy" for name in names]
    margins = ["--policy", *policies, "--baseline", f"{runs}/sft", "--output-dir", f"{runs}/margins"]
    session.run("python", "evaluate.py", "margins", *margins)


@nox.session(venv_location=ENVIRONMENT)
def tests(session: nox.Session) -> None:
    """Everything under tests/; `nox -s tests -- -k NAME` for a part."""
    install(session, "dev")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(venv_location=ENVIRONMENT)
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy on the three modules."""
    install(session, "dev", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "mixdpo.py", "train.py", "evaluate.py")


@nox.session(venv_location=ENVIRONMENT)
def verify(session: nox.Session) -> None:
    """Every numerical claim against its oracle; `nox -s verify -- NAME` for one."""
    install(session, "dev")
    session.run("python", "-m", "verify", *session.posargs)


@nox.session(venv_location=".nox/judge")
def judge(session: nox.Session) -> None:
    """Win rates end to end with `transformers serve`: it answers for a policy and is the judge."""
    install(session, "dev", "judge")
    session.run("python", "-m", "verify.judge_session", *session.posargs)
