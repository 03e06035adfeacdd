"""Activation-informed merge methods for mergekit, and all that the command does as functions.

    >>> import mergekit_arm as ma
    >>> ma.calibrate(ma.CalibrationOptions(model="./base", out="./stats"))

Importing this package imports neither torch nor mergekit: every name below is imported when it is
first used. Every Python program of the environment imports this file, so it needs nothing itself;
see ``autoload`` for how the methods reach mergekit's registry. ``USING.md`` lists the functions.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # known to type checkers by name; importing typing would take milliseconds
if TYPE_CHECKING:
    from mergekit_arm.calibration.calibrate import CalibrationResult as CalibrationResult
    from mergekit_arm.calibration.calibrate import calibrate as calibrate
    from mergekit_arm.calibration.from_config import plan_calibrations as plan_calibrations
    from mergekit_arm.calibration.options import CalibrationOptions as CalibrationOptions
    from mergekit_arm.checking.check import Checked as Checked
    from mergekit_arm.checking.check import check as check
    from mergekit_arm.demo.demo import DemoOptions as DemoOptions
    from mergekit_arm.demo.demo import run_demo as run_demo
    from mergekit_arm.errors import Failure as Failure
    from mergekit_arm.errors import InputError as InputError
    from mergekit_arm.imatrix.exporting import export_imatrix as export_imatrix
    from mergekit_arm.imatrix.importing import Imported as Imported
    from mergekit_arm.imatrix.importing import import_imatrix as import_imatrix
    from mergekit_arm.inspecting.comparison import Comparison as Comparison
    from mergekit_arm.inspecting.comparison import compare as compare
    from mergekit_arm.inspecting.summary import Summary as Summary
    from mergekit_arm.inspecting.summary import summarise as summarise
    from mergekit_arm.inspecting.tensor import TensorFacts as TensorFacts
    from mergekit_arm.inspecting.tensor import look_up as look_up
    from mergekit_arm.publishing.push import Upload as Upload
    from mergekit_arm.publishing.push import prepare_upload as prepare_upload
    from mergekit_arm.publishing.push import push as push
    from mergekit_arm.reporting.report import report as report
    from mergekit_arm.statistics.combine import combine as combine
    from mergekit_arm.statistics.read import Statistics as Statistics
    from mergekit_arm.statistics.read import open_statistics as open_statistics
    from mergekit_arm.streaming.forecast import Forecast as Forecast
    from mergekit_arm.streaming.forecast import forecast_stream as forecast_stream
    from mergekit_arm.streaming.options import StreamOptions as StreamOptions
    from mergekit_arm.streaming.options import WatchOptions as WatchOptions
    from mergekit_arm.streaming.stream import StreamResult as StreamResult
    from mergekit_arm.streaming.stream import stream as stream
    from mergekit_arm.streaming.training.callback import StreamCallback as StreamCallback
    from mergekit_arm.tuning.forecast import TuneForecast as TuneForecast
    from mergekit_arm.tuning.forecast import forecast_tuning as forecast_tuning
    from mergekit_arm.tuning.options import TuneOptions as TuneOptions
    from mergekit_arm.tuning.results import TuneResult as TuneResult
    from mergekit_arm.tuning.tune import plan_tuning as plan_tuning
    from mergekit_arm.tuning.tune import tune as tune

_PLACES = {
    "calibration.calibrate": ("CalibrationResult", "calibrate"),
    "calibration.from_config": ("plan_calibrations",),
    "calibration.options": ("CalibrationOptions",),
    "checking.check": ("Checked", "check"),
    "demo.demo": ("DemoOptions", "run_demo"),
    "errors": ("Failure", "InputError"),
    "imatrix.exporting": ("export_imatrix",),
    "imatrix.importing": ("Imported", "import_imatrix"),
    "inspecting.comparison": ("Comparison", "compare"),
    "inspecting.summary": ("Summary", "summarise"),
    "inspecting.tensor": ("TensorFacts", "look_up"),
    "publishing.push": ("Upload", "prepare_upload", "push"),
    "reporting.report": ("report",),
    "statistics.combine": ("combine",),
    "statistics.read": ("Statistics", "open_statistics"),
    "streaming.forecast": ("Forecast", "forecast_stream"),
    "streaming.options": ("StreamOptions", "WatchOptions"),
    "streaming.stream": ("StreamResult", "stream"),
    "streaming.training.callback": ("StreamCallback",),
    "tuning.forecast": ("TuneForecast", "forecast_tuning"),
    "tuning.options": ("TuneOptions",),
    "tuning.results": ("TuneResult",),
    "tuning.tune": ("plan_tuning", "tune"),
}
"""Module → what it offers here: the same as above, for Python itself."""
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    """Import what is asked for by name, the first time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # not before it is needed: every start of Python would pay for it

    found: object = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return what there is, imported already or not."""
    return sorted({*globals(), *_MODULES})
