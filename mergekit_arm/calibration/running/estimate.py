"""What a run will take, extrapolated from its first block."""

from __future__ import annotations

from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.running.finishing import finishing_seconds
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.calibration.running.session import Session
from mergekit_arm.calibration.running.size import directory_bytes
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.calibration.sums.totals import by_input
from mergekit_arm.machine import Cost, free_disk, free_memory


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
    saved = sums * session.job.local_processes  # each process saves its own
    output = directory_bytes(sites, coverage, session.corpus, session.options)
    held = [*model.parameters(), *model.buffers()]
    return Preflight(
        tokens=total,
        seconds=first.seconds * total / block,
        inputs=len(by_input(sites)),
        finishing=finishing_seconds(sites, device) / session.job.processes,
        weights=sum(tensor.nbytes for tensor in held if not tensor.is_meta),
        sums=sums,
        # The first block made the sums, too.
        activations=max(first.extra - sums, 0) * largest // block,
        batch_size=max(span.count for span in spans),
        free=free_memory(device) // session.job.sharing(device),
        device=str(device),
        output=output,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        # What was saved stays until the new is written; at the end, beside what is finished.
        disk=max(2 * saved, saved + output),
        disk_free=free_disk(session.progress.folder),
    )
