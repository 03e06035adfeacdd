"""Keys that nothing reads: mergekit passes over them without a word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_arm.calibration.from_config import SECTION
from mergekit_arm.checking.document import Document, Place, dotted
from mergekit_arm.checking.findings import Findings
from mergekit_arm.errors import did_you_mean, first_line
from mergekit_arm.merging.keys import unread_keys

NAME = "name"
"""The key that ``mergekit-multi`` reads of each document."""

_SETTING = (
    "must be a number, a word, a list of them (a gradient), or filters such as "
    "[{filter: mlp, value: 0.5}, {value: 1.0}]"
)


def check_duplicates(document: Document, findings: Findings) -> None:
    """Find keys that stand twice in one mapping, of which YAML keeps the last."""
    for place, first in document.duplicates:
        findings.error(place, f"stands twice, first on line {first}, which is lost: remove one")


def check_keys(value: Mapping[str, Any], findings: Findings) -> None:
    """Find keys that no field of mergekit's configuration has, at any depth.

    Keys under ``parameters`` are the method's, and looked at in ``parameters.py``.
    """
    for place, key, known in unread_keys(MergeConfiguration, dict(value), ()):
        if not place and key in (SECTION, NAME):
            continue
        findings.error((*place, key), f"nothing reads this key{remedy(key, known, place)}")


def remedy(key: str, known: list[str], place: Place = ()) -> str:
    """Say what may have been meant by ``key`` at ``place``, where ``known`` keys are read."""
    option = str(key).replace("-", "_")
    if option in MergeOptions.model_fields:
        flag = option.replace("_", "-")
        return f": it is an option of mergekit-yaml, --{flag}"
    if place and key in MergeConfiguration.model_fields:
        return ": it belongs at the top level"
    if not place and key in ("weight", "density", "t", "omega", "activation_stats"):
        return ": it is a parameter, and belongs under parameters"
    return f"{did_you_mean(str(key), known)}; there are: {', '.join(known)}"


def parse(document: Document, findings: Findings) -> MergeConfiguration | None:
    """Return what mergekit makes of the document; None, with findings, where it refuses it."""
    value = document.value
    value = {key: one for key, one in value.items() if key != NAME}
    try:
        return MergeConfiguration.model_validate(value)
    except ValidationError as error:
        seen = set()
        for one in error.errors():
            place = _place(document, one["loc"])
            if place not in seen:
                seen.add(place)
                setting = "parameters" in place[:-1]
                findings.error(place, _SETTING if setting else _said(one, place))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        findings.error(_guilty(document, str(error)), f"mergekit refuses it: {first_line(error)}")
    return None


def _said(error: Any, place: Place) -> str:
    if error["type"] == "missing":
        return f"{error['loc'][-1]} is missing"
    return f"mergekit refuses it: {error['msg']}" + ("" if place else f" ({dotted(error['loc'])})")


def _place(document: Document, loc: tuple[str | int, ...]) -> Place:
    """Return how far the document goes along a place of pydantic's."""
    place: Place = ()
    for part in loc:
        if (*place, part) not in document.lines:
            break
        place = (*place, part)
    return place


def _guilty(document: Document, message: str) -> Place:
    """Return the place of the value that a message without a place quotes."""
    found = re.search(r"(?:parse|@:) (.+)$", message)
    for place, value in document.leaves():
        if found and str(value) == found[1]:
            return place
    return ()
