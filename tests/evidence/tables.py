"""``python -m tests.evidence.tables`` writes RESULTS.md from the lines in ``results/``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_arm.merging.card import table
from tests.benchmarks.report import sentence
from tests.evidence.differences import Group, apart, over_runs, spread, tasks_of, volumes_apart
from tests.evidence.front import README, put, tables
from tests.evidence.hypervolume import gains
from tests.evidence.intervals import paired
from tests.evidence.plots import draw
from tests.evidence.sizes import SIZES, Size
from tests.evidence.sweeps import PARTS
from tests.evidence.units import RESULTS, Line, Store

PAGE = Path(__file__).parent / "RESULTS.md"

REFERENCES = {
    "streams": ("100 %", "linear to early"),
    "specialists": ("task_arithmetic", "regmean"),
}
"""What every model of a study is compared with."""

QUANTITIES = ("losses", "exact", "general")
"""Of a line: lists over examples, or marks."""

BEFORE = ("base",)
"""Models that are not compared: they have not learnt."""

_HEAD = """# Results

Written by `python -m tests.evidence.tables` from the lines in [`results/`](results), not by hand.
`python -m tests.evidence` does what is still open; its help says how. Losses are means over
examples of an answer's nats per token, lower is better; *exact* is the share of answers of which
every token is the likeliest after the right ones; *written* the share of answers written right by
greedy decoding, where that was done; *general* the loss on docstrings of the standard library,
which says what was forgotten. Every setting was chosen by the loss on the validation split, with
as many tries for each merge (a best single checkpoint is one of eight, and AIM had a second grid);
all numbers are of the test split. In brackets: the middle 95 % of a
paired bootstrap over examples; a dot follows a difference that may be none. *HV gain* is the
hypervolume that a merge adds to the base and its specialists (`hypervolume.py` says in what space).
"""


def page(folder: Path = RESULTS) -> str:
    """Return RESULTS.md."""
    parts = [_HEAD]
    for study in REFERENCES:
        for size in SIZES.values():
            lines = Store(study, size.name, folder).lines()
            groups = grouped(lines.values())
            if groups:
                title = f"{study}, size {size.name}"
                parts.append(f"## {title}\n\n{_regime(size, lines)}\n")
                if (folder / f"{study}-{size.name}.png").is_file():
                    parts.append(f"![{title}](results/{study}-{size.name}.png)\n")
                parts += [summary(study, some) for some in alike(groups)]
                parts += [_table(study, name, group) for name, group in groups.items()]
                for part in PARTS:
                    if settings := grouped(lines.values(), part):
                        parts.append(swept(f"{title}, {part}", settings))
    return "\n".join(parts)


def alike(groups: dict[str, Group]) -> list[dict[str, Group]]:
    """Return the runs by how many tasks each is about: means over pairs and triples say nothing."""
    counts = sorted({len(tasks_of(name)) for name in groups})
    return [
        {name: group for name, group in groups.items() if len(tasks_of(name)) == count}
        for count in counts
    ]


def front_page(folder: Path = RESULTS) -> str:
    """Return the tables of README.md."""
    found = [grouped(Store(study, "small", folder).lines().values()) for study in REFERENCES]
    return tables(*found)


def grouped(lines: Any, wanted: str = "test") -> dict[str, Group]:
    """Return the lines of one part by run, ``task, seed 0``; written answers stand beside them.

    Raises:
        ValueError: lines of one run that were judged on different data.
    """
    groups: dict[str, Group] = defaultdict(dict)
    written: dict[tuple[str, str], str] = {}
    for line in lines:
        _, _, about, seed, part, label = line["unit"].split("/", 5)
        name = f"{about}, seed {seed}"
        if part == wanted:
            groups[name][label] = dict(line)
        elif part == "generated":
            written[name, label] = line["generated"]
    for name, group in groups.items():
        if len({line["data"] for line in group.values()}) > 1:
            raise ValueError(f"{name}: lines of different data; delete those that are wrong")
        for label, line in group.items():
            line["written"] = written.get((name, label))
    return dict(groups)


def summary(study: str, groups: Mapping[str, Group]) -> str:
    """Return one row for each model: its differences to the references over all runs."""
    references = REFERENCES[study]
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    head = ["model", "runs"]
    for one in references:
        head += [f"loss − {one}", "lower / surely lower / surely higher"]
    head += [f"exact − {references[0]}", f"general − {references[0]}"]
    in_volume = any(gains(group, tasks_of(name)) for name, group in groups.items())
    if in_volume:
        head += [f"HV gain − {references[0]}", "higher"]
    rows = []
    for label in labels:
        if label in BEFORE:
            continue
        cells = [label, str(sum(label in group for group in groups.values()))]
        for reference in references:
            cells += _over_runs(groups, label, reference)
        for quantity in ("exact", "general"):
            cells.append(spread(apart(groups, label, references[0], quantity)))
        if in_volume:
            more = volumes_apart(groups, label, references[0])
            count = f"{sum(value > 0 for value in more)} of {len(more)}"
            same = label == references[0] or not more
            cells += ["", ""] if same else [spread(more), count]
        rows.append(cells)
    many = max(len(tasks_of(name)) for name in groups)
    of = f" of {many} tasks" if many > 1 else ""
    return _markdown(head, rows, f"Means over runs{of} ± their standard deviation.")


def swept(title: str, groups: Mapping[str, Group]) -> str:
    """Return one row for each setting: its differences to the first over all runs."""
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    reference = labels[0]
    rows = []
    for label in labels:
        found = {one: apart(groups, label, reference, one) for one in QUANTITIES}
        cells = [label, str(len(found["losses"]))]
        cells += ["" if label == reference else spread(values) for values in found.values()]
        rows.append([*cells[:3], _over_runs(groups, label, reference)[1], *cells[3:]])
    head = ["one setting changed", "runs", "loss", "lower / surely lower / surely higher"]
    before = (
        "On the validation split, nothing tuned; differences to the first row, means over runs ± "
        "their standard deviation."
    )
    return f"### {title}\n\n" + _markdown([*head, "exact", "general"], rows, before)


def _over_runs(groups: Mapping[str, Group], label: str, reference: str) -> list[str]:
    found = [] if label == reference else over_runs(groups, label, reference)
    if not found:
        return ["", ""]
    lower = sum(one.mean < 0 for one in found)
    surely = sum(one.high < 0 for one in found)
    higher = sum(one.low > 0 for one in found)
    counts = f"{lower} / {surely} / {higher} of {len(found)}"
    return [spread([one.mean for one in found]), counts]


def _table(study: str, name: str, group: Group) -> str:
    references = [one for one in REFERENCES[study] if one in group]
    head = ["model", "settings", "loss", "exact", "written", "general"]
    head += [f"loss − {one}" for one in references]
    volumes = gains(group, tasks_of(name))
    head += ["HV gain"] * bool(volumes)
    rows = []
    for label, line in group.items():
        written = line["written"]
        cells = [
            label,
            _settings(line.get("settings", {})),
            f"{fmean(line['losses']):.3f}",
            _shares(line["exact"], name),
            _shares(written, name) if written else "",
            f"{fmean(line['general']):.3f}",
        ]
        for reference in references:
            same = label == reference or label in BEFORE
            apart = None if same else paired(line["losses"], group[reference]["losses"])
            cells.append(str(apart or ""))
        if volumes:
            cells.append(f"{volumes[label]:.3f}" if label in volumes else "")
        rows.append(cells)
    return f"### {name}\n\n" + _markdown(head, rows)


def _shares(marks: str, name: str) -> str:
    """Return the share of ``1``; of several tasks, each one's."""
    count = name.count("+") + 1
    size = len(marks) // count
    parts = [marks[number * size : (number + 1) * size] for number in range(count)]
    return " · ".join(f"{part.count('1') / size:.3f}" for part in parts)


def _settings(settings: Mapping[str, Any]) -> str:
    hidden = ("activation_stats", "task_stats", "rotation", "energy", "retain", "density")
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in hidden)


def _regime(size: Size, lines: Mapping[str, Line]) -> str:
    machines = {sentence(line["machine"]) for line in lines.values()}
    return (
        f"{size.training} examples, {size.epochs} epochs in batches of {size.batch} "
        f"({size.steps} steps) at a learning rate of {size.learning_rate:g}; {size.validation} "
        f"validation and {size.test} test examples a task. {' '.join(sorted(machines))}"
    )


def _markdown(head: list[str], rows: list[list[str]], before: str = "") -> str:
    return f"{before}\n\n" * bool(before) + f"{table(head, rows)}\n"


def main() -> None:
    """Write the page, README's tables, and a picture for every study that has runs."""
    for study, (reference, _) in REFERENCES.items():
        for size in SIZES:
            groups = grouped(Store(study, size).lines().values())
            if any(reference in group for group in groups.values()):
                draw(f"{study}, size {size}", groups, reference, RESULTS / f"{study}-{size}.png")
    PAGE.write_text(page(), encoding="utf-8")  # it shows the pictures that are there
    README.write_text(put(front_page()), encoding="utf-8")


if __name__ == "__main__":
    main()
