"""Everything that is refused before the first forward pass, and what is loaded for it."""

from __future__ import annotations

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.processes import Job
from mergekit_arm.errors import InputError


def check_placement(options: CalibrationOptions, job: Job) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: they do.
    """
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
