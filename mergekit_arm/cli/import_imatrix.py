"""``mergekit-arm import-imatrix FILE MODEL OUT``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_arm.cli.output import json_option, print_json, print_tables, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm import-imatrix ./llama-3.2-1b.imatrix.gguf meta-llama/Llama-3.2-1B ./stats
\b
Then, since no norm is in an importance matrix:
  merge_method: aim
  parameters:
    activation_stats: ./stats
    importance: rms
    omega: [{filter: norm, value: 1.0}, {value: 0.4}]
"""


@click.command("import-imatrix", epilog=_EPILOG)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run code of the model (danger).")
@click.option("--force", is_flag=True, help="Replace statistics that exist at OUT.")
@quiet_option
@json_option
def command(
    file: Path,
    model: str,
    out: Path,
    trust_remote_code: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make statistics of llama.cpp's importance matrix FILE, for merges with MODEL as the base.

    FILE may be GGUF or the older .dat. MODEL is the model in full precision that the matrix is
    of: a directory or a Hub id. Its weights are looked at, for merges to recognise them.
    """
    with working("Reading", quiet=quiet):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.imatrix.importing import import_imatrix

        done = import_imatrix(file, model, out, force=force, trust_remote_code=trust_remote_code)
    weights = done.metadata.weights
    measured = sum(1 for one in weights.values() if one.site)
    inputs = len(done.metadata.sites)
    if as_json:
        counts = {"weights": len(weights), "measured": measured, "inputs": inputs}
        lacks = {"reasons": done.reasons, "unused": done.unused, "mean_abs": done.magnitudes}
        print_json({"out": out, **counts, **lacks})
        return
    lines = [f"{out}: {measured} of {len(weights)} weights at {inputs} inputs"]
    lines += [f"no statistics: {count} weights: {why}" for why, count in done.reasons.items()]
    if done.unused:
        lines.append(f"passed over: {', '.join(done.unused[:3])} ({len(done.unused)} in all)")
    if not done.magnitudes:
        lines.append("it has no mean |x|: merge with importance: rms")
    print_tables(lines)
