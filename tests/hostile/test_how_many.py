"""The tables are as long as is promised, and no two of their lines are one."""

from __future__ import annotations

from tests.hostile import models_and_statistics as stored
from tests.hostile.test_configurations import FILES, MERGES, SEARCHES, STREAMS
from tests.hostile.test_data import DATA
from tests.hostile.test_flags import FLAGS
from tests.hostile.test_imatrix import IMATRICES

ROOMS = {
    "statistics and their indexes": stored.STATISTICS,
    "models": stored.MODELS,
    "models that are merged": stored.MERGED,
    "data": DATA,
    "flags": FLAGS,
    "importance matrices": IMATRICES,
    "files of YAML": FILES,
    "streams": STREAMS,
    "searches": SEARCHES,
    "merges": MERGES,
}


def test_the_tables_are_not_short() -> None:
    assert sum(map(len, ROOMS.values())) >= 150
    assert min(map(len, ROOMS.values())) >= 9
    for room, cases in ROOMS.items():
        damage = [repr(case[:-1]) for case in cases]
        assert len(set(damage)) == len(damage), room


def test_what_is_said_is_looked_at() -> None:
    silent = [(room, case[0]) for room, cases in ROOMS.items() for case in cases if not case[-1]]
    assert not silent
