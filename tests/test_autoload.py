"""The import hook, with a few lines in place of mergekit and of our methods.

``test_installation.py`` has the same with the real ones, installed by pip.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE

HOST = """
'''Stands for mergekit.merge_methods.'''
known = []
"""
METHODS = """
def register_all():
    import mergekit_arm.methods.aim
    from mergekit.merge_methods import known
    if "aim" not in known:
        known.append("aim")
"""
AIM = "from mergekit.merge_methods import known\n"


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    """A site-packages directory with our hook and the two stand-ins."""
    host = tmp_path / "mergekit" / "merge_methods"
    methods = tmp_path / "mergekit_arm" / "methods"
    host.mkdir(parents=True)
    methods.mkdir(parents=True)
    (host.parent / "__init__.py").touch()
    (host / "__init__.py").write_text(HOST)
    (methods / "__init__.py").write_text(METHODS)
    (methods / "aim.py").write_text(AIM)
    for name in ("__init__.py", "autoload.py"):
        shutil.copy(PACKAGE / name, methods.parent)
    for name in ("mergekit_arm.pth", "mergekit_arm.start"):
        shutil.copy(PACKAGE / name, tmp_path)
    return tmp_path


START = """if True:
    import pkgutil
    from pathlib import Path
    def start(folder):
        '''What Python 3.15 does with a .start file: import and call what each line names.'''
        for line in (Path(folder) / "mergekit_arm.start").read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                pkgutil.resolve_name(line.strip())()
"""


def run(site_dir: Path, code: str, *, switch: str = "1") -> tuple[list[str], str]:
    """Run ``code`` as Python would with this site-packages only: stdout in words, and stderr."""
    done = subprocess.run(
        [
            sys.executable,
            *("-I", "-S", "-c"),
            f"import site, sys; site.addsitedir({str(site_dir)!r})\n{code}",
        ],
        env={**os.environ, "MERGEKIT_ARM_AUTOLOAD": switch},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_methods_are_known_once_mergekit_is_imported(site_dir: Path) -> None:
    code = "import mergekit.merge_methods as host; print(*host.known)"
    assert run(site_dir, code) == (["aim"], "")


def test_start_up_imports_nothing_but_the_hook(site_dir: Path) -> None:
    code = "print(*sorted(sys.modules))"
    with_hook, _ = run(site_dir, code)
    without, _ = run(site_dir, code, switch="0")
    assert set(with_hook) - set(without) == {"mergekit_arm", "mergekit_arm.autoload"}


def test_switched_off_nothing_is_imported_or_registered(site_dir: Path) -> None:
    code = (
        "import mergekit.merge_methods as host; print(*host.known, 'mergekit_arm' in sys.modules)"
    )
    assert run(site_dir, code, switch="0") == (["False"], "")


def test_mergekit_imported_before_the_hook_registers_at_once(site_dir: Path) -> None:
    code = """if True:
        import mergekit.merge_methods as host
        print(len(host.known))
        import os
        from mergekit_arm import autoload
        os.environ["MERGEKIT_ARM_AUTOLOAD"] = "1"
        autoload.install()
        print(*host.known)"""
    assert run(site_dir, code, switch="0") == (["0", "aim"], "")


@pytest.mark.parametrize(
    "order", ["start(folder)", "start(folder); again()", "again(); start(folder)"]
)
def test_start_and_pth_install_once(site_dir: Path, order: str) -> None:
    """By the .start alone, or with the .pth before or after it, as where both are read."""
    (site_dir / "mergekit_arm.pth").rename(site_dir / "mergekit_arm.kept")
    code = f"""{START}
    folder = {str(site_dir)!r}
    before = len(sys.meta_path)
    def again():
        lines = (Path(folder) / "mergekit_arm.kept").read_text()
        for line in lines.splitlines():
            exec(line)
    {order}
    import mergekit.merge_methods as host
    print(len(sys.meta_path) - before, *host.known)"""
    if sys.version_info >= (3, 15):  # has read the file already
        code = f"import mergekit.merge_methods as host; print(1, *host.known)\n{code}"
        assert run(site_dir, code) == (["1", "aim", "0", "aim"], "")
    else:
        assert run(site_dir, code) == (["1", "aim"], "")


def test_start_is_switched_off_as_the_pth_is(site_dir: Path) -> None:
    code = f"""{START}
    before = len(sys.meta_path)
    start({str(site_dir)!r})
    import mergekit.merge_methods as host
    print(len(sys.meta_path) - before, *host.known, "mergekit_arm.methods" in sys.modules)"""
    assert run(site_dir, code, switch="0") == (["0", "False"], "")


@pytest.mark.parametrize("first", ["mergekit_arm.methods", "mergekit_arm.methods.aim"])
def test_our_own_module_imported_first(site_dir: Path, first: str) -> None:
    # It imports mergekit while it is itself half-executed.
    code = f"import {first}; import mergekit.merge_methods as host; print(*host.known)"
    assert run(site_dir, code) == (["aim"], "")


def test_processed_twice_installs_one_finder(site_dir: Path) -> None:
    # A virtual environment that sees the system's site-packages may find the .pth in both.
    code = f"""if True:
        before = len(sys.meta_path)
        site.addsitedir({str(site_dir)!r})
        sys.modules.pop("mergekit_arm.autoload")
        from mergekit_arm import autoload
        autoload.install()
        import mergekit.merge_methods as host
        print(len(sys.meta_path) - before, *host.known)"""
    assert run(site_dir, code) == (["0", "aim"], "")


def test_reload_and_reimport_register_again(site_dir: Path) -> None:
    code = """if True:
        import importlib, mergekit.merge_methods as host
        print(*importlib.reload(host).known)
        for name in [name for name in sys.modules if name.startswith("mergekit")]:
            if name != "mergekit_arm.autoload":
                del sys.modules[name]
        import mergekit.merge_methods as again
        print(*again.known, again is host)"""
    assert run(site_dir, code) == (["aim", "aim", "False"], "")


def test_loader_stays_the_real_one_for_those_who_look(site_dir: Path) -> None:
    code = """if True:
        import importlib.util, inspect, importlib.resources, pkgutil, runpy
        from importlib.machinery import SourceFileLoader
        name = "mergekit.merge_methods"
        found = importlib.util.find_spec(name).loader  # before the import: wrapped
        print(found.is_package(name), found.get_code(name) is not None)
        print("Stands for" in found.get_source(name), found.path == found.get_filename(name))
        import mergekit.merge_methods as host
        print(type(host.__loader__) is type(host.__spec__.loader) is SourceFileLoader)
        print("Stands for" in inspect.getsource(host))
        print(importlib.resources.files(host).joinpath("__init__.py").is_file())
        print(runpy.run_module(name + ".__init__")["known"] == [])"""
    assert run(site_dir, code) == (["True"] * 8, "")


@pytest.mark.parametrize(
    ("methods", "cause"),
    [
        ("def register_all():\n    raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise ImportError('no torch here')", "ImportError: no torch here"),
        (None, "No module named 'mergekit_arm.methods'"),
    ],
)
def test_failed_registration_is_one_line_and_mergekit_works(
    site_dir: Path, methods: str | None, cause: str
) -> None:
    if methods is None:
        shutil.rmtree(site_dir / "mergekit_arm" / "methods")
    else:
        (site_dir / "mergekit_arm" / "methods" / "__init__.py").write_text(methods)
    out, err = run(site_dir, "import mergekit.merge_methods as host; print(len(host.known))")
    assert out == ["0"]
    assert err.count("\n") == 1
    assert cause in err
    assert "MERGEKIT_ARM_AUTOLOAD=0" in err


@pytest.mark.parametrize("what", ["autoload.py", ""])
def test_half_removed_package_is_one_line_and_python_starts(site_dir: Path, what: str) -> None:
    remains = site_dir / "mergekit_arm" / what
    remains.unlink() if what else shutil.rmtree(remains)
    out, err = run(site_dir, "import mergekit.merge_methods as host; print(len(host.known))")
    assert out == ["0"]
    assert err.count("\n") == 1
    assert "mergekit-arm: its installation is damaged" in err
    assert run(site_dir, "print('quiet')", switch="0") == (["quiet"], "")


def test_broken_or_missing_mergekit_fails_as_it_does_without_us(site_dir: Path) -> None:
    code = """if True:
        for attempt in range(2):
            try:
                import mergekit.merge_methods
            except ImportError as error:
                print(type(error).__name__, error.name)"""
    host = site_dir / "mergekit" / "merge_methods"
    (host / "__init__.py").write_text("import no_such_dependency\n")
    expected = ["ModuleNotFoundError", "no_such_dependency"] * 2
    assert run(site_dir, code) == (expected, "")
    shutil.rmtree(host.parent)
    assert run(site_dir, code) == (["ModuleNotFoundError", "mergekit"] * 2, "")


def test_other_finders_are_asked_and_old_ones_without_find_spec_skipped(site_dir: Path) -> None:
    code = """if True:
        import importlib.machinery
        asked = []
        class Spy:
            def find_spec(self, name, path=None, target=None):
                asked.append(name)
        class Old:
            def find_module(self, name, path=None):
                return None
        sys.meta_path[1:1] = [Spy(), Old()]
        import mergekit.merge_methods as host
        print(asked.count("mergekit.merge_methods"), *host.known)"""
    assert run(site_dir, code) == (["1", "aim"], "")
