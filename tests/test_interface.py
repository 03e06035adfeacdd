"""``import mergekit_arm as ma``: every function that the commands use, from Python."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_arm as ma
from mergekit_arm.errors import InputError
from tests.support.fake_hub import TOKEN, fake_hub
from tests.support.paths import PACKAGE

TREE = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))


def test_the_import_loads_nothing_and_a_name_what_it_needs() -> None:
    program = (
        "import sys; before = set(sys.modules); import mergekit_arm as ma\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'mergekit_arm'}, new\n"
        "assert {'calibrate', 'InputError'} <= set(dir(ma)) & set(ma.__all__)\n"
        "ma.InputError, ma.CalibrationOptions\n"
        "assert not {'torch', 'mergekit', 'transformers'} & set(sys.modules)\n"
        "assert ma.summarise is ma.summarise and 'torch' in sys.modules\n"
        "assert not {'mergekit', 'transformers'} & set(sys.modules)  # which take longer"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_what_python_sees() -> None:
    typed = {
        alias.name: str(node.module)
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert {*typed, "__version__"} == set(ma.__all__)
    for name, module in typed.items():
        assert getattr(ma, name) is getattr(sys.modules[module], name)


def test_every_name_is_documented() -> None:
    text = (PACKAGE / "USING.md").read_text(encoding="utf-8")
    functions = [name for name in ma.__all__ if name[0].islower()]
    assert len(functions) > 12
    for name in functions:
        assert f"ma.{name}(" in text
        assert "Raises:" in str(getattr(ma, name).__doc__) or name == "forecast_tuning"


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'calibrte'"):
        ma.calibrte  # noqa: B018
    assert ma.InputError is InputError


def test_statistics_from_one_end_to_the_other(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = str(family / "base"), str(token_file)
    parts = []
    for part in ("1/2", "2/2"):
        out = str(tmp_path / f"part{part[0]}")
        options = ma.CalibrationOptions(base, out, dataset=data, part=part, keep_sketch=True)
        done = ma.calibrate(options)
        assert done is not None
        assert done.out == Path(out)
        parts.append(out)
    both = ma.combine(parts, str(tmp_path / "both"))
    assert both.data.sequences == 12
    opened = ma.open_statistics(str(tmp_path / "both"))
    summary = ma.summarise(opened)
    assert summary.measured == summary.weights - 1  # all but the embedding
    assert ma.look_up(opened, "model.layers.0.mlp.up_proj.weight").tokens == 12 * 32
    assert ma.compare(opened, ma.open_statistics(str(family / "stats"))).same_model
    matrix = ma.export_imatrix(opened, str(tmp_path / "im.gguf"))
    back = ma.import_imatrix(str(tmp_path / "im.gguf"), base, str(tmp_path / "back"))
    assert back.magnitudes
    assert len(matrix.entries) == 2 * 7 + 1
    assert ma.report(str(tmp_path / "both"), str(tmp_path / "both.html")) == "statistics"
    with fake_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        upload = ma.prepare_upload(str(tmp_path / "both"), "someone/tiny")
        assert ma.push(upload, private=True) == f"{hub.address}/someone/tiny"
        assert hub.private["someone/tiny"]


@pytest.fixture
def here(family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models ``base``, ``a`` and ``b``, and tokens."""
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "tokens.jsonl").symlink_to(token_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_configuration_is_checked_and_measured(here: Path) -> None:
    document = {
        "merge_method": "aim",
        "base_model": "./base",
        "models": [{"model": "./a", "parameters": {"weight": 1.0}}],
        "parameters": {"activation_stats": "./stats"},
        "calibration": {"./stats": {"dataset": "./tokens.jsonl"}},
    }
    Path("merge.yml").write_text(json.dumps(document))
    assert not ma.check("merge.yml").accepted
    (planned,) = ma.plan_calibrations("merge.yml")
    assert (planned.model, planned.dataset) == ("./base", "./tokens.jsonl")
    assert ma.calibrate(planned) is not None
    assert ma.check("merge.yml").accepted


def test_a_stream(here: Path) -> None:
    stream = {
        "merge_method": "arm",
        "base_model": "./base",
        "checkpoints": ["./a"],
        "calibration": {"dataset": "./tokens.jsonl"},
    }
    options = ma.StreamOptions(keep="all")
    assert ma.forecast_stream(stream, "out", options).problems == []
    result = ma.stream(stream, "out", options)
    assert result.chosen == 1
    assert (result.model / "model.safetensors").is_file()
    with pytest.raises(ma.InputError, match="another stream"):
        ma.stream({**stream, "checkpoints": ["./b"]}, "out")


def test_a_search(here: Path) -> None:
    search = {
        "merge_method": "task_arithmetic",
        "base_model": "./base",
        "models": [{"model": "./a", "parameters": {"weight": {"tune": [0, 1]}}}],
        "tuning": {"evaluation": {"held": {"dataset": "./tokens.jsonl"}}, "baseline": False},
    }
    options = ma.TuneOptions(trials=2, model=False)
    plan, merge = ma.plan_tuning(search, "out", options)
    forecast = ma.forecast_tuning(plan, Path("out"), merge, with_model=False)
    assert forecast.models == 4  # trials, base and input
    assert len(ma.tune(search, "out", options).trials) == 2


def test_the_demo_refuses_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ma.InputError, match="no demo"):
        ma.run_demo(ma.DemoOptions(tmp_path))
