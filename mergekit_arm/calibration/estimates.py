"""What a run will take, extrapolated from its first block."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from mergekit_arm.calibration.chain import Chain
from mergekit_arm.calibration.collect import Site
from mergekit_arm.calibration.coverage import Coverage
from mergekit_arm.calibration.preflight import Cost, Preflight, free_disk, free_memory
from mergekit_arm.calibration.session import Session
from mergekit_arm.calibration.size import directory_bytes, parameter_bytes


def estimate(
    model: PreTrainedModel,
    coverage: Coverage,
    sites: list[Site],
    first: Cost,
    session: Session,
) -> Preflight:
    """Extrapolate from what the first batch, a single block, took.

    What ``sites`` have seen by then decides the sizes of their sums.
    """
    device, spans = first.device, session.spans()
    block, total = session.tokens(spans[:1]), session.tokens(spans)
    largest = max(session.tokens([span]) for span in spans)
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


def estimate_by_layer(
    chain: Chain,
    coverage: Coverage,
    sites: list[Site],
    first: Cost,
    reading: Cost,
    layer: int,
    states: int,
    session: Session,
) -> Preflight:
    """Extrapolate from the first block's way through the first layer.

    Args:
        sites: of the first layer.
        first: what the block took there.
        reading: what reading the layer's weights took.
        layer: their bytes.
        states: bytes of the block's hidden states.
    """
    one = estimate(chain.model, coverage, sites, first, session)
    states = states * one.tokens // session.tokens(session.spans()[:1])
    output = directory_bytes(
        sites,
        coverage,
        session.corpus,
        session.options,
        repeated=len(chain),
        beyond=parameter_bytes(
            chain.unlike_first(coverage.plan), coverage, chain.model, session.options
        ),
    )
    return replace(
        one,
        seconds=len(chain) * (reading.seconds + one.seconds),
        weights=layer + sum(chain.loaded.values()),
        output=output,
        # What was saved stays until the new is written; each process saves its own, and
        # the first one also every layer's results.
        disk=2 * (states + one.sums) * session.job.local_processes + output,
        low_memory=True,
    )
