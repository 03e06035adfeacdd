"""Gives mergekit our methods, with no flag and no import by the user.

mergekit has no plugin discovery. Two files lie in site-packages once this package is installed,
and either has :func:`install` called whenever Python starts: ``mergekit_arm.start``, which Python
3.15 and later read, and ``mergekit_arm.pth`` for those before. Where both are read, the second call
changes nothing. The function puts a finder on ``sys.meta_path`` which waits for
``mergekit.merge_methods``; as soon as that package has executed,
``mergekit_arm.methods.register_all()`` runs. Once ``mergekit.merge`` has, its ``run_merge`` says
beside a merged model with which statistics it was merged. ``MERGEKIT_ARM_AUTOLOAD=0`` in the
environment switches it all off; the ``.pth`` then does not even import this file.

Every Python program of the environment pays for this file, so it imports nothing that Python has
not loaded by then.
"""

import os
import sys

TYPE_CHECKING = False  # known to type checkers by name; importing typing would take milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

HOST = "mergekit.merge_methods"
METHODS = "mergekit_arm.methods"
MERGE = "mergekit.merge"

# Watched modules that are executing just now, and the registration itself. Whoever imports one of
# our method modules first makes it import mergekit half-way through: registering at that moment
# would find a half-executed module, so it waits until this set is empty again.
_under_way: set[str] = set()


def install() -> None:
    """Watch for mergekit from now on, or register at once if it is imported. Safe to call again.

    Does nothing where ``MERGEKIT_ARM_AUTOLOAD`` is 0.
    """
    if os.environ.get("MERGEKIT_ARM_AUTOLOAD") == "0":
        return
    if not any(getattr(finder, "watches", None) == HOST for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register()


class _Finder:
    """Finds what the finders after it find, and wraps the loader of the modules it watches.

    It stays in place, so that a reloaded mergekit has our methods as well.
    """

    watches = HOST

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if fullname not in (HOST, MERGE) and not f"{fullname}.".startswith(f"{METHODS}."):
            return None
        start = sys.meta_path.index(self) + 1 if self in sys.meta_path else 0
        for finder in sys.meta_path[start:]:
            # Finders from before Python 3.4's protocol exist; the import system skips them too.
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec and find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # it acts as one
                return spec
        return None


class _Loader:
    """The loader it wraps in every respect, but for what follows the execution of a module."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        # What inspects the module later (resources, source, pickles) meets its real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _under_way.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            _under_way.discard(module.__name__)
        _register()


def _register() -> None:
    """Register our methods if mergekit is there for them; a failure is one line on stderr.

    It must not be an exception: mergekit has to work for those who do not use our methods.
    """
    if _under_way or HOST not in sys.modules:
        return
    _under_way.add("registration")
    try:
        from mergekit_arm.methods import register_all  # not earlier: it needs torch and mergekit

        register_all()
        if MERGE in sys.modules:
            from mergekit_arm.publishing.provenance import attach  # it needs them as well

            attach()
    except Exception as error:  # mergekit has to work without us, whatever is wrong here
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        if sys.stderr is not None:  # as under pythonw
            sys.stderr.write(
                f"mergekit-arm: could not add its methods to mergekit, which works without them: "
                f"{cause} (MERGEKIT_ARM_AUTOLOAD=0 switches this off)\n"
            )
    finally:
        _under_way.discard("registration")
