"""Checks in environments of their own: ``nox -l`` lists them, ``nox -s quick -- tests/unit/test_debug.py`` runs one."""

from __future__ import annotations

import nox

RELEASES = ("2.11", "2.12", "2.13")
"""The releases of torch that are supported, as in setup.py and in the CI's matrix."""

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["quick", "docs"]

CPU = {"UV_TORCH_BACKEND": "cpu"}
"""Lets uv pick torch's CPU build."""


@nox.session
def quick(session: nox.Session) -> None:
    """All that a change should pass before it is committed: format, lint, types, and the tests that are not slow."""
    session.install("-e", ".[test]", env=CPU)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests that need no GPU."""
    session.install("-e", ".[test]", env=CPU)
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def torch(session: nox.Session, release: str) -> None:
    """All tests that need no GPU, with one release of torch: ``nox -s "torch(2.11)"``."""
    session.install("-e", ".[test]", f"torch=={release}.*", env=CPU)
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The generated tables, and what the guides refer to, are current."""
    session.install("-e", ".[test]", env=CPU)
    session.run("pytest", "-n", "0", "tests/unit/test_docs.py", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU, in one process: they read how much of its memory is in use."""
    session.install("-e", ".[test,cuda]")
    session.run("pytest", "-m", "cuda", "-n", "0", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines and branches the tests reach, those of child processes too: a report, and pages in ``htmlcov``."""
    session.install("-e", ".[test,dev]", env=CPU)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine")
    session.run("coverage", "html", "--quiet")
    session.run("coverage", "report")
