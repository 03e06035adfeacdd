"""The two formats of importance matrices that llama.cpp writes.

GGUF, since 2025: of each weight ``<weight>.in_sum2``, Σx² over the tokens, (experts, channels)
float32, and ``<weight>.counts``, the tokens, (experts, 1) float32. Some writers add
``<weight>.in_sumabs``, Σ|x|. Before that ``.dat``: of each weight the mean of x² times a number of
chunks, and that number; a row of ones stands for an expert that saw nothing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import replacement

SQUARES = ".in_sum2"
MAGNITUDES = ".in_sumabs"
COUNTS = ".counts"
_MAGIC = b"GGUF"
_MOST = 1 << 20
"""More entries, or bytes of a name, than a whole file of the old format has."""


_MOST_TOKENS = 1 << 53
"""Above, float64 does not count."""


@dataclass(frozen=True)
class Entry:
    """What is known of the inputs of one weight, or of one stack of experts."""

    squares: NDArray[np.float64]
    """Σx², (experts, channels); one row where there are no experts."""
    counts: NDArray[np.float64]
    """(experts,): tokens, or chunks in the old format."""
    magnitudes: NDArray[np.float64] | None = None
    """Σ|x|, as ``squares``; None where the file has none."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """All of a file."""

    entries: Mapping[str, Entry]
    """By llama.cpp's name of the weight, such as ``blk.0.ffn_down.weight``."""
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = 0
    """Tokens; 0 in the old format, which counts in chunks."""


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file of either format; suffixes that nobody here knows are passed over.

    Raises:
        InputError: it is no importance matrix, or damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                found = _read_gguf(path)
            else:  # mapped, since what is no importance matrix may be a model
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    found = _read_dat(content)
        _check(found)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an importance matrix") from error
    except (ValueError, KeyError, IndexError, RecursionError, struct.error) as error:
        raise InputError(f"{path} is no importance matrix ({first_line(error)})") from error
    return found


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write GGUF as ``llama-imatrix`` does; the file is complete or absent."""
    gguf = load_gguf()
    with replacement(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, arch="imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(matrix.datasets) or ["unknown"])
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
        for name, entry in sorted(matrix.entries.items()):
            values = {SQUARES: entry.squares, COUNTS: entry.counts[:, None]}
            if entry.magnitudes is not None:
                values[MAGNITUDES] = entry.magnitudes
            for suffix, value in values.items():
                writer.add_tensor(name + suffix, np.ascontiguousarray(value, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_gguf() -> Any:
    """Return the package ``gguf``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf  # an optional extra
    except ImportError as error:
        raise InputError(
            "importance matrices need the package gguf: pip install 'mergekit-arm[imatrix]'"
        ) from error
    return gguf


def _bounded(reader: type[Any]) -> type[Any]:
    """Return gguf's reader, made to stop where the file does.

    By itself it reads nothing there and goes on, until it has counted to a damaged length.
    """

    class Bounded(reader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it is truncated")
            return super()._get(offset, dtype, count, *rest, **named)

    return Bounded


def _read_gguf(path: Path) -> ImportanceMatrix:
    reader = _bounded(load_gguf().GGUFReader)(path)

    def words(key: str) -> list[str]:
        found = reader.fields.get(key)
        return [] if found is None else [bytes(found.parts[i]).decode() for i in found.data]

    def number(key: str) -> int:
        found = reader.fields.get(key)
        return 0 if found is None else int(found.parts[found.data[0]][0])

    if words("general.type") != ["imatrix"]:
        raise ValueError(f"general.type is {', '.join(words('general.type')) or 'not set'}")
    with np.errstate(invalid="ignore"):  # what is no number is refused by name, once
        tensors = {one.name: np.array(one.data, dtype=np.float64) for one in reader.tensors}
    entries = {}
    for name, squares in tensors.items():
        if not name.endswith(SQUARES):
            continue
        weight = name.removesuffix(SQUARES)
        squares = squares.reshape(-1, squares.shape[-1])
        magnitudes = tensors.get(weight + MAGNITUDES)
        if magnitudes is not None:
            magnitudes = magnitudes.reshape(squares.shape)
        entries[weight] = Entry(squares, tensors[weight + COUNTS].reshape(-1), magnitudes)
    return ImportanceMatrix(
        entries,
        words("imatrix.datasets"),
        number("imatrix.chunk_count"),
        number("imatrix.chunk_size"),
    )


def _read_dat(content: bytes | mmap.mmap) -> ImportanceMatrix:
    place = 0

    def number(most: int = _MOST) -> int:
        nonlocal place
        (found,) = struct.unpack_from("<i", content, place)
        place += 4
        if not 0 <= found <= most:
            raise ValueError(f"{found} is no length")
        return int(found)

    def take(count: int) -> bytes:
        nonlocal place
        if place + count > len(content):
            raise ValueError("it is truncated")
        place += count
        return content[place - count : place]

    entries = {}
    for _ in range(number()):
        name = take(number()).decode()
        calls = number(1 << 30)
        with np.errstate(invalid="ignore"):  # as above
            values = np.frombuffer(take(4 * number(1 << 30)), dtype="<f4").astype(np.float64)
        entries[name] = Entry(values[None, :], np.array([float(calls)]))
    chunks, datasets = 0, list[str]()
    if place < len(content):  # the oldest files end here
        chunks = number(1 << 30)
        datasets = [take(number()).decode()]
    return ImportanceMatrix(entries, datasets, chunks)


def _check(matrix: ImportanceMatrix) -> None:
    if not matrix.entries:
        raise ValueError("it is of no weight")
    for name, entry in matrix.entries.items():
        values = [entry.squares, entry.counts]
        values += [] if entry.magnitudes is None else [entry.magnitudes]
        if not all(np.isfinite(one).all() and (one >= 0).all() for one in values):
            raise ValueError(f"{name} has values that are no sums")
        if (entry.counts > _MOST_TOKENS).any():
            raise ValueError(f"{name} has counts that nobody counts to")
        if len(entry.squares) != len(entry.counts):
            raise ValueError(f"{name} has {len(entry.squares)} rows and {len(entry.counts)} counts")
