"""Importance matrices, written here by ``gguf`` and by hand, become statistics and come back."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file

from mergekit_arm.cli.export_imatrix import command as export_command
from mergekit_arm.cli.import_imatrix import command as import_command
from mergekit_arm.errors import InputError
from mergekit_arm.imatrix.exporting import export_imatrix, model_type
from mergekit_arm.imatrix.files import read_imatrix
from mergekit_arm.imatrix.importing import import_imatrix
from mergekit_arm.imatrix.names import LlamaNames
from mergekit_arm.statistics.format import NOT_THERE
from mergekit_arm.statistics.read import Statistics
from tests.support.merges import config, refused, run, weights
from tests.support.models import perturbed, tiny_experts, tiny_llama
from tests.support.stored import Folder

DOWN = "model.layers.1.mlp.down_proj"
LLAMA = {
    "attn_q": ("self_attn.q_proj", 32),
    "attn_k": ("self_attn.k_proj", 32),
    "attn_v": ("self_attn.v_proj", 32),
    "attn_output": ("self_attn.o_proj", 32),
    "ffn_gate": ("mlp.gate_proj", 32),
    "ffn_up": ("mlp.up_proj", 32),
    "ffn_down": ("mlp.down_proj", 48),
}


def sums(*, magnitudes: bool = False) -> dict[str, np.ndarray]:
    """What llama-imatrix would have written of the family's base: two layers, 1000 tokens."""
    random = np.random.default_rng(0)
    found = {}
    for layer in range(2):
        for name, (_, width) in LLAMA.items():
            start = f"blk.{layer}.{name}.weight"
            found[f"{start}.in_sum2"] = random.uniform(1, 100, (1, width))
            found[f"{start}.counts"] = np.full((1, 1), 1000.0)
            if magnitudes:
                found[f"{start}.in_sumabs"] = random.uniform(1, 100, (1, width))
    return found


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, arch="none")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.train.raw", "code.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 500)
    for name, value in tensors.items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(
    path: Path, entries: dict[str, tuple[np.ndarray, int]], *, footer: bool = True
) -> Path:
    """Write the older format, as llama.cpp's C++ does: mean x² times chunks."""
    content = struct.pack("<i", len(entries))
    for name, (means, chunks) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", chunks, means.size)
        content += (means * chunks).astype("<f4").tobytes()
    if footer:
        content += struct.pack("<ii", 7, 8) + b"wiki.raw"
    path.write_bytes(content)
    return path


def test_a_gguf_becomes_statistics(family: Path, tmp_path: Path) -> None:
    tensors = {**sums(), "blk.0.attn_q.weight.in_cubed": np.ones((1, 32))}
    file = write_gguf(tmp_path / "im.gguf", tensors)
    done = import_imatrix(file, str(family / "base"), tmp_path / "stats")
    assert not done.magnitudes
    assert not done.unused
    assert done.reasons == {"embedding": 1, NOT_THERE: 6}  # five norms and the head
    stored, measured = Folder.open(tmp_path / "stats"), Folder.open(family / "stats")
    assert stored.metadata["model"]["content_hash"] == measured.metadata["model"]["content_hash"]
    assert torch.equal(stored.tensors["probes"], measured.tensors["probes"])
    for layer in range(2):
        for name, (own, _) in LLAMA.items():
            record = stored.record(f"model.layers.{layer}.{own}.weight")
            assert record["input_axis"] == 1
            value = stored.tensors[f"{record['site']}.square_sum"].numpy()
            expected = tensors[f"blk.{layer}.{name}.weight.in_sum2"][0].astype(np.float32)
            np.testing.assert_array_equal(value, expected)
            assert stored.metadata["sites"][record["site"]]["tokens"] == 1000
    data = stored.metadata["data"]
    assert (data["dataset"], data["tokens"]) == ("wiki.train.raw + code.txt", 1000)
    assert data["sequence_length"] == 500


def merged(family: Path, folder: Path, **parameters: object) -> str:
    settings = {
        "activation_stats": str(folder / "stats"),
        "omega": [{"filter": "norm", "value": 1.0}, {"filter": "lm_head", "value": 1.0},
                  {"value": 0.3}],
        **parameters,
    }  # fmt: skip
    return yaml.safe_dump(config(family, parameters=settings))


def test_rms_works_and_mean_abs_only_where_it_is_there(family: Path, tmp_path: Path) -> None:
    tensors = sums()
    import_imatrix(
        write_gguf(tmp_path / "im.gguf", tensors), str(family / "base"), tmp_path / "stats"
    )
    line = refused(merged(family, tmp_path), tmp_path)
    assert "set importance: rms" in line
    found = weights(run(mergekit_yaml, merged(family, tmp_path, importance="rms"), tmp_path))
    base, other = (weights(family / one)[f"{DOWN}.weight"].double() for one in ("base", "a"))
    rms = np.sqrt(tensors["blk.1.ffn_down.weight.in_sum2"][0].astype(np.float32))
    gain = torch.from_numpy(1 - 0.7 * rms / rms.max())
    torch.testing.assert_close(
        found[f"{DOWN}.weight"].double(), base + (other - base) * gain, rtol=1e-5, atol=1e-6
    )
    full = sums(magnitudes=True)
    file = write_gguf(tmp_path / "full.gguf", full)
    done = import_imatrix(file, str(family / "base"), tmp_path / "stats", force=True)
    assert done.magnitudes
    again = weights(run(mergekit_yaml, merged(family, tmp_path), tmp_path / "again"))
    magnitudes = full["blk.1.ffn_down.weight.in_sumabs"][0]
    gain = torch.from_numpy(1 - 0.7 * magnitudes / magnitudes.max())
    torch.testing.assert_close(
        again[f"{DOWN}.weight"].double(), base + (other - base) * gain, rtol=1e-5, atol=1e-6
    )


def test_the_card_can_be_pasted(family: Path, tmp_path: Path) -> None:
    import_imatrix(
        write_gguf(tmp_path / "im.gguf", sums()), str(family / "base"), tmp_path / "stats"
    )
    card = (tmp_path / "stats" / "README.md").read_text()
    text = card.split("```yaml\n")[1].split("```")[0]
    here = text.replace("…", str(family / "a")).replace("stats: stats", f"stats: {tmp_path}/stats")
    out = run(mergekit_yaml, here + "dtype: float32\n", tmp_path)
    assert weights(out).keys() == weights(family / "base").keys()


def test_a_norm_needs_the_users_consent(family: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "im.gguf", sums())
    import_imatrix(file, str(family / "base"), tmp_path / "stats")
    line = refused(merged(family, tmp_path, importance="rms", omega=0.3), tmp_path)
    assert NOT_THERE in line
    assert "filter:" in line


@pytest.mark.parametrize("footer", [True, False])
def test_the_older_format(family: Path, tmp_path: Path, footer: bool) -> None:
    means = {f"blk.{n}.ffn_down.weight": np.linspace(1, 2, 48) for n in range(2)}
    entries = {name: (mean, 7) for name, mean in means.items()}
    file = write_dat(tmp_path / "im.dat", entries, footer=footer)
    done = import_imatrix(file, str(family / "base"), tmp_path / "stats")
    stored = Folder.open(tmp_path / "stats")
    site = stored.metadata["sites"][DOWN]
    mean = stored.tensors[f"{DOWN}.square_sum"].numpy() / site["tokens"]
    np.testing.assert_allclose(mean, means["blk.1.ffn_down.weight"], rtol=1e-6)
    assert done.metadata.data.dataset == ("wiki.raw" if footer else "unknown")
    again = export_imatrix(Statistics("stats", tmp_path / "stats"), tmp_path / "im.gguf")
    assert (again.chunks, again.chunk_size) == (7 if footer else 1, 512)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_experts(0)
    model.save_pretrained(folder / "base")
    perturbed(model, 1).save_pretrained(folder / "a")
    measure(folder / "base", folder / "stats", min_expert_tokens=0)
    return folder


@pytest.mark.parametrize("name", ["family", "experts"])
def test_there_and_back(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    statistics = Statistics("stats", folder / "stats")
    matrix = export_imatrix(statistics, tmp_path / "im.gguf")
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    assert bytes(reader.fields["general.type"].parts[-1]).decode() == "imatrix"
    assert {one.name for one in reader.tensors} == {
        f"{entry}{suffix}"
        for entry in matrix.entries
        for suffix in (".in_sum2", ".counts", ".in_sumabs")
    }
    assert all(one.tensor_type == gguf.GGMLQuantizationType.F32 for one in reader.tensors)
    done = import_imatrix(tmp_path / "im.gguf", str(folder / "base"), tmp_path / "back")
    assert done.magnitudes
    before, after = Folder.open(folder / "stats"), Folder.open(tmp_path / "back")
    compared = 0
    for weight, record in after.metadata["weights"].items():
        mine = before.record(weight)
        if "site" not in record:
            assert "site" not in mine or len(mine["shape"]) == 1
            continue
        compared += 1
        assert record["input_axis"] == mine["input_axis"]
        assert record.get("row") == mine.get("row")
        row = record.get("row", slice(None))
        for key in ("square_sum", "abs_sum"):
            one, other = (f.tensors[f"{r['site']}.{key}"][row] for f, r in
                          ((before, mine), (after, record)))  # fmt: skip
            torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0)
        tokens = [
            f.metadata["sites"][r["site"]]["tokens"] for f, r in ((before, mine), (after, record))
        ]
        assert tokens[0] == tokens[1]
    assert compared > 14
    for weight in before.metadata.get("converted", {}):
        assert after.record(weight)["input_axis"] == before.record(weight)["input_axis"]


def test_experts_merge_with_what_came_back(experts: Path, tmp_path: Path) -> None:
    export_imatrix(Statistics("stats", experts / "stats"), tmp_path / "im.gguf")
    import_imatrix(tmp_path / "im.gguf", str(experts / "base"), tmp_path / "stats")
    found = weights(run(mergekit_yaml, merged(experts, tmp_path), tmp_path / "one"))
    document = yaml.safe_load(merged(experts, tmp_path))
    document["parameters"]["activation_stats"] = str(experts / "stats")
    expected = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "two"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_tied_head_comes_back(tmp_path: Path, measure: Callable[..., Path]) -> None:
    """Under the name of the one tensor that it is in llama.cpp too."""
    tiny_llama(0, tied=True).save_pretrained(tmp_path / "base")
    measure(tmp_path / "base", tmp_path / "stats")
    matrix = export_imatrix(Statistics("stats", tmp_path / "stats"), tmp_path / "im.gguf")
    assert "token_embd.weight" in matrix.entries
    assert "output.weight" not in matrix.entries
    done = import_imatrix(tmp_path / "im.gguf", str(tmp_path / "base"), tmp_path / "back")
    assert not done.unused
    assert done.reasons == {NOT_THERE: 5}  # the norms
    before, after = Folder.open(tmp_path / "stats"), Folder.open(tmp_path / "back")
    one, other = (
        f.tensors[f"{f.record('model.embed_tokens.weight')['site']}.square_sum"]
        for f in (before, after)
    )
    torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0)


def test_the_head_is_exported(tmp_path: Path, family: Path) -> None:
    matrix = export_imatrix(Statistics("stats", family / "stats"), tmp_path / "im.gguf")
    assert "output.weight" in matrix.entries
    assert "token_embd.weight" not in matrix.entries
    assert (matrix.chunks, matrix.chunk_size) == (12, 32)  # the rows


@pytest.mark.parametrize(
    ("model_type", "weight", "expected"),
    [
        ("llama", "model.layers.3.self_attn.q_proj.weight", ("blk.3.attn_q.weight", None)),
        ("mistral", "lm_head.weight", ("output.weight", None)),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", ("blk.1.ffn_up.weight", None)),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", ("blk.0.attn_qkv.weight", None)),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w2.weight",
         ("blk.2.ffn_down_exps.weight", 5)),
        ("qwen3_moe", "model.layers.2.mlp.experts.5.up_proj.weight",
         ("blk.2.ffn_up_exps.weight", 5)),
        ("qwen3_moe", "model.layers.2.mlp.gate.weight", ("blk.2.ffn_gate_inp.weight", None)),
    ],
)  # fmt: skip
def test_names(model_type: str, weight: str, expected: tuple[str, int | None]) -> None:
    found = LlamaNames(model_type, 4).of(weight)
    assert found is not None
    assert (found.name, found.expert) == expected


def test_names_that_nobody_knows() -> None:
    assert LlamaNames("llama", 2).of("model.layers.0.strange.weight") is None
    with pytest.raises(InputError, match=r"no architecture qwen33"):
        LlamaNames("qwen33", 2)


def imported(*arguments: object) -> Result:
    return CliRunner().invoke(import_command, [str(one) for one in arguments])


@pytest.mark.parametrize("length", [2**40, 2**63])
@pytest.mark.parametrize("depth", [0, 5000])
def test_a_damaged_length_is_not_counted_to(length: int, depth: int, tmp_path: Path) -> None:
    """A list of 2⁴⁰ numbers in a file of some bytes, and lists in lists in lists."""
    number, array = 4, 9  # types of values
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    nested = struct.pack("<I", array) + struct.pack("<IQ", array, 1) * depth
    path = tmp_path / "x.gguf"
    path.write_bytes(head + nested + struct.pack("<IQ", number, length) + bytes(40))
    begun = time.process_time()
    with pytest.raises(InputError, match="is no importance matrix"):
        read_imatrix(path)
    assert time.process_time() - begun < 1


def test_what_is_refused_leaves_nothing(family: Path, experts: Path, tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "im.gguf", sums())
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-500])
    (tmp_path / "text.txt").write_text("no matrix at all")
    (tmp_path / "empty").write_bytes(b"")
    write_gguf(tmp_path / "model.gguf", sums(), kind="model")
    without = {name: one for name, one in sums().items() if "counts" not in name}
    write_gguf(tmp_path / "lacking.gguf", without)
    write_gguf(tmp_path / "nan.gguf", {name: one * np.nan for name, one in sums().items()})
    wide = {name: np.ones((1, 99)) if "ffn_down" in name else one for name, one in sums().items()}
    one = np.ones((1, 1))
    counts = {f"blk.{layer}.ffn_down.weight.counts": one for layer in range(2)}
    write_gguf(tmp_path / "wide.gguf", {**wide, **counts})
    far = "blk.77.ffn_down.weight"
    write_gguf(tmp_path / "other.gguf", {f"{far}.in_sum2": np.ones((1, 48)), f"{far}.counts": one})
    dat = write_dat(tmp_path / "im.dat", {"blk.0.ffn_down.weight": (np.ones(48), 3)})
    (tmp_path / "cut.dat").write_bytes(dat.read_bytes()[:100])
    base = family / "base"
    for file, model, said in (
        ("cut.gguf", base, "is no importance matrix"),
        ("text.txt", base, "is no importance matrix"),
        ("empty", base, "is no importance matrix"),
        ("absent", base, "No such file"),
        ("model.gguf", base, "general.type is model"),
        ("lacking.gguf", base, "is no importance matrix"),
        ("nan.gguf", base, "values that are no sums"),
        ("wide.gguf", base, "do not belong together"),
        ("other.gguf", base, "is of none of"),
        ("cut.dat", base, "is no importance matrix"),
        ("im.gguf", tmp_path / "nowhere", "no such directory"),
    ):
        done = imported(tmp_path / file, model, tmp_path / "stats")
        assert (done.exit_code, said in done.output) == (2, True), (file, done.output)
        assert not (tmp_path / "stats").exists()
    assert imported(good, base, tmp_path / "stats").exit_code == 0
    again = imported(good, base, tmp_path / "stats")
    assert (again.exit_code, "--force" in again.output) == (2, True)
    assert imported(good, base, tmp_path / "stats", "--force").exit_code == 0


def test_exporting(family: Path, tmp_path: Path) -> None:
    def export(*arguments: object) -> Result:
        return CliRunner().invoke(export_command, [str(one) for one in arguments])

    out = tmp_path / "new" / "im.gguf"
    assert export(family / "stats", out).exit_code == 0
    assert read_imatrix(out).entries
    assert export(family / "stats", out).exit_code == 2
    assert export(family / "stats", out, "--force").exit_code == 0
    assert "is a directory" in export(family / "stats", tmp_path).output
    model = write_gguf(tmp_path / "model.gguf", sums(), kind="model")
    before = model.read_bytes()
    done = export(family / "stats", model, "--force")
    assert (done.exit_code, "will not be replaced" in done.output) == (2, True)
    assert model.read_bytes() == before
    assert export(family / "base", tmp_path / "x.gguf").exit_code == 2
    assert not (tmp_path / "x.gguf").exists()
    assert load_file(family / "stats" / "model.safetensors")  # untouched


def test_without_gguf(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "im.gguf", sums())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    done = imported(file, family / "base", tmp_path / "stats")
    assert (done.exit_code, "mergekit-arm[imatrix]" in done.output) == (2, True)


@pytest.mark.parametrize(
    ("architecture", "known"),
    [("GPT2LMHeadModel", "gpt2"), ("LlamaForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2")],
)
def test_a_class_that_several_model_types_share_is_the_one_it_is_named_after(
    architecture: str, known: str
) -> None:
    assert model_type(architecture) == known
