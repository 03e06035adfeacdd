"""Do two checkouts make the same bytes? ``python -m tests.support.compare_checkouts OLD NEW``

Each checkout measures and merges the same models, in a process and a folder of its own and by the
commands that a user would type. Every file that they leave is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_arm.statistics.format import METADATA_FILE
from tests.support.models import perturbed, tiny_experts, tiny_llama, vary_norms
from tests.support.streams import write_tokens

RUN = """
import json, runpy, sys
import mergekit_arm.autoload
assert mergekit_arm.__file__.startswith(sys.argv[1] + "/"), mergekit_arm.__file__
mergekit_arm.autoload.install()
for module, *arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, sys.argv
"""
"""Runs commands one after another: importing torch for each would take most of the time."""

STATISTICS = {
    "memory": [],
    "low-memory": ["--low-memory"],
    "bfloat16": ["--dtype", "bfloat16"],
    "narrow": ["--rank", "8", "--skip-first", "1", "--subspace-tokens", "128"],
    "part-1": ["--keep-sketch", "--part", "1/2"],
    "part-2": ["--keep-sketch", "--part", "2/2"],
}
"""Name of a calibration → its options."""

Command = list[str]


def calibrations(model: str) -> Iterator[Command]:
    """Measure ``model`` in every way, and its variant once; add up the parts."""
    rows = ["--dataset", "../tokens.jsonl", "--min-expert-tokens", "4"]
    measure = ["mergekit_arm", "calibrate"]
    for name, options in STATISTICS.items():
        yield [
            "mergekit_arm",
            "calibrate",
            f"../models/{model}",
            f"{model}-{name}",
            *rows,
            *options,
        ]
    yield [*measure, f"../models/{model}-a", f"{model}-own", *rows]
    yield ["mergekit_arm", "combine", *(f"{model}-{n}" for n in ("part-1", "part-2", "combined"))]


def merges(model: str) -> dict[str, dict[str, Any]]:
    """Return merge configurations by name: both methods, alignment, slices, half precision."""
    base, variant, own = f"../models/{model}", f"../models/{model}-a", f"{model}-own"

    def config(
        method: str, stats: str, shared: dict[str, Any], **own_values: Any
    ) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": base,
            "models": [{"model": variant, "parameters": own_values}],
            "parameters": {"activation_stats": f"{model}-{stats}", **shared},
            "dtype": "float32",
        }

    def sliced(method: str, shared: dict[str, Any], own_values: dict[str, Any]) -> dict[str, Any]:
        sources = [{"model": base}, {"model": variant, "parameters": own_values}]
        taken = [[{**one, "layer_range": layers} for one in sources] for layers in ([1, 2], [0, 2])]
        document = config(method, "memory", shared)
        del document["models"]
        return document | {"slices": [{"sources": one} for one in taken]}

    half = {"dtype": "bfloat16"}
    return {
        "aim": config("aim", "memory", {"omega": 0.3}, weight=1.0),
        "aim-combined": config("aim", "combined", {"omega": 0.3}, weight=1.0),
        "aim-ties": config("aim_ties", "low-memory", {}, weight=0.7, density=0.5) | half,
        "aim-sliced": sliced("aim", {"omega": 0.3}, {"weight": 1.0}),
        "arm": config("arm", "memory", {"rotation": -0.4}, learning_rate=0.7),
        "arm-half": config("arm", "narrow", {"rotation": 0.5, "energy": 0.5}) | half,
        "arm-aligned": config("arm", "memory", {"alignment": 0.6}, activation_stats=own),
        "arm-sliced": sliced("arm", {"rotation": -0.4}, {"learning_rate": 0.7}),
    }


def run(checkout: Path, folder: Path, models: list[str]) -> None:
    """Let ``checkout`` make everything in ``folder``.

    Raises:
        click.ClickException: a command failed.
    """
    folder.mkdir()
    commands: list[Command] = []
    for model in models:
        commands += calibrations(model)
        for name, config in merges(model).items():
            file = folder / f"{model}-{name}.yml"
            file.write_text(yaml.safe_dump(config))
            commands.append(["mergekit.scripts.run_yaml", file.name, f"{model}-{name}", "--quiet"])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(checkout)],
        input=json.dumps(commands),
        cwd=folder,
        # mergekit lists models in the order of their hashes.
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise click.ClickException(f"{checkout}:\n{done.stderr[-4000:]}")


def difference(old: Path, new: Path) -> str | None:
    """Say how two files differ; None if they hold the same.

    In the metadata of statistics the versions of libraries and of this package may differ.
    """
    if not (old.exists() and new.exists()):
        return f"only {'old' if old.exists() else 'new'} has it"
    if old.read_bytes() == new.read_bytes():
        return None
    if old.name == METADATA_FILE:
        one, other = (json.loads(path.read_text()) | {"versions": None} for path in (old, new))
        return "differs" if one != other else None
    if old.suffix == ".safetensors":
        before, after = load_file(old), load_file(new)
        unlike = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
        return f"{len(unlike)} of {len(before)} tensors differ, such as {unlike[:3]}"
    return "differs"


def make_models(folder: Path, real: Path | None) -> list[str]:
    """Save every model and a variant ``NAME-a`` of it; return the names."""
    models = {"llama": tiny_llama(0), "tied": tiny_llama(1, tied=True), "experts": tiny_experts(2)}
    vary_norms(models["experts"])  # slices tell layers by their values
    if real is not None:
        models["real"] = AutoModelForCausalLM.from_pretrained(real)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        perturbed(model, 1, scale=0.002).save_pretrained(folder / f"{name}-a")
    return list(models)


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A real one as well.")
def main(old: Path, new: Path, model: Path | None) -> None:
    """Compare the statistics and merges that OLD and NEW make; exit with 1 if any differs."""
    with TemporaryDirectory(prefix="compare-checkouts-") as scratch:
        folder = Path(scratch)
        models = make_models(folder / "models", model)
        write_tokens(folder / "tokens.jsonl", 6, rows=12, length=32)
        for checkout, name in ((old, "old"), (new, "new")):
            run(checkout.resolve(), folder / name, models)
        made = {p.relative_to(folder / n) for n in ("old", "new") for p in (folder / n).rglob("*")}
        outputs = sorted({path.parts[0] for path in made if len(path.parts) > 1})
        unlike = 0
        for output in outputs:
            files = sorted(p for p in made if p.parts[0] == output and p != Path(output))
            found = {p.name: difference(folder / "old" / p, folder / "new" / p) for p in files}
            told = [f"{name}: {how}" for name, how in found.items() if how]
            unlike += bool(told)
            click.echo(f"{'DIFFERS' if told else 'same   '}  {output} ({len(files)} files)")
            for line in told:
                click.echo(f"         {line}")
    click.echo(f"{len(outputs)} outputs, {unlike} of them different")
    sys.exit(1 if unlike else 0)


if __name__ == "__main__":
    main()
