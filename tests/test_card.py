"""What a card says of paths: nothing of the machine that made it."""

from __future__ import annotations

import pytest

from mergekit_arm.merging.card import name_of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("./eval.sh {model} 2>/home/me/score.log", "eval.sh {model} 2>score.log"),
        ("</home/me/in.txt cat|/opt/x/judge {model}", "<in.txt cat|judge {model}"),
        ("true&&/opt/x/judge {model};/opt/y/end", "true&&judge {model};end"),
        ("judge `/opt/x/where` {model}", "judge `where` {model}"),
        ("org/name+/home/me/adapter", "org/name+adapter"),
        ("a/b and 1/2", "a/b and 1/2"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, said: str) -> None:
    assert name_of(text) == said
