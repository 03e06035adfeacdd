"""Command lines that are wrong: what no command takes, and what would replace something."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import yaml

from mergekit_arm.cli.main import cli
from tests.hostile.refusals import assert_refused, run
from tests.support import streams, tuning

Case = tuple[str, tuple[str, ...]]

CALIBRATE = "calibrate ./base ./out --dataset ./tokens.jsonl"
FLAGS: list[Case] = [
    ("calibarte ./base ./out", ("'calibarte'", "did you mean 'calibrate'")),
    ("--verbos calibrate", ("--verbos", "--verbose")),
    ("calibrate", ("MODEL",)),
    ("calibrate ./base", ("OUT",)),
    (f"{CALIBRATE} more", ("more",)),
    (f"{CALIBRATE} --sampels 3", ("--sampels", "--samples")),
    (f"{CALIBRATE} --samples", ("--samples", "requires an argument")),
    (f"{CALIBRATE} --samples 0", ("--samples", "0")),
    (f"{CALIBRATE} --samples many", ("--samples", "many")),
    (f"{CALIBRATE} --samples 1e3", ("--samples", "1e3")),
    (f"{CALIBRATE} --sequence-length -1", ("--sequence-length", "-1")),
    (f"{CALIBRATE} --batch-size 0", ("--batch-size", "0")),
    (f"{CALIBRATE} --seed -1", ("--seed", "-1")),
    (f"{CALIBRATE} --rank 0", ("--rank", "0")),
    (f"{CALIBRATE} --energy 0", ("--energy", "0")),
    (f"{CALIBRATE} --energy 1.5", ("--energy", "1.5")),
    (f"{CALIBRATE} --energy nan", ("--energy", "nan")),
    (f"{CALIBRATE} --dtype int8", ("--dtype", "bfloat16")),
    (f"{CALIBRATE} --recipe mia", ("--recipe", "aim")),
    (f"{CALIBRATE} --recipe aim --max-tokens-per-row 4", ("--recipe", "--max-tokens-per-row")),
    (f"{CALIBRATE} --device cuda:99", ("cuda:99", "--device")),
    (f"{CALIBRATE} --device gpu", ("gpu", "--device")),
    (f"{CALIBRATE} --device-map all", ("--device-map", "balanced")),
    (f"{CALIBRATE} --part 3/2", ("3/2", "write 1/4")),
    (f"{CALIBRATE} --part 0/2", ("0/2", "write 1/4")),
    (f"{CALIBRATE} --part half", ("half", "write 1/4")),
    (f"{CALIBRATE} --activation-budget lots", ("lots", "write 512MB")),
    (f"{CALIBRATE} --save-every soon", ("soon", "write 90s")),
    (f"{CALIBRATE} --save-every -5m", ("-5m", "write 90s")),
    (f"{CALIBRATE} --statistics importence", ("importence", "did you mean 'importance'")),
    (f"{CALIBRATE} --statistics ''", ("statistic",)),
    (f"{CALIBRATE} --tokenizer ./nowhere", ("./nowhere", "--tokenizer")),
    (f"{CALIBRATE} --tokenizer ./stats", ("./stats", "--tokenizer")),
    (f"{CALIBRATE} --chat-template ./no.jinja", ("./no.jinja", "--chat-template")),
    (f"{CALIBRATE} --subset a --split test", ("--split test", "leave it out")),
    (f"{CALIBRATE} --config merge.yml", ("--config", "leave MODEL out")),
    ("calibrate ./base ./stats --dataset ./tokens.jsonl", ("stats exists", "--force")),
    ("calibrate ./base ./a --dataset ./tokens.jsonl --force", ("a exists", "another name")),
    ("calibrate ./base ./tokens.jsonl --dataset ./tokens.jsonl", ("tokens.jsonl is a file",)),
    ("calibrate ./base ./tokens.jsonl/x --dataset ./tokens.jsonl", ("cannot be written",)),
    ("calibrate ./base /proc/no/x --dataset ./tokens.jsonl", ("cannot be written", "another OUT")),
    ("calibrate ./bsae ./out --dataset ./tokens.jsonl", ("./bsae", "no such directory")),
    ("calibrate ./base+./lora ./out --dataset ./tokens.jsonl", ("./lora",)),
    ("calibrate ./stats ./out --dataset ./tokens.jsonl", ("./stats", "config.json")),
    ("calibrate '' ./out --dataset ./tokens.jsonl", ("model : ", "expected a local directory")),
    ("calibrate a+b+c ./out --dataset ./tokens.jsonl", ("a+b+c",)),
    ("combine ./stats", ("DIRECTORY",)),
    ("combine ./stats ./out", ("name two or more",)),
    ("combine ./stats ./stats ./out", ("stats",)),
    ("combine ./stats ./nowhere ./out", ("./nowhere", "no such directory")),
    ("combine ./stats ./stats ./base", ("base exists", "another name")),
    ("inspect", ("STATISTICS",)),
    ("inspect ./nowhere", ("./nowhere", "no such directory")),
    ("inspect ./base", ("no statistics directory",)),
    ("inspect ./stats --tensor lm_haed.weight", ("lm_haed.weight", "did you mean")),
    ("inspect ./stats ./stats --tensor lm_head.weight", ("--tensor", "leave OTHER out")),
    ("inspect ./stats ./nowhere", ("./nowhere", "no such directory")),
    ("push ./stats", ("ORG/NAME",)),
    ("push ./stats name --dry-run", ("'name'", "org/name")),
    ("push ./stats a/b/c --dry-run", ("'a/b/c'", "org/name")),
    ("push ./stats 'a b/c' --dry-run", ("'a b/c'", "org/name")),
    ("push ./nowhere org/name --dry-run", ("nowhere", "no such directory")),
    ("push ./base org/name --dry-run", ("no statistics directory",)),
    ("export-imatrix ./stats ./a", ("is a directory",)),
    ("export-imatrix ./nowhere ./out", ("./nowhere", "no such directory")),
    ("export-imatrix ./stats ./tokens.jsonl", ("tokens.jsonl", "--force")),
    ("export-imatrix ./stats ./tokens.jsonl/x", ("cannot be written",)),
    ("stream stream.yml ./out --keep none", ("--keep", "best")),
    ("stream stream.yml ./out --poll 3", ("--poll", "--watch")),
    ("stream stream.yml ./out --watch --poll nan", ("--poll", "finite")),
    ("stream stream.yml ./out --watch --poll 0", ("--poll", "0")),
    ("stream stream.yml ./out --device cuda:99", ("cuda:99", "--device")),
    ("stream stream.yml ./base", ("base", "holds no stream")),
    ("stream stream.yml ./tokens.jsonl", ("tokens.jsonl is a file", "name a directory")),
    ("stream stream.yml /proc/no/x", ("/proc/no/x", "give another OUT")),
    ("stream nothing.yml ./out", ("nothing.yml", "No such file")),
    ("tune tune.yml ./out --trials 0", ("--trials", "0")),
    ("tune tune.yml ./out --timeout soon", ("soon", "write 90s")),
    ("tune tune.yml ./out --sampler bayes", ("--sampler", "tpe")),
    ("tune tune.yml ./out --device cuda:99", ("cuda:99", "--device")),
    ("tune tune.yml ./base", ("base exists and holds no search", "give another OUT")),
    ("tune tune.yml ./streamed --force", ("streamed", "holds no search", "another OUT")),
    ("tune tune.yml ./tokens.jsonl", ("tokens.jsonl is a file", "name a directory")),
    ("tune tune.yml /proc/no/x", ("/proc/no/x", "give another OUT")),
    ("tune nothing.yml ./out", ("nothing.yml", "No such file")),
    ("check nothing.yml", ("nothing.yml", "No such file")),
    ("check merge.yml --out /proc/no/x", ("/proc/no/x", "cannot be written", "--out")),
    ("demo --out ./base", ("base is not empty", "--out")),
    ("demo --out ./tokens.jsonl", ("tokens.jsonl is a file", "--out")),
    ("demo --seed x", ("--seed", "x")),
]
"""A command line, and what the line says."""


@pytest.mark.parametrize(("line", "said"), FLAGS, ids=[line for line, _ in FLAGS])
def test_flags(line: str, said: tuple[str, ...], here: Path) -> None:
    streams.write_run(here / "streamed", (1,))
    documents = {
        "merge.yml": {"merge_method": "passthrough", "models": [{"model": "./a"}]},
        "stream.yml": streams.config(here / "streamed"),
        "tune.yml": tuning.config(
            here, {"evaluation": {"one": {"dataset": str(here / "tokens.jsonl")}}}
        ),
    }
    for name, document in documents.items():
        (here / name).write_text(yaml.safe_dump(document))
    assert os.getcwd() == str(here)
    assert_refused(run(here, cli, *shlex.split(line)), said)
