"""Importance matrices that are none, are damaged, or are of another model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergekit_arm.cli.main import cli
from tests.hostile.refusals import assert_refused, run
from tests.imatrix.test_imatrix import sums, write_dat, write_gguf

Case = tuple[str, Callable[[Path], object], tuple[str, ...]]
Arrays = dict[str, np.ndarray]

NONE = ("x.imatrix is no importance matrix",)
DOWN = "blk.0.ffn_down.weight"


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def gguf(change: Callable[[Arrays], object], kind: str = "imatrix") -> Callable[[Path], object]:
    """Write a good one, changed before."""

    def make(path: Path) -> None:
        tensors = sums()
        change(tensors)
        write_gguf(path, tensors, kind)

    return make


def dat(**entries: tuple[np.ndarray, int]) -> Callable[[Path], object]:
    return lambda path: write_dat(path, {DOWN: (np.ones(48), 3), **entries})


def bytes_of(
    make: Callable[[Path], object], change: Callable[[bytes], bytes]
) -> Callable[[Path], object]:
    """Write a file, and change its bytes."""

    def again(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return again


def put(place: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda found: found[:place] + data + found[place + len(data) :]


def nothing(_: Arrays) -> None:
    pass


IMATRICES: list[Case] = [
    ("no file", nothing, ("x.imatrix", "No such file", "name an importance matrix")),
    ("a directory", Path.mkdir, ("x.imatrix", "directory", "name an importance matrix")),
    ("nothing in it", content(b""), NONE),
    ("three bytes", content(b"GGU"), NONE),
    ("no more than its magic", content(b"GGUF"), NONE),
    ("text", content(b"no matrix at all"), NONE),
    ("zeros", content(bytes(4000)), NONE),
    ("ones", content(b"\xff" * 4000), NONE),
    ("half of it", bytes_of(gguf(nothing), lambda found: found[: len(found) // 2]), NONE),
    ("the end missing", bytes_of(gguf(nothing), lambda found: found[:-200]), NONE),
    ("another version", bytes_of(gguf(nothing), put(4, struct.pack("<I", 99))), NONE),
    ("more tensors than bytes", bytes_of(gguf(nothing), put(8, b"\xff" * 7)), NONE),
    ("more fields than bytes", bytes_of(gguf(nothing), put(16, b"\xff" * 7)), NONE),
    ("a name longer than the file", bytes_of(gguf(nothing), put(24, b"\xff" * 7)), NONE),
    ("a model", gguf(nothing, "model"), (*NONE, "general.type is model")),
    ("of no weight", gguf(dict.clear), NONE),
    ("no counts", gguf(lambda t: t.pop(f"{DOWN}.counts")), (*NONE, f"{DOWN}.counts")),
    ("NaN", gguf(lambda t: t[f"{DOWN}.in_sum2"].fill(np.nan)), (*NONE, "no sums")),
    ("infinity", gguf(lambda t: t[f"{DOWN}.in_sum2"].fill(np.inf)), (*NONE, "no sums")),
    ("below 0", gguf(lambda t: t[f"{DOWN}.in_sum2"].fill(-1)), (*NONE, "no sums")),
    ("counts below 0", gguf(lambda t: t[f"{DOWN}.counts"].fill(-1)), (*NONE, "no sums")),
    ("counts beyond counting", gguf(lambda t: t[f"{DOWN}.counts"].fill(1e30)), (*NONE, "counts")),
    ("two counts for one row",
     gguf(lambda t: t.update({f"{DOWN}.counts": np.ones((2, 1))})), (*NONE, "1 rows and 2")),
    ("another width", gguf(lambda t: t.update({f"{DOWN}.in_sum2": np.ones((1, 99))})),
     ("do not belong together", "1 × 99")),
    ("|x| of another width", gguf(lambda t: t.update({f"{DOWN}.in_sumabs": np.ones((1, 3))})),
     NONE),
    ("|x| below 0", gguf(lambda t: t.update({f"{DOWN}.in_sumabs": -np.ones((1, 48))})),
     (*NONE, "no sums")),
    ("another model", gguf(lambda t: [
        t.update({name.replace("blk.", "blk.7"): t.pop(name)}) for name in list(t)]),
     ("is of none of ./base's weights", "blk.7")),
    ("half an old one", bytes_of(dat(), lambda found: found[:100]), NONE),
    ("an old one of minus one weight", bytes_of(dat(), put(0, b"\xff" * 4)), NONE),
    ("an old one with a huge name", bytes_of(dat(), put(4, b"\xff\xff\xff\x7f")), NONE),
    ("an old one with a name of bytes", bytes_of(dat(), put(8, b"\xff\xfe")), NONE),
    ("an old one with a huge width",
     bytes_of(dat(), put(8 + len(DOWN) + 4, b"\xff\xff\xff\x3f")), NONE),
    ("an old one of nothing", content(struct.pack("<i", 0)), (*NONE, "of no weight")),
]  # fmt: skip


@pytest.mark.parametrize("case", IMATRICES, ids=[case[0] for case in IMATRICES])
def test_imatrices(case: Case, here: Path) -> None:
    _, make, said = case
    if make is not nothing:
        make(here / "x.imatrix")
    assert_refused(run(here, cli, "import-imatrix", "x.imatrix", "./base", "./out"), said)


def test_what_is_whole_is_taken(here: Path) -> None:
    write_gguf(here / "x.imatrix", sums())
    done = run(here, cli, "import-imatrix", "x.imatrix", "./base", "./out")
    assert done.code == 0, done.output
