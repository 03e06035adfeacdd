"""The forward loop: every token block through the model, its inputs into the sites."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.inputs.discovery import DISCOVERY_TOKENS, discover
from mergekit_arm.calibration.inputs.readings import ReadingPlan
from mergekit_arm.calibration.running.estimate import estimate
from mergekit_arm.calibration.running.finishing import Finishing
from mergekit_arm.calibration.running.session import DryRun, Session
from mergekit_arm.calibration.sums.batches import Batch, Feeder
from mergekit_arm.calibration.sums.hooks import Collector, without_logits
from mergekit_arm.calibration.sums.sites import plan_sites
from mergekit_arm.calibration.sums.totals import MeasuredSite
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.machine import Cost
from mergekit_arm.models.calling import model_arguments


def measure_in_memory(
    model: PreTrainedModel, coverage: Coverage, device: torch.device, session: Session
) -> list[MeasuredSite]:
    """Pass the session's corpus through ``model``, which takes inputs on ``device``.

    Holds one batch of activations and the sums of every site. Returns the sites on the first
    process only.

    Raises:
        Failure: a NaN or an infinity in an activation, or not enough memory for one block.
        DryRun: only the preflight was wanted.
    """
    corpus, options = session.corpus, session.options
    spans = session.spans()
    with without_logits(model), torch.inference_mode():
        explore(model, coverage.plan, corpus, device)
        coverage.settle()
        plans = coverage.plan.sites(coverage.read_parameters)
        sites = plan_sites(model, plans, options)
        feeder = Feeder(corpus, session.samples(model), session.reports.say)
        finishing = Finishing(session, device, "whole")
        start = 0
        if snapshot := session.resume():
            snapshot.restore(sites)
            start, feeder.limit = snapshot.position["batches"], snapshot.position["limit"]
        done, total = session.tokens(spans[:start]), session.tokens(spans)
        with session.running():
            with Collector(sites) as collector:

                def forward(batch: Batch) -> None:
                    collector.batch = batch
                    extra = corpus.extra(batch.span.first)
                    model(**model_arguments(model, batch.ids.to(device), extra))
                    collector.check()

                for number, span in enumerate(spans[start:], start):
                    if number == 0:
                        with Cost(device) as cost:
                            feeder.feed(span, forward)
                        session.preflight(estimate(model, coverage, sites, cost, session))
                    else:
                        feeder.feed(span, forward)
                    done += session.tokens([span])
                    position = {"batches": number + 1, "limit": feeder.limit}
                    session.after_batch(done, total, position, sites)
            if options.dry_run:  # without a batch: what there is to say, another process says
                raise DryRun
            position = {"batches": len(spans), "limit": feeder.limit}
            session.after_last(position, sites)
            return finishing.finish(0, sites, position)


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
