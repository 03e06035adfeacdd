"""One calibration from start to end: prepare, measure, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mergekit_arm.calibration.in_memory import measure_in_memory
from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.layerwise.calls import NotWalkable
from mergekit_arm.calibration.layerwise.chain import Chain
from mergekit_arm.calibration.layerwise.walk import measure_by_layer
from mergekit_arm.calibration.layerwise.weights import LayerWeights
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.prepare import Prepared, keep_weights_on_disk, prepare
from mergekit_arm.calibration.processes import Job
from mergekit_arm.calibration.records import collect_results
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.calibration.running.session import (
    DryRun,
    ProgressReport,
    Reports,
    Session,
    StageReport,
    interruptible,
)
from mergekit_arm.calibration.sums.hooks import NotFinite
from mergekit_arm.calibration.sums.sites import chosen_kinds
from mergekit_arm.calibration.sums.totals import MeasuredSite
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.errors import Failure, first_line
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import Metadata, ModelRecord
from mergekit_arm.statistics.write import write_statistics

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate"]

_RECORDED_VERSIONS = ("mergekit-arm", "mergekit", "torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class CalibrationResult:
    """What was written, for reports."""

    out: Path
    metadata: Metadata
    corpus: Corpus
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it; what the directory holds besides, ``inspect --json`` says."""
        metadata, data = self.metadata, self.metadata.data
        measured = sum(1 for weight in metadata.weights.values() if weight.site)
        return {
            "out": str(self.out),
            "model": metadata.model.reference,
            "dataset": data.dataset,
            "sequences": data.sequences,
            "tokens": data.tokens,
            "weights": len(metadata.weights),
            "measured": measured,
            "inputs": len(metadata.sites),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Sums:
    """What the passes through the model have added up to."""

    coverage: Coverage
    """Which tensor reads which of the sites, or why none."""
    sites: list[MeasuredSite]
    """Of all processes together; on the first process only."""


def calibrate(
    options: CalibrationOptions,
    progress: ProgressReport | None = None,
    say: Callable[[str], None] | None = None,
    preflight: Callable[[Preflight], None] | None = None,
    stage: StageReport | None = None,
) -> CalibrationResult | None:
    """Measure ``options.model`` and write a statistics directory to ``options.out``.

    Holds the model, one batch of activations and one set of sums per site. Progress is saved in
    ``OUT.partial``; called again, a run that was stopped continues from there. Under
    ``torchrun`` every process calls this.

    Args:
        options: what the command line can say.
        progress: called after every batch with tokens done and tokens in all.
        say: receives one-line notes for the user.
        preflight: receives the estimate, once one block has gone through.
        stage: called where other work than passing tokens begins, and on its way.

    Returns:
        What was written; None after a dry run, and on all processes but the first.

    Raises:
        InputError: anything that cannot work, found before the first forward pass.
        Failure: a NaN or an infinity in an activation, too little memory for a single block, or
            a signal, another process's death or a full disk that ended the run; progress is
            saved then.
    """
    with Job() as job, interruptible(), ExitStack() as temporary:
        reports = Reports.of(say, progress, preflight, stage) if job.main else Reports.of()
        try:
            prepared = prepare(options, job, reports, temporary)
            sums = measure(prepared)
            return write(prepared, sums)
        except DryRun:
            return None


def measure(prepared: Prepared) -> Sums:
    """Pass the corpus through the model, in the way that the options ask for.

    Raises:
        Failure: as ``calibrate`` does.
        DryRun: only the preflight was wanted.
    """
    session = prepared.session
    try:
        with _saved_outlives_the_disk(session):
            return _measure_as_asked(prepared)
    except (NotFinite, DryRun):
        session.progress.discard()  # nobody will want to continue this one
        raise


def write(prepared: Prepared, sums: Sums) -> CalibrationResult | None:
    """Write the statistics directory on the first process, and remove the saved progress.

    Returns:
        What was written; None on all processes but the first.
    """
    session, result = prepared.session, None
    options, coverage = session.options, sums.coverage
    if session.job.main:
        session.reports.stage("Writing the statistics", 0, 0)
        out = Path(options.out)
        kinds = chosen_kinds(options)
        results = collect_results(coverage, sums.sites, session.corpus.rows, kinds)
        for kind in kinds:
            for note in kind.notes(results.sites.values()):
                session.reports.say(note)
        metadata = Metadata(
            model=ModelRecord(
                reference=options.model,
                revision=prepared.source.commit,
                architecture=coverage.architecture,
                content_hash=coverage.content_hash(),
            ),
            data=prepared.data,
            settings=prepared.settings,
            versions={package: version(package) for package in _RECORDED_VERSIONS},
            sites=results.sites,
            weights=results.weights,
            converted=results.converted,
            aliases=results.aliases,
        )
        card = statistics_card(metadata, out.name)
        with _saved_outlives_the_disk(session):
            write_statistics(out, metadata, results.tensors, card, force=options.force)
        result = CalibrationResult(out, metadata, session.corpus, session.seconds)
    session.job.wait("written")
    session.progress.discard()
    return result


def _measure_as_asked(prepared: Prepared) -> Sums:
    session = prepared.session
    if not session.options.low_memory:
        return _measure_whole(prepared)
    if not _was_offloaded(session):
        try:
            return _measure_by_layer(prepared)
        except NotWalkable as reason:
            session.reports.say(
                f"{prepared.coverage.architecture} cannot be walked layer by layer: {reason}. "
                "Its weights stay on the disk instead (accelerate's offload) and are read "
                "for every batch, which takes longer."
            )
            session.progress.discard()
    return _measure_whole(keep_weights_on_disk(prepared))


@contextmanager
def _saved_outlives_the_disk(session: Session) -> Iterator[None]:
    """Let an error of the disk, such as one that is full, end the run and not what is saved.

    Raises:
        Failure: with what the system says.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Failure(f"{first_line(error)}; {session.saved_note()}") from error


def _measure_whole(prepared: Prepared) -> Sums:
    """Measure with the whole model at hand, block after block."""
    session, coverage = prepared.session, prepared.coverage
    sites = measure_in_memory(prepared.model, coverage, prepared.device, session)
    return Sums(coverage, sites)


def _measure_by_layer(prepared: Prepared) -> Sums:
    """Measure with one layer's weights at a time.

    Raises:
        NotWalkable: the model or the data do not allow it.
    """
    if prepared.session.corpus.extras:
        raise NotWalkable("the data has images or audio beside the text")
    model, device = prepared.model, prepared.device
    weights = LayerWeights(model, prepared.checkpoint, device, prepared.dtype)
    chain = Chain(model, weights, device)
    budget = prepared.hidden_budget
    sites = measure_by_layer(chain, prepared.coverage, device, prepared.session, budget=budget)
    prepared.coverage.settle()
    return Sums(prepared.coverage, sites)


def _was_offloaded(session: Session) -> bool:
    """Say whether an earlier run of the same command found that the model cannot be walked.

    One process may have been stopped before it saved anything, or before it knew: what any of
    them has found goes for all, which must do the same.
    """
    position = session.progress.position()
    walked = position is None or "stage" in position
    offloaded = "offload" in session.job.gather("way", "walk" if walked else "offload")
    if offloaded and walked:
        session.progress.discard()  # of no use to the others' way
    return offloaded
