"""``aim_<name>`` is the formula over mergekit's own method, for every method there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy, ParameterScope, merge_state_dicts
from safetensors.torch import load_file

from mergekit_arm.errors import InputError
from mergekit_arm.methods.anchor import ABSENT

OWN = {"aim", "arm", "regmean"}
INNER = sorted(
    method.spec.name
    for method in merge_methods.registered_methods()
    if not method.spec.name.startswith("aim_") and method.spec.name not in OWN
)
NEEDED: dict[str, dict[str, Any]] = {
    "nearswap": {"t": 0.01},
    "slerp": {"t": 0.4},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
}


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / name / "model.safetensors") for name in ("base", "a", "b")}


def formula(
    folder: Path, name: str, base: torch.Tensor, merged: torch.Tensor, omega: float, kind: str
) -> torch.Tensor:
    """AIM in float64 and plain loops over channels, from the file's sums read by hand."""
    sums = load_file(folder / "stats" / "model.safetensors")
    sites = {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
        "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "norm": "norm", "lm_head": "lm_head",
    }  # fmt: skip
    module, layer = name.removesuffix(".weight").rpartition(".")[::2]
    if layer == "embed_tokens":
        return merged.double()
    site = ".".join(filter(None, (module, sites[layer])))
    key = "abs_sum" if kind == "mean_abs" else "square_sum"
    values = [float(v) ** (0.5 if kind == "rms" else 1) for v in sums[f"{site}.{key}"]]
    out = merged.double().clone()
    for channel, value in enumerate(values):
        keep = 1 - (1 - omega) * value / max(values)
        start = base[..., channel].double()
        out[..., channel] = start + (merged[..., channel].double() - start) * keep
    return out


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kind", ["mean_abs", "rms"])
def test_every_method_is_wrapped(inner: str, kind: str, family: Path) -> None:
    inputs = states(family)
    spec = merge_methods.get(inner).spec
    takes_base = spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
    most = spec.contract.max_non_base
    if most is None and spec.contract.max_inputs is not None:
        most = spec.contract.max_inputs - takes_base
    if most == 1:
        inputs.pop("b")
    parameters = dict(NEEDED.get(inner, {}))
    if any(p.name == "weight" and p.required for p in spec.parameters):
        parameters["weight"] = 0.6
    plain = {k: v for k, v in inputs.items() if takes_base or k != "base"}
    torch.manual_seed(9)
    expected = merge_state_dicts(
        plain, inner, parameters=parameters, base="base" if takes_base else None
    )
    torch.manual_seed(9)
    found = merge_state_dicts(
        inputs,
        f"aim_{inner}",
        parameters={
            **parameters,
            "activation_stats": str(family / "stats"),
            "omega": 0.3,
            "importance": kind,
        },
        base="base",
    )
    assert set(found) == set(expected)
    for name, merged in expected.items():
        wanted = formula(family, name, inputs["base"][name], merged, 0.3, kind)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_aim_is_over_task_arithmetic(family: Path) -> None:
    parameters = {"activation_stats": str(family / "stats"), "weight": 0.7}
    one, two = (
        merge_state_dicts(states(family), method, parameters=parameters, base="base")
        for method in ("aim", "aim_task_arithmetic")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_post_hoc_relaxation_of_a_finished_merge(family: Path) -> None:
    inputs = states(family)
    del inputs["b"]
    parameters = {"activation_stats": str(family / "stats"), "weight": 1.0, "omega": 0.0}
    found = merge_state_dicts(inputs, "aim", parameters=parameters, base="base")
    for name in found:
        wanted = formula(family, name, inputs["base"][name], inputs["a"][name], 0.0, "mean_abs")
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7)


def test_omega_one_changes_nothing(family: Path) -> None:
    inputs = states(family)
    plain = merge_state_dicts(inputs, "ties", parameters={"weight": 0.5}, base="base")
    relaxed = merge_state_dicts(
        inputs,
        "aim_ties",
        parameters={"weight": 0.5, "omega": 1.0, "activation_stats": str(family / "stats")},
        base="base",
    )
    assert all(torch.equal(plain[name], relaxed[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_recognise_the_same_model(dtype: torch.dtype, family: Path) -> None:
    inputs = states(family)
    parameters = {"activation_stats": str(family / "stats"), "weight": 1.0, "omega": 0.2}
    merged = merge_state_dicts(inputs, "aim", parameters=parameters, base="base", dtype=dtype)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    full = merge_state_dicts(inputs, "aim", parameters=parameters, base="base")
    for name in full:
        torch.testing.assert_close(merged[name].float(), full[name], rtol=0.02, atol=0.01)


def test_parameters_of_the_inner_method_keep_names_scopes_and_defaults() -> None:
    for inner in INNER:
        spec = merge_methods.get(inner).spec
        twin = {p.name: p for p in merge_methods.get(f"aim_{inner}").spec.parameters}
        takes_base = spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
        for parameter in spec.parameters:
            mine = twin[parameter.name]
            assert mine.scope == parameter.scope
            if takes_base or parameter.scope == ParameterScope.SHARED:
                assert mine.default == parameter.default
                assert mine.value_type == parameter.value_type
            else:  # absent for a base that is the anchor only
                assert mine.default is ABSENT
                assert mine.validate("0.5") == parameter.validate("0.5")
                with pytest.raises(ValueError, match="number"):
                    mine.validate("half")


def test_a_method_registered_later_gets_its_twin() -> None:
    @merge_methods.merge_method(name="test_only_first")
    def first(group: merge_methods.TensorGroup) -> torch.Tensor:
        return group.entries[0].tensor

    merge_methods.register(first)
    twin = merge_methods.get("aim_test_only_first")
    assert twin.spec.contract.base == BasePolicy.REQUIRED
    assert merge_methods.get("aim_test_only_first") is twin


def test_a_misspelt_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'aim_ties'"):
        merge_methods.get("aim_tiess")


@pytest.mark.parametrize("value", [1.4, -0.1, float("nan"), "much", True])
def test_omega_outside_its_range_is_refused(value: Any, family: Path) -> None:
    parameters = {"activation_stats": str(family / "stats"), "weight": 1.0, "omega": value}
    with pytest.raises(InputError, match=r"omega must lie in \[0, 1\]"):
        merge_state_dicts(states(family), "aim", parameters=parameters, base="base")


def test_unknown_importance_names_the_nearest(family: Path) -> None:
    parameters = {
        "activation_stats": str(family / "stats"), "weight": 1.0, "importance": "mean_asb",
    }  # fmt: skip
    with pytest.raises(InputError, match="did you mean 'mean_abs'"):
        merge_state_dicts(states(family), "aim", parameters=parameters, base="base")
