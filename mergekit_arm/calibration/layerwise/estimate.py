"""What a walk will take, extrapolated from the first block's way through the first layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.layerwise.chain import Chain
from mergekit_arm.calibration.running.estimate import estimate
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.calibration.running.session import Session
from mergekit_arm.calibration.running.size import directory_bytes, parameter_bytes
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.machine import Cost


@dataclass(frozen=True)
class FirstLayer:
    """What the first block has taken in the first layer."""

    sites: list[Site]
    """Of the layer, with the block's sums."""
    cost: Cost
    """Of the block's pass."""
    reading_seconds: float
    """Spent on reading the layer's weights."""
    weights: int
    """Bytes of them."""
    states: int
    """Bytes of the block's hidden states."""


def estimate_by_layer(
    first: FirstLayer, chain: Chain, coverage: Coverage, session: Session
) -> Preflight:
    """Extrapolate to all layers and all blocks: every layer is taken to be like the first."""
    one = estimate(chain.model, coverage, first.sites, first.cost, session)
    states = first.states * one.tokens // session.tokens(session.spans()[:1])
    output = directory_bytes(
        first.sites,
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
        seconds=len(chain) * (first.reading_seconds + one.seconds),
        inputs=len(chain) * one.inputs,
        finishing=len(chain) * one.finishing,
        weights=first.weights + sum(chain.loaded.values()),
        output=output,
        # What was saved stays until the new is written; each process saves its own, and
        # the first one also every layer's results.
        disk=2 * (states + one.sums) * session.job.local_processes + output,
        low_memory=True,
    )
