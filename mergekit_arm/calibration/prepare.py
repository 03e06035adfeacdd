"""Everything that is refused before the first forward pass, and what is loaded for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage, cover_checkpoint
from mergekit_arm.calibration.inputs.merge_names import add_asked_names
from mergekit_arm.calibration.inputs.readings import plan_readings
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.processes import Job
from mergekit_arm.calibration.reading import read_data
from mergekit_arm.calibration.records import data_record, fingerprint, settings_record
from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.calibration.running.session import Reports, Session
from mergekit_arm.calibration.sums.sites import chosen_kinds
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import try_writing
from mergekit_arm.models.checkpoint import fetch_checkpoint, open_checkpoint
from mergekit_arm.models.loading import (
    Source,
    check_weights_fit,
    choose_device,
    choose_dtype,
    empty_model,
    find_model,
    load_model,
)
from mergekit_arm.models.placement import offload, spread
from mergekit_arm.models.tensors import CheckpointTensors
from mergekit_arm.statistics.format import DataRecord, SettingsRecord
from mergekit_arm.statistics.write import check_destination
from mergekit_arm.units import parse_duration, parse_size

_SMALLEST_BUDGET = 256_000_000  # bytes of hidden states


@dataclass(frozen=True)
class Prepared:
    """All that the passes through the model need; nothing is left that could be refused."""

    session: Session
    """Options, corpus, the job's processes, saved progress and reports."""
    source: Source
    checkpoint: CheckpointTensors
    model: PreTrainedModel
    """With ``low_memory``, without its weights."""
    coverage: Coverage
    device: torch.device
    dtype: torch.dtype
    data: DataRecord
    settings: SettingsRecord
    temporary: ExitStack
    """Removes what lies on the disk until the run ends."""

    @property
    def hidden_budget(self) -> int:
        """Bytes of hidden states that a walk layer by layer may hold in memory."""
        asked = self.session.options.activation_budget
        if asked != "auto":
            return parse_size(asked)
        return max(_SMALLEST_BUDGET, self.checkpoint.bytes_on_disk() // 25)


def prepare(
    options: CalibrationOptions, job: Job, reports: Reports, temporary: ExitStack
) -> Prepared:
    """Check all that can be checked, and load what the passes need.

    What one process of ``job`` refuses, no other begins. ``temporary`` takes what lies on the
    disk only for this run.

    Raises:
        InputError: anything that cannot work.
    """
    _check_options(options, job, reports.say)
    device = job.device(choose_device(options.device))
    dtype = choose_dtype(options.dtype, device)
    reports.stage("Finding the model", 0, 0)
    # A merged adapter's cache is written once and then read.
    with job.first_here("model"):
        source = temporary.enter_context(
            find_model(
                options.model,
                trust_remote_code=options.trust_remote_code,
                lora_cache=options.lora_merge_cache,
            )
        )
    reports.stage("Reading the data", 0, 0)
    corpus, tokenizer = read_data(options, source, reports.say)
    _check_sample(options, corpus)
    reports.stage("Loading the model", 0, 0)
    fetch_checkpoint(source)
    checkpoint = open_checkpoint(source)
    if options.low_memory:
        model = empty_model(source, dtype)
    elif options.device_map is None:
        _check_room(options.model, job, checkpoint, device, dtype)
        model = load_model(source, device, dtype)
    else:
        placement = spread(options.device_map, temporary, Path(options.out))
        model = load_model(source, device, dtype, placement)
    coverage = _cover(model, checkpoint, source)
    data = data_record(options, corpus, tokenizer)
    settings = settings_record(options, device, dtype)
    facts = fingerprint(data, settings, coverage.content_hash())
    facts["batch size"] = str(options.batch_size or "automatic")
    facts["low memory"] = "on" if options.low_memory else "off"
    if options.low_memory:  # layers that are finished hold what is stored of them, and no more
        facts["keep sketch"] = "on" if options.keep_sketch else "off"
    job.agree(facts)
    progress = SavedProgress(
        _progress_folder(options),
        facts,
        every=parse_duration(options.save_every),
        process=job.process,
        processes=job.processes,
    )
    temporary.enter_context(progress.alone())
    if not options.dry_run:  # another run of the same command may have ended since it was looked at
        check_destination(Path(options.out), options.force)
    progress.check(options.force)
    job.wait("ready")
    return Prepared(
        session=Session(options, corpus, job, progress, reports),
        source=source,
        checkpoint=checkpoint,
        model=model,
        coverage=coverage,
        device=device,
        dtype=dtype,
        data=data,
        settings=settings,
        temporary=temporary,
    )


def keep_weights_on_disk(prepared: Prepared) -> Prepared:
    """Return the same with the model loaded whole, its weights read from the disk when used."""
    out = Path(prepared.session.options.out)
    placement = offload(prepared.device, prepared.temporary, out)
    model = load_model(prepared.source, prepared.device, prepared.dtype, placement)
    # The coverage refers to the modules of the model that it was made for.
    coverage = _cover(model, prepared.checkpoint, prepared.source)
    return replace(prepared, model=model, coverage=coverage)


def _check_options(options: CalibrationOptions, job: Job, say: Callable[[str], None]) -> None:
    """Refuse what can be refused without a look at model and data.

    Raises:
        InputError: a kind of statistic that is not known, a destination that exists or cannot be
            written, options that contradict each other or cannot be read.
    """
    try:
        _try_destination(Path(options.out), options.force, write=job.local_process == 0)
    except InputError as error:
        if not options.dry_run:
            raise
        say(f"This dry run writes nothing, but: {error.message}")
    if options.device_map is not None:
        if options.low_memory:
            raise InputError("--device-map and --low-memory exclude each other: choose one")
        if options.device != "auto":
            raise InputError("--device-map chooses the devices itself: leave --device out")
        if job.local_processes > 1:
            raise InputError(
                "--device-map spreads one process over all devices of a host: "
                "start one process for each host, or leave it out"
            )
    if options.activation_budget != "auto" and not options.low_memory:
        raise InputError("--activation-budget belongs to --low-memory: add that, or leave it out")
    chosen_kinds(options)
    parse_duration(options.save_every)
    if options.activation_budget != "auto":
        parse_size(options.activation_budget)


def _check_sample(options: CalibrationOptions, corpus: Corpus) -> None:
    """Refuse to leave every token out of the sample that some statistics see.

    Raises:
        InputError: no sequence is longer than what ``skip_first`` leaves out.
    """
    longest = max(map(len, corpus.blocks), default=0)
    sampled = [kind.name for kind in chosen_kinds(options) if kind.sampled]
    if sampled and longest <= options.skip_first:
        raise InputError(
            f"--skip-first {options.skip_first} leaves no token for {', '.join(sampled)}: the "
            f"longest sequence has {longest}; skip fewer"
        )


def _try_destination(out: Path, force: bool, *, write: bool) -> None:
    """Refuse a destination that will not be possible to write; ``write`` there to find out.

    Raises:
        InputError: it exists, or the system refuses.
    """
    try:
        check_destination(out, force)
        if os.path.ismount(out):
            raise InputError(
                f"a disk is mounted at {out}, where no finished directory can be moved to: name "
                f"one on it, such as {out / 'statistics'}"
            )
        if write:  # one process of the host does it for all
            try_writing(out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({first_line(error)}): choose another OUT"
        ) from error


def _check_room(
    name: str, job: Job, checkpoint: CheckpointTensors, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse to load weights into memory that does not hold them, for all processes of the host.

    Raises:
        InputError: with the options that help.
    """
    with job.first_here("room"):  # before anyone here has taken any
        sharing = job.sharing(device)
        if sharing == 1 or job.local_process == 0:
            size = checkpoint.size(dtype)
            # What is no wider than its file is mapped from it, once for all.
            copies = sharing if size > checkpoint.bytes_on_disk() else 1
            check_weights_fit(size, device, dtype, name, copies)


def _cover(model: PreTrainedModel, checkpoint: CheckpointTensors, source: Source) -> Coverage:
    """Return what is to be measured, or why not, of every tensor that a merge may ask for."""
    coverage = cover_checkpoint(model, checkpoint, plan_readings(model))
    add_asked_names(coverage, model, checkpoint, source.config)
    return coverage


def _progress_folder(options: CalibrationOptions) -> Path:
    out = Path(options.out).absolute()
    return out.with_name(f"{out.name}.{'dry-run' if options.dry_run else 'partial'}")
