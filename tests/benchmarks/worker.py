"""The tasks that benchmarks measure; each runs in a process of its own.

``python -m tests.benchmarks.worker TASK ARGUMENTS RESULT``: ARGUMENTS is JSON, and what the task
measured is written to the file RESULT as JSON. Tasks import what they need themselves, before
their clock starts, so that one does not pay for another's libraries.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PROCESSOR, TIME

FORWARD = "forward passes"
LOADED = "time with loading"
EXTRA = "extra memory"
_WARM_UP_TOKENS = 16  # as many as a calibration spends on finding the sites


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            TIME: time.perf_counter() - self._wall,
            PROCESSOR: time.process_time() - self._processor,
        }


def build_model(shape: dict[str, Any], out: str, seed: int, base: str | None) -> dict[str, float]:
    """Save a random Llama, or ``base`` with noise on every weight, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    if base is None:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(out)
    return {}


def build_smollm2() -> dict[str, str]:
    """Build the real SmolLM2-135M-Instruct, or find it built; say where it is."""
    from tests.real.smollm2 import smollm2

    return {"folder": str(smollm2())}


def build_text(out: str) -> dict[str, float]:
    """Write the English text that ships with Python: its language reference."""
    from pydoc_data.topics import topics

    Path(out).write_text("\n\n".join(topics.values()), encoding="utf-8")
    return {}


def build_tokens(out: str, sequences: int, length: int, words: int) -> dict[str, float]:
    """Write rows of random token ids."""
    import torch

    rows = torch.randint(words, (sequences, length), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()]
    Path(out).write_text("".join(lines))
    return {}


def forward(model: str, dataset: str) -> dict[str, float]:
    """Plain ``model(ids)`` over the same batches in the same dtype as a calibration's."""
    import torch
    from transformers import AutoModelForCausalLM

    from mergekit_arm.calibration.running.session import TOKENS_PER_BATCH
    from mergekit_arm.models.loading import choose_dtype

    dtype = choose_dtype("auto", torch.device("cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    rows = [json.loads(line)["input_ids"] for line in Path(dataset).read_text().splitlines()]
    size = max(1, TOKENS_PER_BATCH // len(rows[0]))
    with torch.inference_mode():
        loaded(torch.tensor(rows[:1])[:, :_WARM_UP_TOKENS])
        clock = Clock()
        for batch in torch.tensor(rows).split(size):
            loaded(batch)
        took = clock.read()
    return {**took, FORWARD: took[TIME]}


def calibrate(options: dict[str, Any]) -> dict[str, float]:
    """A whole calibration; ``TIME`` is all of it but loading the model.

    Under torchrun, the first process's.
    """
    import datasets  # noqa: F401  # imported late by the calibration
    import torch
    from transformers import AutoModelForCausalLM

    from mergekit_arm.calibration import calibrate as run
    from mergekit_arm.calibration import prepare

    loading = dict.fromkeys((TIME, PROCESSOR), 0.0)
    load_model = prepare.load_model

    def timed_load(*arguments: Any, **named: Any) -> Any:
        clock = Clock()
        try:
            return load_model(*arguments, **named)
        finally:
            for quantity, seconds in clock.read().items():
                loading[quantity] += seconds

    prepare.load_model = timed_load
    try:
        clock = Clock()
        result = run.calibrate(run.CalibrationOptions(**options, device="cpu"))
        took = clock.read()
    finally:
        prepare.load_model = load_model
    if result is None:
        return {}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(_config(options["model"]))
    embedded = sum(p.numel() for p in empty.get_input_embeddings().parameters())
    return {
        **{quantity: seconds - loading[quantity] for quantity, seconds in took.items()},
        LOADED: took[TIME],
        FORWARD: result.seconds,
        # A calibration never multiplies by the embedding table.
        "parameters": sum(p.numel() for p in empty.parameters()) - embedded,
        "tokens": result.metadata.data.tokens,
    }


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


def kernel(what: str, rows: int, width: int, rank: int, dtype: str) -> dict[str, float]:
    """One ARM step on a weight, or one pair of products of its task vector with the basis.

    The products are of float32, as the step's are: ``dtype`` is that of the weights.
    """
    import torch

    from mergekit_arm.methods.step import Incoming, arm_step

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight, checkpoint = (
        torch.empty(rows, width, dtype=kind).normal_(generator=generator) for _ in range(2)
    )
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
    task = checkpoint.float() - weight.float() if what == "pair" else weight
    runs: dict[str, Callable[[slice], Any]] = {
        "step": lambda part: arm_step(
            weight[part], [Incoming(checkpoint[part], 0.5)], basis, rotation=-0.4
        ),
        "pair": lambda part: (task[part] @ basis) @ basis.T,
    }
    run = runs[what]
    run(slice(16))  # the libraries' own start-up
    before = _peak_bytes()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run(slice(None))
        seconds.append(time.perf_counter() - started)
    return {TIME: statistics.median(seconds), EXTRA: float(_peak_bytes() - before)}


def regmean_kernel(what: str, rows: int, width: int, rank: int, dtype: str) -> dict[str, float]:
    """RegMean of two models on a weight, or the products of its task vectors that it must make.

    ``what`` is ``step`` (the rows, their least squares ready), ``prepare`` (those, once for all
    weights of a site) or ``products``. The products are of float32, as the step's are.
    """
    import torch

    from mergekit_arm.methods.moments import least_squares, second_moment
    from mergekit_arm.methods.regression import regression_step

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight, *models = (
        torch.empty(rows, width, dtype=kind).normal_(generator=generator) for _ in range(3)
    )
    values = torch.linspace(100, 1, rank)
    bases = [torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q for _ in models]
    moments = [second_moment(1 + one.square() @ values, one, values) for one in bases]
    solution = least_squares(moments, [1.0, 1.0])
    tasks = [one.float() - weight.float() for one in models] if what == "products" else models
    back = solution.back
    assert back is not None
    runs: dict[str, Callable[[slice], Any]] = {
        "step": lambda part: regression_step(weight[part], [m[part] for m in models], solution),
        "prepare": lambda part: least_squares(moments, [1.0, 1.0]),
        "products": lambda part: (
            torch.cat([t[part] @ one for t, one in zip(tasks, bases, strict=True)], 1) @ back
        ),
    }
    run = runs[what]
    run(slice(16))  # the libraries' own start-up
    before = _peak_bytes()
    took = []
    for _ in range(5):
        clock = Clock()
        run(slice(None))
        took.append(clock.read())
    middle = {key: statistics.median(one[key] for one in took) for key in took[0]}
    return {**middle, EXTRA: float(_peak_bytes() - before)}


def eigenvectors(way: str, width: int, rank: int) -> dict[str, float]:
    """A site's directions at most: ``leading`` ones only, or all of a ``full`` decomposition.

    Eigenvalues fall as 1/i, but for one massive direction.
    """
    import torch

    from mergekit_arm.statistics.kinds.eigen import leading_eigenpairs
    from mergekit_arm.statistics.kinds.second_moment import sketch_matrix, stored_directions

    device = torch.device("cpu")
    mirror = torch.randn(width, 1, generator=torch.Generator().manual_seed(0)).double()
    mirror /= mirror.norm()
    eigenvalues = 1 / torch.arange(1, width + 1).double()
    eigenvalues[0] *= 100

    def second_moment_times(matrix: torch.Tensor) -> torch.Tensor:
        turned = eigenvalues[:, None] * (matrix - 2 * mirror @ (mirror.T @ matrix))
        return (turned - 2 * mirror @ (mirror.T @ turned)).float()

    omega = sketch_matrix(width, rank, 42, device)
    drawn = torch.eye(width) if omega is None else omega
    sketch = second_moment_times(drawn.double())
    most = stored_directions(width, rank)

    def full() -> Any:
        y = sketch.double()
        if omega is None:
            return torch.linalg.eigh(y, UPLO="U")
        core = omega.double().T @ y
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        sound = values > 1e-6 * float(values[-1])
        half = y @ (vectors[:, sound] / values[sound].sqrt())
        return torch.linalg.svd(half, full_matrices=False)

    run: Callable[[], Any] = {
        "leading": lambda: leading_eigenpairs(sketch, omega, most),
        "full": full,
    }[way]
    torch.linalg.eigh(torch.eye(16))  # the libraries' own start-up
    clock = Clock()
    run()
    return clock.read()


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        build_model,
        build_smollm2,
        build_text,
        build_tokens,
        forward,
        calibrate,
        merge,
        methods,
        kernel,
        regmean_kernel,
        eigenvectors,
    )
}


def main(task: str, arguments: str, result: str) -> None:
    measured = TASKS[task](**json.loads(arguments))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
