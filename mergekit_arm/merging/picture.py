"""The pictures that a stream and a search leave, as files."""

from __future__ import annotations

import gc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from mergekit_arm.files import write_bytes


def save_drawing(draw: Callable[[], Figure], path: Path) -> None:
    """Replace ``path`` by what ``draw`` draws, and free what that took.

    A figure is some thousand objects that hold each other, and a canvas: Python would keep five
    megabytes of each until it happens to look at all of its objects. What is made while it does
    not look is young afterwards, and looking at the young alone takes no time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        drawn = BytesIO()
        draw().savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    finally:
        if collecting:
            gc.enable()
    gc.collect(0)
    write_bytes(path, drawn.getvalue())
