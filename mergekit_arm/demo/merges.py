"""The demo's merges: what is measured for them, some with fixed weights, and some with tuned ones.

Everything lies in the demo's directory, which must be the current one, and on relative paths, so
that the printed commands repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.demo.text import DOMAINS
from mergekit_arm.tuning.options import TuneOptions
from mergekit_arm.tuning.tune import tune

BASE = "base"
SPECIALTIES = DOMAINS[1:]
TRIALS = 8
"""Of every method that is tuned."""

# With a leading ./ because mergekit asks the Hub about names that could be one of its models.
CALIBRATION = CalibrationOptions(
    model=f"./{BASE}", out="./stats", dataset="calibration.jsonl", samples=128, sequence_length=128
)
_SPACE = {"tune": [0.1, 1.0], "name": "weight"}


def calibrations() -> list[CalibrationOptions]:
    """Return what is measured: the base on general text, each specialist on its own."""
    return [
        CALIBRATION,
        *(
            replace(
                CALIBRATION,
                model=f"./{name}",
                out=f"./stats-{name}",
                dataset=f"training/{name}.jsonl",
            )
            for name in SPECIALTIES
        ),
    ]


def merge_configs() -> dict[str, dict[str, Any]]:
    """Return the merges with fixed weights by name, each a configuration for ``mergekit-yaml``."""
    aim = {"activation_stats": CALIBRATION.out, "omega": 0.4}
    return {
        "task_arithmetic": _config("task_arithmetic", {"weight": 1.0}),
        "aim": _config("aim", {"weight": 1.0}, aim),
        "aim_ties": _config("aim_ties", {"weight": 1.0, "density": 0.5}, aim),
    }


def tune_configs() -> dict[str, dict[str, Any]]:
    """Return the searches by name, each a configuration for ``mergekit-arm tune``."""
    searches = {
        "task_arithmetic": _config("task_arithmetic", {"weight": _SPACE}),
        "aim": _config(
            "aim",
            {"weight": _SPACE},
            {"activation_stats": CALIBRATION.out, "omega": {"tune": [0.0, 1.0]}},
        ),
        "regmean": _config("regmean", {}, {"scale": {"tune": [0.2, 1.2]}}),
    }
    for model in searches["regmean"]["models"]:
        model["parameters"]["activation_stats"] = f"./stats-{Path(model['model']).name}"
    for config in searches.values():
        config["tuning"] = {
            "evaluation": {domain: _validation(domain) for domain in DOMAINS},
            "trials": TRIALS,
            "baseline": False,
            "dtype": "float32",
        }
    return searches


def write_configs() -> None:
    """Write every configuration into ``configs``."""
    Path("configs").mkdir(exist_ok=True)
    named = merge_configs() | {f"tune_{name}": one for name, one in tune_configs().items()}
    for name, config in named.items():
        text = yaml.safe_dump(config, sort_keys=False)
        Path("configs", f"{name}.yml").write_text(text, encoding="utf-8")


def measure(progress: Callable[[int, int], None]) -> None:
    """Calibrate the base and the specialists."""
    for options in calibrations():
        calibrate(options, progress)


def merge(name: str) -> None:
    """Run ``mergekit-yaml``, without the seconds that a process takes to import torch again."""
    arguments = [f"configs/{name}.yml", f"merged/{name}", "--quiet"]
    mergekit_yaml.main(arguments, standalone_mode=False)


def search(name: str, on_trial: Callable[[], None]) -> None:
    """Run ``mergekit-arm tune`` into ``tuned/NAME``."""
    options = TuneOptions(MergeOptions(quiet=True))
    out = Path("tuned") / name
    out.parent.mkdir(exist_ok=True)
    tune(f"configs/tune_{name}.yml", out, options, on_trial=lambda *_: on_trial())


def merged_models() -> dict[str, str]:
    """Return every merge's directory by the name that it has in the table."""
    found = {name: f"merged/{name}" for name in merge_configs()}
    return found | {f"{name}, tuned": f"tuned/{name}/model" for name in tune_configs()}


def _validation(domain: str) -> dict[str, Any]:
    data = f"validation/{domain}.jsonl"
    return {"dataset": data, "samples": 64, "sequence_length": 128, "batch_size": 16}


def _config(
    method: str, per_model: dict[str, Any], shared: dict[str, Any] | None = None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": CALIBRATION.model,
        "models": [{"model": f"./{name}", "parameters": dict(per_model)} for name in SPECIALTIES],
        "dtype": "float32",
    }
    return config | ({"parameters": dict(shared)} if shared else {})
