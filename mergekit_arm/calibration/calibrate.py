"""One calibration from start to end: check, load, measure, write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mergekit_arm.calibration.in_memory import measure
from mergekit_arm.calibration.inputs.coverage import Coverage, cover_checkpoint
from mergekit_arm.calibration.inputs.merge_names import add_asked_names
from mergekit_arm.calibration.inputs.readings import plan_readings
from mergekit_arm.calibration.layerwise.calls import NotWalkable
from mergekit_arm.calibration.layerwise.chain import Chain
from mergekit_arm.calibration.layerwise.walk import measure_by_layer
from mergekit_arm.calibration.layerwise.weights import LayerWeights
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.prepare import check_placement
from mergekit_arm.calibration.processes import Job
from mergekit_arm.calibration.reading import read_data
from mergekit_arm.calibration.records import (
    collect_results,
    data_record,
    fingerprint,
    settings_record,
)
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.calibration.running.progress import Progress
from mergekit_arm.calibration.running.session import DryRun, ProgressReport, Reports, Session
from mergekit_arm.calibration.sums.hooks import NotFinite
from mergekit_arm.calibration.sums.totals import MeasuredSite, add_up
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.models.checkpoint import BriefLoader, fetch_checkpoint
from mergekit_arm.models.loading import (
    Source,
    check_weights_fit,
    choose_device,
    choose_dtype,
    empty_model,
    find_model,
    load_model,
    open_checkpoint,
)
from mergekit_arm.models.placement import offload, spread
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import Metadata, ModelRecord
from mergekit_arm.statistics.kinds.subspace import sketch_matrices
from mergekit_arm.statistics.write import check_destination, write_statistics
from mergekit_arm.units import parse_duration, parse_size

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate"]

_SMALLEST_BUDGET = 256_000_000  # bytes of hidden states

_RECORDED_VERSIONS = ("mergekit-arm", "mergekit", "torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class CalibrationResult:
    """What was written, for reports."""

    out: Path
    metadata: Metadata
    corpus: Corpus
    seconds: float


def calibrate(
    options: CalibrationOptions,
    progress: ProgressReport | None = None,
    say: Callable[[str], None] | None = None,
    preflight: Callable[[Preflight], None] | None = None,
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

    Returns:
        What was written; None after a dry run, and on all processes but the first.

    Raises:
        InputError: anything that cannot work, found before the first forward pass.
        Failure: a NaN or an infinity in an activation, too little memory for a single block, or
            a signal or another process's death that ended the run; progress is saved then.
    """
    with Job() as job:
        if not job.main:
            progress = say = preflight = None
        reports = Reports(
            say or (lambda note: None),
            progress or (lambda done, total: None),
            preflight or (lambda estimate: None),
        )
        try:
            return _calibrate(options, job, reports)
        except DryRun:
            return None


def _calibrate(options: CalibrationOptions, job: Job, reports: Reports) -> CalibrationResult | None:
    out = Path(options.out)
    check_destination(out, options.force)
    check_placement(options, job)
    every = parse_duration(options.save_every)
    budget = None if options.activation_budget == "auto" else parse_size(options.activation_budget)
    device = job.device(choose_device(options.device))
    dtype = choose_dtype(options.dtype, device)
    with ExitStack() as stack:
        # A merged adapter's cache is written once and then read.
        with job.first_here("model"):
            source = stack.enter_context(
                find_model(
                    options.model,
                    trust_remote_code=options.trust_remote_code,
                    lora_cache=options.lora_merge_cache,
                )
            )
        corpus, tokenizer = read_data(options, source, reports.say)
        fetch_checkpoint(source)
        checkpoint = BriefLoader(open_checkpoint(source).index)
        if options.low_memory:
            model = empty_model(source, dtype)
        else:
            if options.device_map is None:
                with job.first_here("room"):  # before anyone here has taken any
                    sharing = job.sharing(device)
                    if sharing == 1 or job.local_process == 0:
                        size = checkpoint.size(dtype)
                        # What is no wider than its file is mapped from it, once for all.
                        copies = sharing if size > checkpoint.bytes_on_disk() else 1
                        check_weights_fit(size, device, dtype, options.model, copies)
                placement = None
            else:
                placement = spread(options.device_map, stack, out)
            model = load_model(source, device, dtype, placement)
        coverage = cover_checkpoint(model, checkpoint, plan_readings(model))
        add_asked_names(coverage, model, checkpoint, source.config)
        data = data_record(options, corpus, tokenizer)
        settings = settings_record(options, device, dtype)
        facts = fingerprint(data, settings, coverage.content_hash())
        facts["batch size"] = str(options.batch_size or "automatic")
        facts["low memory"] = "on" if options.low_memory else "off"
        job.agree(facts)
        saved = Progress(
            out,
            facts,
            every=every,
            process=job.process,
            processes=job.processes,
            suffix="dry-run" if options.dry_run else "partial",
        )
        saved.check(options.force)
        job.wait("ready")  # what one process refuses, no other has begun
        session = Session(options, corpus, job, saved, reports)
        try:
            coverage, measured = _measure(
                session, source, model, checkpoint, coverage, device, dtype, stack, budget
            )
        except (NotFinite, DryRun):
            saved.discard()  # nobody will want to continue this one
            raise
        result = None
        if job.main:
            results = collect_results(coverage, measured, corpus.rows)
            metadata = Metadata(
                model=ModelRecord(
                    reference=options.model,
                    revision=source.commit,
                    architecture=type(model).__name__,
                    content_hash=coverage.content_hash(),
                ),
                data=data,
                settings=settings,
                versions={package: version(package) for package in _RECORDED_VERSIONS},
                sites=results.sites,
                weights=results.weights,
                converted=results.converted,
                aliases=results.aliases,
            )
            card = statistics_card(metadata, out.name)
            tensors = results.tensors | sketch_matrices(results.tensors, options.seed)
            write_statistics(out, metadata, tensors, card, force=options.force)
            result = CalibrationResult(out, metadata, corpus, session.seconds)
        job.wait("written")
        saved.discard()
    return result


def _measure(
    session: Session,
    source: Source,
    model: PreTrainedModel,
    checkpoint: BriefLoader,
    coverage: Coverage,
    device: torch.device,
    dtype: torch.dtype,
    stack: ExitStack,
    budget: int | None,
) -> tuple[Coverage, list[MeasuredSite]]:
    """Measure in the way that the options ask for.

    Returns the coverage, settled, and the sites on the first process.
    """
    options, job = session.options, session.job
    earlier = session.progress.position()
    if options.low_memory and (earlier is None or "stage" in earlier):
        if budget is None:
            budget = max(_SMALLEST_BUDGET, checkpoint.bytes_on_disk() // 25)
        try:
            if session.corpus.extras:
                raise NotWalkable("the data has images or audio beside the text")
            weights = LayerWeights(model, checkpoint, device, dtype)
            chain = Chain(model, weights, device)
            measured = measure_by_layer(chain, coverage, device, session, budget=budget)
            coverage.settle()
            return coverage, measured
        except NotWalkable as reason:
            session.reports.say(
                f"{type(model).__name__} cannot be walked layer by layer: {reason}. Its weights "
                "stay on the disk instead (accelerate's offload) and are read for every batch, "
                "which takes longer."
            )
            session.progress.discard()
    if options.low_memory:
        placement = offload(device, stack, Path(options.out))
        model = load_model(source, device, dtype, placement)
        coverage = cover_checkpoint(model, checkpoint, plan_readings(model))
        add_asked_names(coverage, model, checkpoint, source.config)
    sites = measure(model, coverage, device, session)
    with torch.inference_mode():
        subspaces = "subspace" in options.statistics
        return coverage, add_up(sites, job, device, subspaces=subspaces)
