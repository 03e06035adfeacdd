"""The forward loop: every token block through the model, its inputs into the sites."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from mergekit_arm.calibration.batches import Batch, Feeder, Span, plan_spans
from mergekit_arm.calibration.collect import Collector, Site, Statistic, without_logits
from mergekit_arm.calibration.corpus import Corpus
from mergekit_arm.calibration.coverage import Coverage
from mergekit_arm.calibration.discovery import discover
from mergekit_arm.calibration.model import model_arguments
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.preflight import Cost, Preflight, free_disk, free_memory
from mergekit_arm.calibration.records import site_name
from mergekit_arm.calibration.session import Session
from mergekit_arm.calibration.sites import ReadingPlan, SitePlan
from mergekit_arm.calibration.size import directory_bytes
from mergekit_arm.statistics.observers import Importance
from mergekit_arm.statistics.subspace import Subspace

DISCOVERY_TOKENS = 16
TOKENS_PER_BATCH = 4096


def measure(
    model: PreTrainedModel, coverage: Coverage, device: torch.device, session: Session
) -> list[Site]:
    """Pass the session's corpus through ``model``, which takes inputs on ``device``.

    Holds one batch of activations and the sums of every site.

    Raises:
        Failure: a NaN or an infinity in an activation, or not enough memory for one block.
        DryRun: only the preflight was wanted.
    """
    corpus, options = session.corpus, session.options
    spans = spans_of(session, TOKENS_PER_BATCH)
    with without_logits(model), torch.inference_mode():
        explore(model, coverage.plan, corpus, device)
        coverage.settle()
        plans = coverage.plan.sites(coverage.read_parameters)
        sites = plan_sites(model, plans, options)
        feeder = Feeder(corpus, session.sample, session.reports.say)
        start = 0
        if snapshot := session.resume():
            snapshot.restore(sites)
            start, feeder.limit = snapshot.position["batches"], snapshot.position["limit"]
        done, total = tokens_of(session, spans[:start]), tokens_of(session, spans)
        with Collector(sites) as collector, session.running():

            def forward(batch: Batch) -> None:
                collector.batch = batch
                extra = corpus.extra(batch.span.first)
                model(**model_arguments(model, batch.ids.to(device), extra))
                collector.check()

            for number, span in enumerate(spans[start:], start):
                if number == 0:
                    with Cost(device) as cost:
                        feeder.feed(span, forward)
                    session.preflight(estimate(model, coverage, sites, spans, cost, session))
                else:
                    feeder.feed(span, forward)
                done += tokens_of(session, [span])
                position = {"batches": number + 1, "limit": feeder.limit}
                session.after_batch(done, total, position, sites)
            session.after_last({"batches": len(spans), "limit": feeder.limit}, sites)
        return sites


def explore(
    model: PreTrainedModel, plan: ReadingPlan, corpus: Corpus, device: torch.device
) -> None:
    """Find out with a few tokens where the input of every weight can be seen.

    Raises:
        InputError: this model cannot be measured.
    """
    # A row with images shows what reads images; it cannot be cut.
    row = max(range(len(corpus.blocks)), key=lambda block: len(corpus.extra(block)))
    extra = corpus.extra(row)
    ids = corpus.blocks[row] if extra else corpus.blocks[row][:DISCOVERY_TOKENS]
    arguments = model_arguments(model, ids[None].to(device), extra)

    def forward() -> None:
        model(**arguments)

    discover(model, plan, forward)


def spans_of(session: Session, tokens_at_once: int) -> list[Span]:
    """Return this process's batches: of ``--batch-size`` blocks, or of about so many tokens."""
    corpus, job = session.corpus, session.job
    by_tokens = max(1, tokens_at_once // corpus.lengths[-1])
    # Few blocks are shared out evenly rather than batched well.
    fair = -(-len(corpus.blocks) // job.processes)
    return plan_spans(
        corpus.lengths,
        # What has images or audio beside it comes one by one.
        1 if corpus.extras else session.options.batch_size or min(by_tokens, fair),
        process=job.process,
        processes=job.processes,
    )


def tokens_of(session: Session, spans: Sequence[Span]) -> int:
    """Return how many tokens ``spans`` hold."""
    return sum(session.corpus.lengths[span.first] * span.count for span in spans)


def estimate(
    model: PreTrainedModel,
    coverage: Coverage,
    sites: list[Site],
    spans: list[Span],
    first: Cost,
    session: Session,
) -> Preflight:
    """Extrapolate from what the first of ``spans``, a single block, took.

    What ``sites`` have seen by then decides the sizes of their sums.
    """
    device = first.device
    block, total = tokens_of(session, spans[:1]), tokens_of(session, spans)
    largest = max(tokens_of(session, [span]) for span in spans)
    sums = sum(value.nbytes for site in sites for value in site.state().values())
    held = [*model.parameters(), *model.buffers()]
    return Preflight(
        tokens=total,
        seconds=first.seconds * total / block,
        weights=sum(tensor.nbytes for tensor in held if not tensor.is_meta),
        sums=sums,
        # The first block made the sums, too.
        activations=max(first.extra - sums, 0) * largest // block,
        batch_size=max(span.count for span in spans),
        free=free_memory(device) // session.job.sharing(device),
        device=str(device),
        output=directory_bytes(sites, coverage, session.corpus, session.options),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        # What was saved stays until the new is written; each process saves its own.
        disk=2 * sums * session.job.local_processes,
        disk_free=free_disk(session.progress.folder),
    )


def plan_sites(
    model: PreTrainedModel, plans: list[SitePlan], options: CalibrationOptions
) -> list[Site]:
    """Decide what is measured at each site.

    Subspaces only where a matrix other than the output head reads: nothing else is rotated. Nor
    are experts: their sketches would be a hundred times those of the rest of the model.
    """
    every = {
        "importance": Statistic(Importance),
        "subspace": Statistic(
            partial(
                Subspace,
                rank=options.rank,
                energy=options.energy,
                seed=options.seed,
                keep_sketch=options.keep_sketch,
            ),
            sampled=True,
            matrices_only=True,
        ),
    }
    head = model.get_output_embeddings()
    sites = []
    for plan in plans:
        rotated = plan.experts is None and any(
            reading.matrix and not any(layer is head for layer in reading.layers)
            for reading in plan.readings
        )
        chosen = {
            name: every[name]
            for name in options.statistics
            if rotated or not every[name].matrices_only
        }
        if plan.experts is None:
            sites.append(Site(site_name(plan), plan, chosen))
        for expert in range(plan.experts or 0):
            sites.append(Site(f"{site_name(plan)}[{expert}]", plan, chosen, expert))
    return sites
