"""The package as pip installs it, wheel and editable, beside the real mergekit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PIP = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")


def run(*command: str | Path, switch: str = "1") -> subprocess.CompletedProcess[str]:
    """Run away from the repository, so that what is imported comes from the environment."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["MERGEKIT_ARM_AUTOLOAD"] = switch
    return subprocess.run(
        command, env=env, cwd=Path(sys.prefix), capture_output=True, text=True, check=False
    )


def succeed(*command: str | Path, switch: str = "1") -> str:
    done = run(*command, switch=switch)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def make_environment(directory: Path) -> Path:
    """Return the python of a fresh environment seeing this one's packages, not its .pth files."""
    succeed(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    site_packages = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    here = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    # Named so that it comes last: what is installed into the environment wins.
    (site_packages / "zz_packages_of_the_tests.pth").write_text("\n".join(here))
    return python


def install(python: Path, kind: str, scratch: Path) -> None:
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    if kind == "wheel":
        succeed(*PIP, "wheel", *options, "--wheel-dir", scratch, ROOT)
        what: tuple[str | Path, ...] = tuple(scratch.glob("*.whl"))
    else:
        what = ("--editable", ROOT)
    # This environment's own copy, which the fresh one sees, must not count as installed.
    succeed(*PIP, "--python", python, "install", "--ignore-installed", *options, *what)


def files(environment: Path) -> set[Path]:
    return set(environment.rglob("*"))


Installed = tuple[Path, set[Path]]
"""The python of an environment that the package is installed in, and what files that had before."""


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    directory = tmp_path_factory.mktemp(request.param)
    python = make_environment(directory / "environment")
    before = files(directory / "environment")
    install(python, request.param, directory / "wheels")
    return python, before


@pytest.fixture
def python(installed: Installed) -> Path:
    return installed[0]


def test_commands_and_python_know_our_methods(python: Path) -> None:
    code = """if True:
        import sys
        from importlib.metadata import entry_points
        scripts = entry_points(group="console_scripts")
        (multi,), (yaml,) = (scripts.select(name=f"mergekit-{n}") for n in ("multi", "yaml"))
        multi.load()
        from mergekit.merge_methods import get, merge_state_dicts
        print(get("aim").spec.name, get("aim_ties").spec.name)
        sys.argv = ["mergekit-yaml", "--help"]
        yaml.load()()"""
    assert succeed(python, "-c", code).startswith("aim aim_ties\nUsage: mergekit-yaml")


def test_bare_python_imports_neither_torch_nor_mergekit(python: Path) -> None:
    code = "import sys; print(*sys.modules)"
    ours = set(succeed(python, "-c", code).split()) - set(
        succeed(python, "-c", code, switch="0").split()
    )
    assert ours == {"mergekit_arm", "mergekit_arm.autoload"}


def test_switched_off_mergekit_does_not_know_them(python: Path) -> None:
    code = "from mergekit.merge_methods import get; get('ties'); get('aim')"
    done = run(python, "-c", code, switch="0")
    assert done.returncode == 1
    assert "Unimplemented merge method aim" in done.stderr


def test_uninstall_leaves_nothing(installed: Installed) -> None:
    """The last test of an environment: it is as it was before."""
    python, before = installed
    environment = python.parents[1]
    new = files(environment) - before
    added = {path.name for path in new if path.parent.name == "site-packages"}
    assert {"mergekit_arm.pth", "mergekit_arm.start"} <= added
    succeed(*PIP, "--python", python, "uninstall", "--quiet", "--yes", "mergekit-arm")
    assert files(environment) == before
