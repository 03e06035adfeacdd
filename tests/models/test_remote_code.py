"""Models whose code comes with the checkpoint: only when allowed, and then like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mergekit_arm.cli.calibrate import command
from mergekit_arm.statistics.read import Statistics
from tests.support.models import VOCABULARY

WIDTH, EXPERTS = 16, 3
FAVOURED, NEVER = 0, 2
"""The routers send most tokens to one expert and none to another."""

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own-mixture"
    num_hidden_layers = 2


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        choice = self.router(h).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            taken = choice == number
            if taken.any():
                out[taken] = expert(h[taken])
        return x + out


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(96, 16)
        self.layers = nn.ModuleList(Mixture() for _ in range(2))
        self.lm_head = nn.Linear(16, 96, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)
"""

# A weight that the model certainly uses, but in no product with an input.
STRANGE = CODE.replace(
    "return x + out", "return x + out * torch.linalg.vector_norm(self.gains, dim=0)"
).replace(
    "        self.router =",
    "        self.gains = nn.Parameter(torch.ones(2, 16))\n        self.router =",
)


def save(folder: Path, seed: int, code: str = CODE) -> Path:
    folder.mkdir()
    (folder / "modeling_own.py").write_text(code)
    settings = {
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
        "model_type": "own-mixture",
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"embed.weight": random(VOCABULARY, WIDTH), "lm_head.weight": random(VOCABULARY, 16)}
    for layer in range(2):
        prefix = f"layers.{layer}"
        tensors |= {f"{prefix}.norm.weight": random(16), f"{prefix}.norm.bias": random(16)}
        tensors[f"{prefix}.router.weight"] = random(EXPERTS, WIDTH) / 4
        tensors[f"{prefix}.router.bias"] = torch.tensor([3.0, 0.0, -1e4])
        for expert in range(EXPERTS):
            tensors[f"{prefix}.experts.{expert}.weight"] = random(WIDTH, WIDTH)
            tensors[f"{prefix}.experts.{expert}.bias"] = random(WIDTH)
        if code is STRANGE:
            tensors[f"{prefix}.gains"] = random(2, WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers copies the code there and imports it from there.
    folder = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.setattr(sys, "path", [*sys.path, folder])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def calibrate(model: Path, out: Path, data: Path, *options: str) -> Result:
    return CliRunner().invoke(
        command,
        [str(model), str(out), "--dataset", str(data), *options],
        env={"COLUMNS": "200"},
    )


def test_code_that_is_not_allowed_does_not_run(tmp_path: Path, token_file: Path) -> None:
    model = save(tmp_path / "model", 0, f"raise SystemExit(3)\n{CODE}")
    done = calibrate(model, tmp_path / "stats", token_file)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert str(model) in line
    assert "--trust-remote-code" in line


@pytest.mark.parametrize("walk", [[], ["--low-memory"]])
def test_measured_and_merged_when_allowed(
    walk: list[str], tmp_path: Path, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = save(tmp_path / "base", 0), save(tmp_path / "a", 1)
    done = calibrate(base, tmp_path / "stats", token_file, "--trust-remote-code", *walk)
    assert done.exit_code == 0, done.output
    one, two = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    importance, tokens = expected(one, token_file)
    statistics = Statistics("stats", tmp_path / "stats")
    assert set(statistics.metadata.weights) == set(one)
    assert statistics.metadata.experts() == tokens
    for layer in range(2):
        seen = [tokens[f"layers.{layer}.experts.{expert}"] for expert in range(EXPERTS)]
        assert seen[FAVOURED] > 32 > seen[1] > seen[NEVER] == 0
    assert "4 experts saw fewer than 32 tokens, too few to be used" in done.output
    assert "layers.0.experts.2 (0)" in done.output
    for name, merged in merge(base, other, tmp_path).items():
        gain = torch.ones(())
        if name in importance and tokens.get(name.removesuffix(".weight"), 32) >= 32:
            gain = 1 - importance[name] / importance[name].max()
        wanted = one[name] + gain * (two[name] - one[name])
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5, msg=name)
    said = [record.message for record in caplog.records]
    assert sum("too few to be used" in message for message in said) == 2
    assert sum("left as merged" in message for message in said) == 2
    assert "layers.0.experts.2.weight: expert that saw no token: it is left as merged" in said


def expected(one: dict[str, Tensor], data: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The mean |x| of every weight's input and the experts' tokens, by a forward pass of ours."""
    ids = [
        token for line in data.read_text().splitlines() for token in json.loads(line)["input_ids"]
    ]
    x = one["embed.weight"][ids]
    importance: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for layer in (f"layers.{number}" for number in range(2)):
        importance[f"{layer}.norm.weight"] = x.abs().mean(0)
        h = functional.layer_norm(
            x, (WIDTH,), one[f"{layer}.norm.weight"], one[f"{layer}.norm.bias"]
        )
        importance[f"{layer}.router.weight"] = h.abs().mean(0)
        logits = h @ one[f"{layer}.router.weight"].T + one[f"{layer}.router.bias"]
        choice = logits.argmax(-1)
        added = torch.zeros_like(x)
        for number in range(EXPERTS):
            expert, taken = f"{layer}.experts.{number}", choice == number
            tokens[expert] = int(taken.sum())
            importance[f"{expert}.weight"] = h[taken].abs().mean(0)
            added[taken] = h[taken] @ one[f"{expert}.weight"].T + one[f"{expert}.bias"]
        x = x + added
    importance["lm_head.weight"] = x.abs().mean(0)
    return importance, tokens


def merge(base: Path, other: Path, folder: Path) -> dict[str, Tensor]:
    config = {
        "merge_method": "aim",
        "base_model": str(base),
        "models": [{"model": str(other), "parameters": {"weight": 1.0}}],
        "parameters": {"activation_stats": str(folder / "stats"), "omega": 0.0},
        "dtype": "float32",
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(
        mergekit_yaml,
        [str(folder / "config.yml"), str(folder / "out"), "--quiet", "--trust-remote-code"],
    )
    assert done.exit_code == 0, done.output or repr(done.exception)
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("walk", [[], ["--low-memory"]])
def test_a_weight_that_nothing_explains_is_an_error(
    walk: list[str], tmp_path: Path, token_file: Path
) -> None:
    model = save(tmp_path / "model", 0, STRANGE)
    done = calibrate(model, tmp_path / "stats", token_file, "--trust-remote-code", *walk)
    assert done.exit_code == 2, done.output
    assert "OwnForCausalLM has 2 weights that cannot be measured" in done.output
    assert "layers.0.gains (Mixture uses it in no matrix product)" in done.output
    assert not (tmp_path / "stats").exists()
