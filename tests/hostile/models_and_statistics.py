"""The table: what is broken, who meets it, and what the one line says.

``MERGEKIT`` lists what mergekit itself meets first, before a method of ours is asked anything; it
ends there with a traceback of its own, and our commands are held to the rule on the same input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.hostile.scene import (
    INDEX,
    METADATA,
    TENSORS,
    Break,
    Scene,
    cut,
    document,
    each,
    flip,
    long_header,
    put,
    remove,
    sharded,
    tensors,
    write,
)

Case = tuple[str, Break, tuple[str, ...]]

SITE = "model.layers.1.self_attn.q_proj"
WEIGHT = f"{SITE}.weight"
STATS = f"stats/{TENSORS}"
JSON = f"stats/{METADATA}"
STATS_INDEX = f"stats/{INDEX}"
SHARD = "stats/model-00001-of-00001.safetensors"
AGAIN = "copy or measure"
DAMAGED = ("activation_stats", f"{METADATA} is damaged", AGAIN)
CANNOT_READ = ("activation_stats", "cannot read its tensors", AGAIN)
BASE_INDEX = f"base/{INDEX}"
UNREADABLE = ("base", "its weights cannot be read", "copy or download it again")
SHAPES = ("base", "config.json asks for", "copy or download both again")


def stats_are(reference: str) -> Break:
    """Let the configuration name these statistics; ``{}`` is the folder."""
    return lambda scene: setattr(scene, "stats", reference.format(scene.folder))


def model_is(reference: str) -> Break:
    return lambda scene: setattr(scene, "model", reference.format(scene.folder))


def field(path: str, value: Any) -> Break:
    return put(JSON, path.replace("SITE", SITE).replace("WEIGHT", WEIGHT), value)


def entry(file: str) -> Break:
    """Let the statistics' index say that the probes are in ``file``."""
    return each(sharded, put(STATS_INDEX, "weight_map probes", file))


def twice(scene: Scene) -> None:
    text = (scene / JSON).read_text(encoding="utf-8")
    (scene / JSON).write_text(text.replace('"tokens"', '"tokens": 1, "tokens"', 1))


def nothing_there(scene: Scene) -> None:
    (scene / "empty").mkdir()
    scene.stats = str(scene / "empty")


def poison(value: float) -> Break:
    """Fill a weight of the base with ``value``."""

    def change(found: dict[str, Tensor]) -> None:
        if WEIGHT in found:
            found[WEIGHT][:] = value

    return tensors("base", change, "*.safetensors")


def resize(model: str, name: str, rows: int) -> Break:
    def change(found: dict[str, Tensor]) -> None:
        if name in found:
            found[name] = torch.zeros(rows, found[name].shape[1])

    return tensors(model, change, "*.safetensors")


STATISTICS: list[Case] = [
    # The place.
    ("no such directory", stats_are("{}/stast"), ("stast", "no such directory", "calibrate")),
    ("a file", stats_are("{}/tokens.jsonl"), ("tokens.jsonl", "no such directory", "calibrate")),
    ("an empty directory", nothing_there, (METADATA, "no statistics directory", "calibrate")),
    ("a model", stats_are("{}/base"), (METADATA, "no statistics directory", "calibrate")),
    ("a name on the Hub", stats_are("nobody/stats"), ("nobody/stats", "nor readable on the Hub")),
    ("two revisions", stats_are("org/name@a@b"), ("org/name@a@b", "org/name@revision")),
    ("no revision", stats_are("org/name@"), ("org/name@", "org/name@revision")),
    ("an adapter", stats_are("org/name+org/lora"), ("org/name+org/lora",)),
    ("an adapter's revision", stats_are("org/name@a+b"), ("org/name@a+b", "org/name@revision")),
    ("a number", stats_are("7"), ("activation_stats 7", "no such directory", "calibrate")),
    # The tensors.
    ("no tensors", remove(STATS), CANNOT_READ),
    ("tensors of no bytes", cut(STATS, 0), CANNOT_READ),
    ("tensors of five bytes", cut(STATS, 5), CANNOT_READ),
    ("half the tensors", cut(STATS, 0.5), CANNOT_READ),
    ("a byte short", cut(STATS, 0.9999), CANNOT_READ),
    ("a header longer than the file", long_header(STATS), CANNOT_READ),
    ("a flipped bit in the header", flip(STATS), CANNOT_READ),
    ("a flipped bit", flip(STATS, f"{SITE}.abs_sum"), (f"{SITE}.abs_sum", "not those", AGAIN)),
    ("a flipped bit of the probes", flip(STATS, "probes"), ("probes", "not those", AGAIN)),
    ("text for tensors", write(STATS, "hello"), CANNOT_READ),
    # The index.
    ("a missing shard", each(sharded, remove(SHARD)), CANNOT_READ),
    ("half a shard", each(sharded, cut(SHARD, 0.5)), CANNOT_READ),
    ("an index of no JSON", each(sharded, write(STATS_INDEX, "{")), CANNOT_READ),
    ("an index that is a list", each(sharded, write(STATS_INDEX, "[]")), CANNOT_READ),
    (
        "weight_map as a list",
        each(sharded, put(STATS_INDEX, "weight_map", ["probes"])),
        ("weight_map", AGAIN),
    ),
    ("no weight_map", each(sharded, put(STATS_INDEX, "weight_map", ...)), ("weight_map", AGAIN)),
    ("a way up", entry("../x.safetensors"), ("'../x.safetensors'", "no safetensors file", AGAIN)),
    ("an absolute path", entry("/tmp/x.safetensors"), ("'/tmp/x.safetensors'", AGAIN)),
    ("a pickled shard", entry("pytorch_model.bin"), ("'pytorch_model.bin'", AGAIN)),
    ("a shard that is not there", entry("model-2.safetensors"), CANNOT_READ),
    ("a number for a shard", entry(3), ("weight_map.probes", AGAIN)),  # type: ignore[arg-type]
    (
        "a tensor that no shard holds",
        each(
            sharded,
            put(STATS_INDEX, "weight_map ghost.abs_sum", "model-00001-of-00001.safetensors"),
        ),
        ("no shard holds ghost.abs_sum", AGAIN),
    ),
    # The metadata: the file.
    ("no metadata", remove(JSON), (METADATA, "no statistics directory", "calibrate")),
    ("metadata of no bytes", cut(JSON, 0), DAMAGED),
    ("half the metadata", cut(JSON, 0.5), DAMAGED),
    ("metadata that are no text", write(JSON, b"\xff\xfe\x00"), DAMAGED),
    ("a list", write(JSON, "[1, 2]"), DAMAGED),
    ("a bottomless list", write(JSON, "[" * 100_000), DAMAGED),
    ("a field twice", twice, (*DAMAGED, "twice")),
    (
        "a hand edit",
        lambda scene: (scene / JSON).write_text(
            (scene / JSON).read_text(encoding="utf-8").replace('"seed": 42', '"seed": 43')
        ),
        (METADATA, "not as it was written", AGAIN),
    ),
    (
        "a line break in a name",
        document(JSON, lambda found: found["sites"].update({"a\nb": {}})),
        (*DAMAGED, r"a\nb"),
    ),
    # The metadata: every record, in the ways it can be wrong.
    ("a newer format", field("format_version", 2), ("format 2 is newer", "pip install -U")),
    ("format 0", field("format_version", 0), (*DAMAGED, "format_version")),
    ("a format in words", field("format_version", "one"), (*DAMAGED, "format_version")),
    ("no model", field("model", ...), (*DAMAGED, "model")),
    ("a model in words", field("model", "llama"), (*DAMAGED, "model")),
    ("no content hash", field("model content_hash", ...), (*DAMAGED, "model.content_hash")),
    ("no data", field("data", ...), (*DAMAGED, "data")),
    ("a negative number of tokens", field("data tokens", -1), (*DAMAGED, "data.tokens")),
    ("a seed in words", field("data seed", "x"), (*DAMAGED, "data.seed")),
    ("a mixture of numbers", field("data mixture", [1]), (*DAMAGED, "data.mixture")),
    ("no settings", field("settings", ...), (*DAMAGED, "settings")),
    ("a kind for the kinds", field("settings statistics", "all"), (*DAMAGED, "statistics")),
    ("an unknown setting", field("settings colour", 1), (*DAMAGED, "settings.colour")),
    ("energy above 1", field("settings energy", 2), (*DAMAGED, "settings.energy")),
    ("energy that is no number", field("settings energy", float("nan")), (*DAMAGED, "NaN")),
    ("rank 0", field("settings rank", 0), (*DAMAGED, "settings.rank")),
    ("no versions", field("versions", ...), (*DAMAGED, "versions")),
    ("no sites", field("sites", {}), (*DAMAGED, "sites")),
    ("sites as a list", field("sites", []), (*DAMAGED, "sites")),
    ("no width", field("sites SITE width", ...), (*DAMAGED, f"{SITE}.width")),
    ("another width", field("sites SITE width", 33), ("33", "channels", AGAIN)),
    ("a width that is true", field("sites SITE width", True), (*DAMAGED, f"{SITE}.width")),
    ("a huge width", field("sites SITE width", 10**15), ("0000", "channels", AGAIN)),
    ("no tokens", field("sites SITE tokens", ...), (*DAMAGED, f"{SITE}.tokens")),
    ("negative tokens", field("sites SITE tokens", -5), (*DAMAGED, f"{SITE}.tokens")),
    ("tokens beyond counting", field("sites SITE tokens", 10**400), (*DAMAGED, "tokens")),
    ("tokens in a text", field("sites SITE tokens", "7"), (*DAMAGED, f"{SITE}.tokens")),
    ("a fraction of a token", field("sites SITE tokens", 1.5), (*DAMAGED, f"{SITE}.tokens")),
    ("an unknown site field", field("sites SITE size", 1), (*DAMAGED, f"{SITE}.size")),
    ("no weights", field("weights", {}), (*DAMAGED, "weights")),
    ("no shape", field("weights WEIGHT shape", ...), (*DAMAGED, f"{WEIGHT}.shape")),
    ("another shape", field("weights WEIGHT shape", [32]), (WEIGHT, "shape", AGAIN)),
    ("no probe", field("weights WEIGHT probe", ...), (*DAMAGED, f"{WEIGHT}.probe")),
    ("a probe out of range", field("weights WEIGHT probe", 999), (WEIGHT, "row 999", AGAIN)),
    ("a site that is none", field("weights WEIGHT site", "x"), (WEIGHT, "no site", AGAIN)),
    ("an axis out of range", field("weights WEIGHT input_axis", 9), (WEIGHT, "is 9", AGAIN)),
    ("an axis of its own", field("weights WEIGHT input_axis", 0), (WEIGHT, "input_axis", AGAIN)),
    ("a row of no expert", field("weights WEIGHT row", 5), (WEIGHT, "row", AGAIN)),
    ("a digest of five digits", field("digests", {"probes": "abcde"}), (*DAMAGED, "digests")),
    ("digests of nothing", field("digests", {}), ("no digest of", AGAIN)),
]
"""Refused by ``mergekit-yaml`` and by ``mergekit-arm combine``."""

MODELS: list[Case] = [
    ("no such model", model_is("{}/bsae"), ("bsae",)),
    ("two revisions", model_is("org/name@a@b"), ("org/name@a@b", "id@revision")),
    ("a model on the Hub", model_is("nobody/model"), ("nobody/model",)),
    ("no config.json", remove("base/config.json"), ("base", "config.json")),
    ("config.json of no bytes", cut("base/config.json", 0), ("base", "expected")),
    ("config.json of no JSON", write("base/config.json", "{]"), ("base", "expected")),
    ("config.json as a list", write("base/config.json", "[]"), ("base", "expected")),
    ("no architecture", put("base/config.json", "architectures", ...), ("architecture", "base")),
    ("two architectures", put("base/config.json", "architectures", ["A", "B"]), ("architecture",)),
    ("an unknown type", put("base/config.json", "model_type", "llamma"), ("llamma", "base")),
    ("sizes in words", put("base/config.json", "hidden_size", "wide"), ("base", "hidden_size")),
    ("another vocabulary", put("base/config.json", "vocab_size", 97), SHAPES),
    ("more layers", put("base/config.json", "num_hidden_layers", 3), ("base", "layers.2")),
    ("a missing shard", remove("base/model-00002-of-00003.safetensors"), (*UNREADABLE, "00002")),
    ("half a shard", cut("base/model-00002-of-00003.safetensors", 0.5), UNREADABLE),
    ("a long header", long_header("base/model-00002-of-00003.safetensors"), UNREADABLE),
    ("an index of no JSON", write(BASE_INDEX, "{"), UNREADABLE),
    ("weight_map as a list", put(BASE_INDEX, "weight_map", ["x"]), UNREADABLE),
    ("no weight_map", put(BASE_INDEX, "weight_map", ...), (*UNREADABLE, "weight_map")),
    ("an index names an absent tensor",
     put(BASE_INDEX, "weight_map model.ghost.weight", "model-00001-of-00003.safetensors"),
     (*UNREADABLE, "model.ghost.weight")),
    ("an index names an absent file",
     put(BASE_INDEX, f"weight_map {WEIGHT}", "model-9.safetensors"), (*UNREADABLE, "model-9")),
    ("a way up", put(BASE_INDEX, f"weight_map {WEIGHT}", "../a/model-00002-of-00003.safetensors"),
     (*UNREADABLE, "'../a/")),
    ("an absolute path", put(BASE_INDEX, f"weight_map {WEIGHT}", "/tmp/x.safetensors"),
     (*UNREADABLE, "'/tmp/x")),
    ("NaN in a weight", poison(float("nan")), (SITE[:14], "NaN or infinity", "is broken")),
    ("infinity in a weight", poison(float("inf")), (SITE[:14], "NaN or infinity", "is broken")),
    ("a weight of another shape", resize("base", WEIGHT, 31), SHAPES),
    ("broken tokenizer.json", each(
        write("base/tokenizer.json", "{"), write("base/tokenizer_config.json", "{}"),
        write("tokens.jsonl", '{"text": "some words"}\n')), ("base", "tokenizer", "mend it")),
    ("no tokenizer", write("tokens.jsonl", '{"text": "some words"}\n'),
     ("tokenizer", "--tokenizer")),
]  # fmt: skip
"""Refused by ``mergekit-arm calibrate``."""

MERGED: list[Case] = [
    ("a missing shard of the base", remove("base/model-00002-of-00003.safetensors"),
     ("base", "00002", "copy or download")),
    ("a missing shard of a model", remove("a/model-00003-of-00003.safetensors"),
     ("/a", "00003", "copy or download")),
    ("half a shard of a model", cut("a/model-00003-of-00003.safetensors", 0.5),
     ("/a", "00003", "copy or download")),
    ("a long header in a model", long_header("a/model-00003-of-00003.safetensors"),
     ("/a", "00003", "copy or download")),
    ("an index names an absent file", put(f"a/{INDEX}", f"weight_map {WEIGHT}", "x.safetensors"),
     ("/a", WEIGHT, "x.safetensors")),
    ("a weight of another shape", resize("a", WEIGHT, 31), (WEIGHT, "[31, 32]", "same shapes")),
    ("another vocabulary", each(resize("a", "model.embed_tokens.weight", 97),
                                resize("a", "lm_head.weight", 97)),
     ("[97, 32]", "tokenizer: {source: base}")),
    ("another base", poison(7.0), (WEIGHT, "another model or revision", "calibrate this one")),
    ("NaN in the base", poison(float("nan")), (WEIGHT, "another model or revision")),
]  # fmt: skip
"""Models that are refused by ``mergekit-yaml`` with a method of ours."""

MERGEKIT: list[Case] = [
    ("no config.json", remove("base/config.json"), ()),
    ("config.json of no JSON", write("base/config.json", "{]"), ()),
    ("no such model", model_is("{}/bsae"), ()),
    ("two revisions", model_is("org/name@a@b"), ()),
    ("an index of no JSON", write(BASE_INDEX, "{"), ()),
    ("more layers", put("base/config.json", "num_hidden_layers", 3), ()),
    ("no shards and no index", lambda scene: [
        one.unlink() for one in (scene / "base").glob("model*")], ()),
]  # fmt: skip
"""mergekit ends these with a traceback of its own before it plans; it writes nothing either."""
