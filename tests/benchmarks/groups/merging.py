"""Merges against mergekit's own by the method that ours is built on."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import (
    MEMORY,
    PROCESSOR,
    TIME,
    WALL,
    Clock,
    Measured,
    Row,
    Side,
    compare,
)
from tests.benchmarks.inputs import REAL, Workshop

_SHAPE = "SmolLM2-135M"


def merge_aim_task_arithmetic(shop: Workshop) -> list[Row]:
    """``aim_task_arithmetic`` against mergekit's ``task_arithmetic``."""
    return _merges(shop, "aim_task_arithmetic", "task_arithmetic")


def merge_aim_ties(shop: Workshop) -> list[Row]:
    """``aim_ties`` against mergekit's ``ties``."""
    return _merges(shop, "aim_ties", "ties", {"weight": 0.5, "density": 0.5})


def merge_arm(shop: Workshop) -> list[Row]:
    """One checkpoint by ``arm`` against mergekit's ``task_arithmetic``.

    On the real SmolLM2: how many directions a subspace has decides what a rotation costs, and
    random activations have far more than text's.
    """
    return _merge_arm(shop, "merge-arm", models=1)


def merge_arm_two(shop: Workshop) -> list[Row]:
    """The same with two checkpoints in one step."""
    return _merge_arm(shop, "merge-arm-two", models=2)


def _merge_arm(shop: Workshop, name: str, *, models: int) -> list[Row]:
    return _merges(
        shop,
        "arm",
        "task_arithmetic",
        own={"learning_rate": 0.5},
        models=models,
        base=REAL,
        time=1.5,
        memory=1.25,
        name=name,
    )


def merge_every_aim(shop: Workshop) -> list[Row]:
    """Every ``aim_X`` against mergekit's ``X``. Long; only when asked for."""
    rows = []
    needed = {"nearswap": {"t": 0.01}, "slerp": {"t": 0.4}}
    known = shop.launch("methods")
    # arm and regmean are ours: mergekit has nothing to compare
    names = [name for name in known if name not in (WALL, MEMORY, "arm", "regmean")]
    for name in names[:: len(names) // 2] if shop.quick else names:
        takes = known[name]
        parameters = dict(needed.get(name, {}))
        parameters |= {"weight": 0.5} if takes["needs_weight"] else {}
        with_base = takes["base"] in ("REQUIRED", "OPTIONAL")
        most = takes["non_base"] or (takes["inputs"] and takes["inputs"] - with_base) or 2
        rows += _merges(
            shop, f"aim_{name}", name, parameters, models=min(most, 2), with_base=with_base
        )
    return rows


def _merges(
    shop: Workshop,
    ours: str,
    theirs: str,
    parameters: dict[str, Any] | None = None,
    *,
    own: dict[str, Any] | None = None,
    models: int = 2,
    with_base: bool = True,
    base: str = _SHAPE,
    time: float = 1.10,
    memory: float = 1.15,
    name: str | None = None,
) -> list[Row]:
    shape = shop.shape(base)
    statistics = {"activation_stats": str(shop.statistics(shape))}
    shared = {"weight": 0.5} if parameters is None else parameters

    def merge(method: str, extra: dict[str, Any], with_base: bool) -> Measured:
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(shop.model(shape, 1 + i))} for i in range(models)],
            "parameters": extra,
            "dtype": "bfloat16",
        }
        if with_base:
            config["base_model"] = str(shop.model(shape))
        with shop.scratch() as scratch:
            return shop.launch("merge", config=config, out=str(scratch / "merged"))

    shop.model(shape, 1), shop.model(shape, models)
    return compare(
        name or f"merge-{ours}",
        Side(ours, lambda: merge(ours, {**(own or shared), **statistics}, True)),
        Side(theirs, lambda: merge(theirs, shared, with_base)),
        {TIME: time, WALL: time, PROCESSOR: None, MEMORY: memory},
        rounds=shop.rounds,
        warm_up=not shop.quick,
    )


def merge(config: dict[str, Any], out: str) -> dict[str, float]:
    """Run mergekit's own console script, its two steps apart: import, then ``main``."""
    (script,) = entry_points(group="console_scripts", name="mergekit-yaml")
    main = script.load()
    file = Path(f"{out}.yml")
    file.write_text(json.dumps(config))  # JSON is YAML
    clock = Clock()
    main.main([str(file), out, "--no-copy-tokenizer", "--quiet"], standalone_mode=False)
    return clock.read()


def methods() -> dict[str, Any]:
    """List every method that has an ``aim_`` twin, and what it takes."""
    from mergekit import merge_methods

    known = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
    return {
        name: {
            "base": spec.contract.base.name,
            "non_base": spec.contract.max_non_base,
            "inputs": spec.contract.max_inputs,
            "needs_weight": any(p.name == "weight" and p.required for p in spec.parameters),
        }
        for name, spec in known.items()
        if f"aim_{name}" in known
    }


BENCHMARKS = {
    "merge-aim_task_arithmetic": merge_aim_task_arithmetic,
    "merge-aim_ties": merge_aim_ties,
    "merge-arm": merge_arm,
    "merge-arm-two": merge_arm_two,
    "merge-every-aim": merge_every_aim,
}
TASKS = (merge, methods)
