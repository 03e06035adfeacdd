"""What a check accepts, the merge accepts: both are run on configurations drawn at random."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import BasePolicy, ParameterScope
from mergekit.options import MergeOptions
from transformers import AutoConfig

from mergekit_arm.checking.check import check
from tests.support.models import perturbed, tiny_llama

METHODS = [
    "task_arithmetic",
    "ties",
    "dare_ties",
    "dare_linear",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "linear",
    "slerp",
    "nuslerp",
    "passthrough",
    "model_stock",
    "sce",
    "karcher",
    "nearswap",
    "multislerp",
    "arcee_fusion",
    "aim",
    "aim_ties",
    "aim_linear",
    "aim_slerp",
    "aim_della",
    "aim_karcher",
    "arm",
    "regmean",
]
NUMBERS = [0.5, 0.3, 1, 1.0, 0, -1, 2.5, "0.5", "1e-1", True, "none"]
FILTERS = ["mlp", "self_attn", "norm", "mpl", "*", "", "layers.0"]
ONE = ("slerp", "nearswap", "aim_slerp", "passthrough", "arcee_fusion")
"""Methods of one model beside the base, or of one alone."""
UNTOUCHED = ("filter_wise", "max_iter", "tol", "eps", "importance", "int8_mask", "epsilon", "gamma")
"""Parameters whose right values are not in (0, 1), or depend on others."""
STATISTICS = ("activation_stats", "task_stats")
KEYS = ["weight", "density", "t", "omega", "rotation", "turn", "normalize", "random_seed", "omgea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """Three models of one layer, statistics, and what is wrong in other ways."""
    made = tmp_path_factory.mktemp("checked")
    base = tiny_llama(0, layers=1)
    for name, model in (("base", base), *((one, perturbed(base, ord(one))) for one in "abc")):
        model.save_pretrained(made / name)
    tiny_llama(3, layers=2).save_pretrained(made / "deeper")
    shutil.copytree(made / "a", made / "cut")
    whole = (made / "cut" / "model.safetensors").read_bytes()
    (made / "cut" / "model.safetensors").write_bytes(whole[:-100])
    for name in ("base", "a", "b", "c"):
        measure(made / name, made / f"stats-{name}")
    (made / "stats").symlink_to("stats-base")
    return made


def value(draw: st.DrawFn, number: st.SearchStrategy[Any]) -> Any:
    """Draw a value of a parameter: one, a gradient, or filters."""
    kind = draw(st.sampled_from(["one", "one", "one", "gradient", "filters"]))
    if kind == "one":
        return draw(number)
    if kind == "gradient":
        return draw(st.lists(number, min_size=1, max_size=3))
    name = draw(st.sampled_from(["mlp", "self_attn", "norm", "down_proj"]))
    return [{"filter": name, "value": draw(number)}, {"value": draw(number)}]


def right(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration that should merge, as far as its method's specification tells."""
    name = draw(st.sampled_from(METHODS))
    spec = merge_methods.get(name).spec
    based = spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
    count = (
        1 if name in ONE else 3 if name == "model_stock" else draw(st.integers(1 + (not based), 2))
    )
    models: list[dict[str, Any]] = [{"model": f"./{one}"} for one in ("a", "b", "c")[:count]]
    document: dict[str, Any] = {"merge_method": name}
    if based:
        document["base_model"] = "./base"
    if name in ("slerp", "nearswap", "aim_slerp"):
        models.append({"model": "./base"})
    shared: dict[str, Any] = {}
    for parameter in spec.parameters:
        if parameter.name in STATISTICS:
            if parameter.name == STATISTICS[0]:
                shared[parameter.name] = "./stats"
                for one in models if name == "regmean" else ():
                    one["parameters"] = {parameter.name: f"./stats-{one['model'][2:]}"}
            continue
        if parameter.name in UNTOUCHED or not (parameter.required or draw(st.booleans())):
            continue
        boolean = parameter.value_type is bool
        number = st.booleans() if boolean else st.sampled_from([0.3, 0.5, 0.6])
        if parameter.scope == ParameterScope.SHARED:
            shared[parameter.name] = value(draw, number)
        else:
            for one in models:
                if parameter.scope == ParameterScope.INPUT or one["model"] != "./base":
                    one.setdefault("parameters", {})[parameter.name] = value(draw, number)
    if not draw(st.integers(0, 4)) and models:
        sources = [{**one, "layer_range": [0, 1]} for one in models]
        document["slices"] = [{"sources": sources}] * draw(st.integers(1, 2))
    else:
        document["models"] = models
    if shared:
        document["parameters"] = shared
    document["dtype"] = draw(st.sampled_from(["float32", "bfloat16"]))
    return document


def spoil(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """Change one thing, which may or may not matter."""
    entries = document.get("models") or document["slices"][0]["sources"]
    holder = draw(st.sampled_from([document, *entries]))
    settings_of = holder.setdefault("parameters", {})
    number = st.sampled_from(NUMBERS)
    match draw(st.integers(0, 9)):
        case 0 | 1:
            settings_of[draw(st.sampled_from(KEYS))] = value(draw, number)
        case 2 if settings_of:
            settings_of[draw(st.sampled_from(sorted(settings_of)))] = value(draw, number)
        case 3 if settings_of:
            del settings_of[draw(st.sampled_from(sorted(settings_of)))]
        case 4 if settings_of:
            name = draw(st.sampled_from(sorted(settings_of)))
            filters = [
                {"filter": draw(st.sampled_from(FILTERS)), "value": draw(number)},
                {"filter": draw(st.sampled_from(FILTERS)), "value": settings_of[name]},
            ]
            settings_of[name] = filters[: draw(st.integers(0, 2))]
        case 5:
            other = draw(st.sampled_from(["./a", "./base", "./deeper", "./cut", "./absent"]))
            draw(st.sampled_from(entries))["model"] = other
        case 6:
            base = draw(st.sampled_from([None, "./a", "./base", "./deeper"]))
            document.pop("base_model", None)
            document |= {"base_model": base} if base else {}
        case 7:
            changed = [{"dtype": "bf16"}, {"out_dtype": "float16"}, {"tokenizer_source": "base"}]
            changed += [{"merge_method": one} for one in ("ties", "linear", "aim", "aim_ties")]
            document |= draw(st.sampled_from(changed))
        case 8:
            for one in entries:
                one["layer_range"] = draw(st.sampled_from([[0, 1], [0, 2], [0, 0], [1, 2]]))
        case _:
            entries.append({**draw(st.sampled_from(entries)), "model": "./b"})
    if not settings_of:
        del holder["parameters"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration that is right, or nearly."""
    document = copy.deepcopy(right(draw))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        spoil(draw, document)
    return document


COUNTS: Counter[str] = Counter()


def merge(document: dict[str, Any], out: Path) -> str | None:
    """Merge, and return what the merge says against it."""
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    LoaderCache.loaders.clear()
    try:
        run_merge(MergeConfiguration.model_validate(document), str(out), options)
    except click.ClickException as error:
        return error.message
    except Exception as error:
        return repr(error)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return None


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(document=configurations())
def accepted_is_accepted(folder: Path, document: dict[str, Any]) -> None:
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    checked = check(file, out=folder / "out")
    refusal = merge(document, folder / "out")
    COUNTS["accepted" if checked.accepted else "refused"] += 1
    COUNTS["merged" if refusal is None else "not merged"] += 1
    if checked.accepted:
        assert refusal is None, yaml.safe_dump(document) + refusal


@pytest.fixture
def fast_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers parse each config.json once: that was half of the time of this file."""
    parse = AutoConfig.from_pretrained
    parsed: dict[str, Any] = {}

    def read(path: str, **options: Any) -> Any:
        if path not in parsed:
            parsed[path] = parse(path, **options)
        return copy.deepcopy(parsed[path])

    monkeypatch.setattr("mergekit.common.AutoConfig.from_pretrained", read)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_configs")
def test_what_is_accepted_merges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    COUNTS.clear()
    accepted_is_accepted(folder)
    assert COUNTS["accepted"] > 30, COUNTS
    assert COUNTS["not merged"] > 30, COUNTS
