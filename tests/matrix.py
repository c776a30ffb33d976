"""`make matrix`: the wheel beside the oldest and newest frameworks, and the rows by other compilers and another CPU.

Each line of its table is one environment, tested in a fresh copy of the tests: the oldest and newest torch and jax that
pip offers this Python and the package admits, every minor Triton from 3.6 on in its interpreter, the newest jax under a
newer Debian's Python (`--debian SUITE`, as root, with debootstrap), Clang, and NEON under qemu. What this machine lacks
is a line with the reason. Environments of a folder given by `--home` are kept, and used again.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tests import fresh

ROOT = fresh.ROOT
BESIDE = {"torch": ["torch"], "jax": ["jax", "jaxlib", "optax"]}  # pip's names; both of jax have one version
TRITON_SINCE = Version("3.6")
TESTS_OF_TRITON = ["tests/rows/gpu"]
BEGIN, END = "<!-- begin: matrix -->", "<!-- end: matrix -->"


class Lacking(Exception):
    """What this machine lacks for an environment."""


@dataclass(frozen=True)
class Line:
    """One environment and how it went."""

    name: str
    found: str  # the versions that were tested
    outcome: str
    seconds: float
    failed: bool = False


def lines(wheel: Path, home: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Every environment asked for, as it is done."""
    todo: dict[str, Callable[[], tuple[str, str]]] = {}
    for framework in BESIDE:
        for which in ("oldest", "newest"):
            todo[f"{framework} {which}"] = partial(beside, framework, which, wheel, home)
    for version in _minors(_offered("triton", TRITON_SINCE)):
        todo[f"triton {version.major}.{version.minor}"] = partial(interpreted, version, wheel, home)
    if options.debian:
        todo[f"jax newest, {options.debian}"] = partial(debian, options.debian, wheel, home)
    todo["Clang"] = partial(rows_by, "clang++", home, [])
    todo["NEON"] = partial(rows_by, "aarch64-linux-gnu-g++", home, options.emulate)
    for name, run in todo.items():
        if options.only and not any(name.lower().startswith(word.lower()) for word in options.only):
            continue
        begin = time.monotonic()
        try:
            found, outcome = run()
            yield Line(name, found, outcome, time.monotonic() - begin)
        except Lacking as why:
            yield Line(name, "", f"not run: {why}", time.monotonic() - begin)
        except subprocess.CalledProcessError as error:
            said = f"{error.stdout or ''}{error.stderr or ''}".strip().splitlines()
            print("\n".join(said[-40:]), file=sys.stderr)
            failures = next((line for line in reversed(said) if re.search(r"\d+ failed|rror", line)), "no word")
            yield Line(name, "", f"FAILED: {failures.strip('= ')}", time.monotonic() - begin, failed=True)


def beside(framework: str, which: str, wheel: Path, home: Path) -> tuple[str, str]:
    """The wheel with one version of one framework, and nothing of the other."""
    refused = ""
    offered = _offered(framework, _floor(framework))
    for version in offered[:1] if which == "oldest" else offered[:-4:-1]:
        python = _environment(home / f"{framework}-{version}")
        names = [f"{name}=={version}" if name != "optax" else name for name in BESIDE[framework]]
        try:
            _pip(python, *names, *fresh.TOOLS)
        except subprocess.CalledProcessError as error:
            refused = refused or (error.stderr.strip().splitlines() or ["refused"])[-1]
            shutil.rmtree(python.parents[1])
            continue
        fresh.install(wheel, python)
        return f"{framework} {version}", _tested(python, home, fresh.tests_of(python, [framework], whole=False))
    raise Lacking(f"pip installs none: {refused}")


def interpreted(version: Version, wheel: Path, home: Path) -> tuple[str, str]:
    """The Triton kernels in one version's interpreter, beside this environment's PyTorch."""
    python = home / f"triton-{version}" / "bin" / "python"
    if not python.exists():
        _environment(python.parents[1])
        _pip(python, "--no-deps", f"triton=={version}")
        if version < Version("3.7"):  # whose interpreter takes arrays of one entry for numbers
            _pip(python, "--no-deps", "numpy<2.4")
    fresh.install(wheel, python, ["torch"])  # whose Triton is not linked over the one that is there
    command = [str(python), "-m", "pytest", "-n", "2", "-m", "not slow and not long", *TESTS_OF_TRITON]
    return f"triton {version}", _tested(python, home, command)


def debian(suite: str, wheel: Path, home: Path) -> tuple[str, str]:
    """The newest jax under the Python of a Debian suite, in a chroot."""
    root = home / suite
    if not (root / "usr" / "bin" / "python3").exists():
        _need("debootstrap")
        packages = "--include=python3,python3-venv,ca-certificates"
        _run(["debootstrap", "--variant=minbase", packages, suite, str(root)])
    inside = ["chroot", str(root)]
    told = _run([*inside, "python3", "-c", "import sys; print('.'.join(map(str, sys.version_info[:2])))"]).strip()
    wheels = root / "wheels"
    if not wheels.exists():  # from outside: the chroot need reach no network
        where = ["--dest", str(wheels), "--python-version", told, "--only-binary=:all:"]
        _run([sys.executable, "-m", "pip", "download", "--quiet", *where, *BESIDE["jax"], *fresh.TOOLS])
    shutil.copy(wheel, wheels)
    _run([*inside, "python3", "-m", "venv", "--clear", "/env"])
    install = ["/env/bin/pip", "install", "--quiet", "--no-index", "--find-links", "/wheels", "--no-deps"]
    _run([*inside, *install, *(f"/wheels/{file.name}" for file in sorted(wheels.glob("*.whl")))])
    fresh.copy_tests(root / "checkout")
    (python,) = {"/env/bin/python"}
    command = [
        *inside,
        "/bin/sh",
        "-c",
        'cd /checkout && exec "$@"',
        "sh",
        *fresh.tests_of(Path(python), ["jax"], whole=False),
    ]
    version = _run([*inside, python, "-c", "import jax; print(jax.__version__)"]).strip()
    return f"jax {version}, Python {told}", _counts(_run(command))


def rows_by(compiler: str, home: Path, emulate: bool | Sequence[str]) -> tuple[str, str]:
    """The rows' driver built by another compiler, for this CPU or for one that qemu plays."""
    _need(compiler)
    build = home / compiler
    defined = ["-DSOFTMAX_EXT_DRIVERS=ON", f"-DCMAKE_CXX_COMPILER={compiler}"]
    if cross := compiler.partition("-linux-gnu")[0] if "-linux-gnu" in compiler else "":
        defined += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={cross}"]
        emulator = f"qemu-{cross}-static"
        defined.append(f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator};-L;/usr/{cross}-linux-gnu")
    _run(["cmake", "-S", str(ROOT), "-B", str(build), "--log-level=WARNING", *defined])
    _run(["cmake", "--build", str(build), "--parallel", "2"])
    version = _run([compiler, "--version"]).splitlines()[0]
    if cross and not emulate:
        return version, "built"
    if cross:
        _need(emulator)
    said = _run(["ctest", "--test-dir", str(build), "--verbose"])
    ran = re.findall(r"(\d+) calls, instruction set (\S+)", said)
    if not ran:
        raise Lacking("the driver ran nothing")
    return version, ", ".join(f"{calls} calls right by {name}" for calls, name in ran)


def _offered(name: str, since: Version) -> list[Version]:
    """What pip offers this Python, oldest first."""
    said = _run([sys.executable, "-m", "pip", "index", "versions", name])
    found = re.search(r"Available versions: (.*)", said)
    every = sorted({Version(word) for word in found[1].split(", ")} if found else ())
    return [version for version in every if version >= since and not version.local]


def _minors(versions: Sequence[Version]) -> list[Version]:
    """The newest of each minor version."""
    return list({version.release[:2]: version for version in versions}.values())


def _floor(framework: str) -> Version:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (r for r in map(Requirement, project["optional-dependencies"][framework]) if r.name == framework)
    return Version(re.sub(r"^>=", "", str(needed.specifier)))


def _environment(folder: Path) -> Path:
    """The interpreter of an environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
    return python


def _pip(python: Path, *words: str) -> None:
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *words])


def _tested(python: Path, home: Path, command: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="checkout-", dir=home) as folder:
        fresh.copy_tests(Path(folder))
        return _counts(_run(command, cwd=Path(folder)))


def _counts(said: str) -> str:
    """pytest's last line."""
    last = re.findall(r"^=*\s*(\d+ (?:passed|failed).*?) in [\d.]+s", said, re.MULTILINE)
    if not last:
        raise Lacking("no test ran")
    return re.sub(r", \d+ warnings?", "", last[-1])


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise Lacking(f"{program} is not installed")


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def table(found: Sequence[Line]) -> str:
    """As the docs have it."""
    rows = ["| | tested | outcome | s |", "| --- | --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {a.name} | {a.found} | {a.outcome} | {a.seconds:.0f} |" for a in found)])


def main(given: Sequence[str] | None = None) -> int:
    """Test, print and keep; 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("wheel", nargs="?", type=Path, help="not needed for Clang and NEON alone")
    parser.add_argument("--only", nargs="+", help="lines whose names begin so")
    parser.add_argument("--debian", metavar="SUITE", help="also the newest jax under this suite's Python")
    parser.add_argument("--no-emulator", dest="emulate", action="store_false", help="NEON is built, not run")
    parser.add_argument("--home", type=Path, help="a folder to keep environments in (default: none is kept)")
    parser.add_argument("--page", type=Path, help="the page whose table is written anew")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="softmax-ext-") as temporary:
        home = (options.home or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        found = []
        for line in lines(options.wheel and options.wheel.resolve(), home, options):
            print(f"{line.name}: {line.found or '-'}: {line.outcome} ({line.seconds:.0f} s)", flush=True)
            found.append(line)
    if options.page:
        text = options.page.read_text()
        before, _, after = text.partition(BEGIN)
        day = datetime.date.today().isoformat()
        new = f"{before}{BEGIN}\n{day}:\n\n{table(found)}\n{END}{after.partition(END)[2]}"
        options.page.write_text(new)
    return int(any(line.failed for line in found))


if __name__ == "__main__":
    sys.exit(main())
