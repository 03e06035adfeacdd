"""The AIM authors' script, as their text describes it, against the two commands of this package.

``python -m tests.benchmarks authors-script``. Both sides read the same rows of token ids in
float32, relax the same finished merge towards the same base, and write a whole model. The script
is one process, ours are two: ``calibrate --statistics importance`` and ``mergekit-yaml`` with
``aim``. Times are added, and the larger of two peaks counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import MEMORY, PROCESSOR, WALL, Measured, Row, Side, compare
from tests.benchmarks.inputs import REAL, Workshop
from tests.support.paths import ROOT

_SEQUENCES, _LENGTH = 32, 512  # 16 384 tokens
_OMEGA = 0.4


def authors_script(shop: Workshop) -> list[Row]:
    """Calibrate and merge with ``aim`` against what the authors' script does, whole processes."""
    shape = shop.shape(REAL)
    count, length = (4, 32) if shop.quick else (_SEQUENCES, _LENGTH)
    base, merged = shop.model(shape), shop.model(shape, 1)
    tokens = shop.tokens(shop.shape("SmolLM2-135M"), count, length)  # of the same vocabulary

    def theirs() -> Measured:
        with shop.scratch() as scratch:
            arguments = [str(base), str(merged), str(tokens), str(scratch / "model")]
            return _process([sys.executable, "-m", "tests.benchmarks.groups.authors", *arguments])

    def ours() -> Measured:
        with shop.scratch() as scratch:
            statistics, config = str(scratch / "statistics"), scratch / "config.yml"
            document = {
                "merge_method": "aim",
                "base_model": str(base),
                "models": [{"model": str(merged), "parameters": {"weight": 1.0}}],
                "parameters": {"activation_stats": statistics, "omega": _OMEGA},
                "dtype": "float32",
            }
            config.write_text(json.dumps(document))  # JSON is YAML
            command = [sys.executable, "-m", "mergekit_arm", "calibrate", str(base), statistics]
            command += [f"--dataset={tokens}", f"--samples={count}", "--statistics=importance"]
            first = _process([*command, "--dtype=float32", "--device=cpu"])
            install = "import mergekit_arm.autoload as a; a.install()"
            main = "from mergekit.scripts.run_yaml import main; main()"
            command = [sys.executable, "-c", f"{install}; {main}"]
            command += [str(config), str(scratch / "model"), "--no-copy-tokenizer", "--quiet"]
            second = _process(command)
            return {
                WALL: first[WALL] + second[WALL],
                PROCESSOR: first[PROCESSOR] + second[PROCESSOR],
                MEMORY: max(first[MEMORY], second[MEMORY]),
            }

    return compare(
        "authors-script",
        Side("calibrate and mergekit-yaml", ours),
        Side("the authors' script", theirs),
        {WALL: 0.9, PROCESSOR: None, MEMORY: 0.55},
        rounds=min(shop.rounds, 3),
    )


def _process(command: list[str]) -> Measured:
    """Run ``command`` to its end; return its times and its largest resident set."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} failed:\n{said[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        WALL: wall,
        PROCESSOR: usage.ru_utime + usage.ru_stime,
        MEMORY: float(usage.ru_maxrss * unit),
    }


def relax(base: str, merged: str, tokens: str, out: str) -> None:
    """Do what the script does: importance by hooks, relaxation over state dicts, saving.

    Every block's mean |x| of every layer's input is kept until the end, as in AWQ's
    ``get_calib_feat``; both models are in memory.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    def load(folder: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model = load(base)
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def observe(_module: nn.Module, arguments: tuple[Any, ...], _output: Any) -> None:
            x = arguments[0].detach()
            seen.setdefault(name, []).append(x.abs().reshape(-1, x.shape[-1]).mean(0).cpu())

        return observe

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or "norm" in type(module).__name__.lower()
    ]
    rows = [json.loads(line)["input_ids"] for line in Path(tokens).read_text().splitlines()]
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    importance = {name: torch.stack(blocks).mean(0) for name, blocks in seen.items()}

    finished = load(merged)
    originals, weights = model.state_dict(), finished.state_dict()
    for name, weight in weights.items():
        found = importance.get(name.removesuffix(".weight"))
        if found is None:
            continue
        gain = 1 - (1 - _OMEGA) * found / found.max()
        weights[name] = originals[name] + (weight - originals[name]) * gain
    finished.load_state_dict(weights)
    finished.save_pretrained(out)


BENCHMARKS = {"authors-script": authors_script}
TASKS = ()


if __name__ == "__main__":
    relax(*sys.argv[1:])
