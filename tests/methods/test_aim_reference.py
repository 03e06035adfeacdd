"""The authors' own functions against the real commands, to the last bfloat16 digit.

``reference/aim_tied`` holds a small tied-embedding Llama, a merged model, calibration token ids
and what the AIM authors' ``get_calib_feat`` and ``apply_relaxation`` made of them in float32.
"""

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.support.paths import REFERENCE

ADDED_UP = 2e-6
"""How far two orders of adding up the same |x| in float32 may be apart, in proportion."""


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aim_tied") / "stats"
    calibrate(
        CalibrationOptions(
            model=str(REFERENCE / "aim_tied" / "base"),
            out=str(out),
            dataset=str(REFERENCE / "aim_tied" / "calibration.jsonl"),
            statistics=("importance",),
        )
    )
    return out


def test_importance_is_the_authors(statistics: Path) -> None:
    opened = Statistics("stats", statistics)
    expected = load_file(REFERENCE / "aim_tied" / "importance_sum_over_blocks.safetensors")
    for layer, sums in expected.items():
        name = "model.embed_tokens" if layer == "lm_head" else layer
        found = IMPORTANCE.values(opened, opened.metadata.weights[f"{name}.weight"], "mean_abs")
        # Theirs adds per-block means or sums; only the shape of the vector enters the method.
        torch.testing.assert_close(found / found.max(), sums / sums.max(), rtol=ADDED_UP, atol=0)


@pytest.mark.parametrize("omega", [0.0, 0.4, 1.0])
def test_merge_is_the_authors(omega: float, statistics: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "aim",
        "base_model": str(REFERENCE / "aim_tied" / "base"),
        "models": [
            {"model": str(REFERENCE / "aim_tied" / "merged"), "parameters": {"weight": 1.0}}
        ],
        "parameters": {"activation_stats": str(statistics), "omega": omega},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    done = CliRunner().invoke(mergekit_yaml, [str(tmp_path / "config.yml"), str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    merged = load_file(out / "model.safetensors")
    expected = {
        key.split("/", 1)[1]: value
        for key, value in load_file(REFERENCE / "aim_tied" / "expected.safetensors").items()
        if key.startswith(f"omega={omega}/")
    }
    assert len(expected) == 29
    base, other = (
        load_file(REFERENCE / "aim_tied" / model / "model.safetensors")
        for model in ("base", "merged")
    )
    differing = 0
    for name, value in expected.items():
        stored = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        larger = torch.maximum(base[stored].abs(), other[stored].abs()).double()
        wanted = value.double()
        difference = (merged[stored].double() - wanted).abs()
        # A result on a rounding tie moves by one bfloat16 step of itself. Where base and merged
        # weight cancel that step is tiny, and what remains is the error of the operands.
        assert (difference <= _bfloat16_step(wanted) + ADDED_UP * larger).all(), name
        differing += int((difference != 0).sum())
    # Rounding ties: an error of ADDED_UP crosses one between two bfloat16 values, at least
    # 2^-8 apart, for one weight in two thousand.
    assert differing <= 35  # of 70,752


def _bfloat16_step(tensor: torch.Tensor) -> torch.Tensor:
    """The distance from each value to the next bfloat16 that is larger in size: 8 binary digits."""
    return torch.ldexp(torch.ones_like(tensor), torch.frexp(tensor).exponent - 8)
