"""What a calibration will take, estimated from one block of it."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_arm.units import duration_text, size_text


@dataclass(frozen=True)
class Preflight:
    """Time, memory and size, before the long run. Bytes and seconds."""

    tokens: int
    """To measure, by this process."""
    seconds: float
    """For all of them to pass the model."""
    weights: int
    """Held at once."""
    sums: int
    """Held by the sites, for as long as they are measured."""
    activations: int
    """What a whole batch takes beside weights and sums while it passes the model."""
    batch_size: int
    free: int
    """Memory free on the device after the first block, when weights and sums are in it: what is
    left for activations."""
    device: str
    output: int
    """Of the statistics directory, at most."""
    parameters: int
    """Of the model."""
    disk: int = 0
    """For hidden states and saved progress, at most."""
    disk_free: int = 0
    low_memory: bool = False
    inputs: int = 0
    """To finish, once all tokens have passed."""
    finishing: float = 0.0
    """Seconds for that: mostly for eigenvectors."""

    def lines(self) -> list[str]:
        """Return the estimate in words."""
        finishing = ""
        if self.finishing:
            took = duration_text(self.finishing)
            finishing = f", and finishing {self.inputs:,} inputs about {took}"
        held = "one layer's weights" if self.low_memory else "weights"
        return [
            f"{self.tokens:,} tokens will take about {duration_text(self.seconds)}{finishing}.",
            (
                f"Memory: {size_text(self.weights)} {held}, {size_text(self.sums)} sums, about "
                f"{size_text(self.activations)} activations for {self.batch_size} sequences at "
                f"once ({size_text(self.free)} free on {self.device})."
            ),
            (
                f"Disk: {size_text(self.output)} statistics at most "
                f"({self.output / (2 * self.parameters):.0%} of a bfloat16 checkpoint), "
                f"{size_text(self.disk)} for progress ({size_text(self.disk_free)} free)."
            ),
        ]

    def warnings(self) -> list[str]:
        """Return what will not fit, each with the options that help."""
        found = []
        if self.activations > self.free:
            fitting = self.free * self.batch_size // max(self.activations, 1)
            low = "" if self.low_memory else ", --low-memory"
            smaller = f"--batch-size {fitting}" if fitting else "a shorter --sequence-length"
            found.append(
                f"{self.batch_size} sequences at once may not fit into the "
                f"{size_text(self.free)} that are free on {self.device}: "
                f"use {smaller}{low} or --dtype bfloat16"
            )
        if self.disk + self.output > self.disk_free:
            found.append(
                f"progress and statistics may not fit on the disk, which has "
                f"{size_text(self.disk_free)} free: choose an OUT on a larger one, or fewer "
                "--samples"
            )
        return found
