"""``mergekit-arm calibrate MODEL OUT``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_arm.calibration.options import CalibrationOptions, parse_part
from mergekit_arm.cli.output import json_option, print_json
from mergekit_arm.data.settings import DEFAULT_DATASET, RECIPES
from mergekit_arm.units import parse_duration, parse_size

if TYPE_CHECKING:
    from mergekit_arm.calibration.running.preflight import Preflight

Function = TypeVar("Function", bound=Callable[..., Any])

_EPILOG = """\b
Examples:
  mergekit-arm calibrate meta-llama/Llama-3.2-1B ./llama-stats
  mergekit-arm calibrate ./my-model ./stats --dataset ./chats.jsonl --samples 128
  mergekit-arm calibrate ./base ./stats --dataset ./chats.jsonl --tokenizer ./my-chat-model
  mergekit-arm calibrate --config ./merge.yml
  mergekit-arm calibrate ./my-model ./stats --dataset ./code.jsonl:3 --dataset ./text.txt:1
  mergekit-arm calibrate org/model@main+org/lora ./stats --dataset ./text.txt
  mergekit-arm calibrate meta-llama/Llama-3.1-70B ./stats --low-memory
  torchrun --nproc-per-node 8 -m mergekit_arm calibrate meta-llama/Llama-3.1-8B ./stats
"""


def _option(name: str, **settings: Any) -> Callable[[Function], Function]:
    """Declare an option whose default is the library's."""
    field = CalibrationOptions.__dataclass_fields__[name]
    flag = "--" + name.replace("_", "-")
    if field.default is False:
        return click.option(flag, is_flag=True, **settings)
    default = settings.pop("default", field.default)
    return click.option(flag, default=default, show_default=default is not None, **settings)


def _checked(parse: Callable[[str], object]) -> Callable[..., str]:
    """Return a callback that refuses what ``parse`` refuses and keeps the text."""

    def check(_context: click.Context, _option: click.Parameter, text: str) -> str:
        parse(text)
        return text

    return check


@click.command("calibrate", epilog=_EPILOG)
@click.argument("model", required=False)
@click.argument("out", type=click.Path(), required=False)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE.yml",
    help="Measure what a merge configuration's activation_stats and task_stats lack, each on the "
    "data set that its section `calibration` names, in place of MODEL and OUT.",
)
@_option(
    "dataset",
    metavar="NAME[:WEIGHT]",
    multiple=True,
    default=(DEFAULT_DATASET,),
    callback=lambda _context, _option, names: names[0] if len(names) == 1 else names,
    help="Name on the Hub, or a local .jsonl .json .txt .csv .parquet file (also .gz .zst .bz2 "
    ".xz), pattern or directory. Several are mixed by weight.",
)
@_option("subset", help="Configuration of the data set.")
@_option("split", help="Split of the data set.")
@_option(
    "text_column",
    help="Column with text, chats or token ids. [default: input_ids, messages, text, or what else "
    "is recognised: ShareGPT, Alpaca, prompt and completion]",
)
@_option(
    "part",
    metavar="I/N",
    callback=_checked(lambda text: text and parse_part(text)),
    help="Use one part of the rows, such as 2/4: `mergekit-arm combine` adds up the parts.",
)
@_option("samples", type=click.IntRange(1), help="Sequences to measure.")
@_option("sequence_length", type=click.IntRange(1), help="Tokens in each sequence.")
@_option(
    "max_tokens_per_row",
    type=click.IntRange(1),
    help="Use no more of one row, unless the others do not suffice. [default: one sequence; all "
    "of a row of token ids]",
)
@_option(
    "recipe",
    type=click.Choice(RECIPES),
    help="aim is the AIM authors' own rule: leave out texts longer than a sequence, take as many "
    "texts as --samples says, and shuffle the whole data set, which is read to its end.",
)
@_option(
    "tokenizer",
    metavar="MODEL_OR_DIR",
    help="Tokenise with another model's tokenizer (and chat template), such as a fine-tune's.",
)
@_option(
    "chat_template",
    metavar="FILE_OR_TEXT",
    help="Render chats with this template. [default: the tokenizer's; base models often have none]",
)
@_option("batch_size", type=click.IntRange(1), help="Sequences at once. [default: ~4096 tokens]")
@_option("seed", type=click.IntRange(0), help="Decides which rows and tokens are used.")
@_option(
    "statistics",
    metavar="KIND[,KIND]",
    default="all",
    callback=lambda _context, _option, names: tuple(re.split(r"\s*,\s*", names.strip())),
    help="What to measure: importance, which aim needs; subspace, which arm needs; "
    "regmean needs both.",
)
@_option("rank", type=click.IntRange(1), help="Columns of a subspace sketch. [default: by width]")
@_option(
    "energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of an input's second moment that a stored subspace holds.",
)
@_option("subspace_tokens", type=click.IntRange(1), help="Tokens that subspaces are measured on.")
@_option(
    "skip_first",
    type=click.IntRange(0),
    help="Leave each sequence's first tokens out of subspaces.",
)
@_option("keep_sketch", help="Store subspace sketches too, so that directories can be combined.")
@_option(
    "min_expert_tokens",
    type=click.IntRange(0),
    help="Experts that saw fewer tokens are reported, and aim leaves them as merged. (arm steps "
    "along all experts without a rotation.)",
)
@_option("device", help="auto, cpu, cuda, cuda:1, mps, …")
@_option(
    "dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the forward passes.",
)
@_option(
    "device_map",
    type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
    help="Spread the model over GPUs, CPU and disk, as accelerate does.",
)
@_option(
    "low_memory",
    help="Walk through the model layer by layer, reading each layer's weights once.",
)
@_option(
    "activation_budget",
    metavar="SIZE",
    callback=_checked(lambda text: text == "auto" or parse_size(text)),
    help="With --low-memory: hold up to so much of hidden states (512MB, 8GB) in memory, the rest "
    "on disk. auto is 4 % of the checkpoint, at least 256MB.",
)
@_option(
    "save_every",
    metavar="TIME",
    callback=_checked(parse_duration),
    help="Save progress so often (90s, 5m, 1h); the same command continues a run that was killed.",
)
@_option("dry_run", help="Let one block through, print what the run would take, and stop.")
@_option("lora_merge_cache", type=click.Path(), help="Keep the merged model of model+lora here.")
@_option("trust_remote_code", help="Run code that comes with the model (danger).")
@_option("force", help="Replace statistics that exist at OUT.")
@_option("quiet", help="Show no progress; notes, errors and the result remain.")
@json_option
@click.pass_context
def command(context: click.Context, /, config: str | None, as_json: bool, **values: Any) -> None:
    """Measure MODEL's activations on calibration text and write statistics to OUT.

    MODEL is a local directory, a Hub id, id@revision, or model+lora. With --config, a merge
    configuration names the models and directories; what is there already is left.

    Progress is kept in OUT.partial while it runs. Under torchrun, processes share the work.
    """
    for name in ("model", "out"):
        if (values[name] is None) == (config is None):
            raise click.UsageError(
                f"Missing argument '{name.upper()}'."
                if config is None
                else f"--config names the models and directories: leave {name.upper()} out"
            )
    # Imported when there is work, so that --help is instant.
    from rich.console import Console

    from mergekit_arm.cli.progress import Display

    console = Console(stderr=True)
    shown = Console(stderr=True, quiet=True) if values["quiet"] else console
    written: list[dict[str, Any]] = []
    estimates: list[Preflight] = []
    with Display(shown) as display:
        if os.environ.get("RANK", "0") == "0":  # one of a job's processes speaks for all
            display.stage("Loading libraries", 0, 0)
        # Imported when that is said: these take seconds.
        import datasets
        import transformers
        from huggingface_hub.utils.tqdm import enable_progress_bars

        from mergekit_arm.calibration.calibrate import calibrate
        from mergekit_arm.calibration.from_config import plan_calibrations
        from mergekit_arm.cli.tables.calibration import calibration_summary

        if values["quiet"] or not console.is_terminal:
            transformers.utils.logging.disable_progress_bar()  # which also silences downloads
        if values["quiet"]:
            datasets.disable_progress_bars()
        else:
            enable_progress_bars()

        def say(note: str) -> None:
            console.print(note, style="yellow", highlight=False, markup=False)

        def preflight(estimate: Preflight) -> None:
            estimates.append(estimate)
            for line in estimate.lines():
                (console if values["dry_run"] else shown).print(line, highlight=False)
            for warning in estimate.warnings():
                say(warning)

        if config is None:
            planned = [CalibrationOptions(**values)]
        else:
            planned = plan_calibrations(config, _written(context, values), say)
        for options in planned:
            result = calibrate(options, display.tokens, say, preflight, display.stage)
            if result is None:
                continue
            table = calibration_summary(result.metadata, result.out, result.corpus, result.seconds)
            if not as_json:
                Console().print(table)
            written.append(result.fields())
    # Under torchrun, only the first process has something to say.
    if as_json and os.environ.get("RANK", "0") == "0":
        print_json({"estimates": estimates} if values["dry_run"] else {"written": written})


def _written(context: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that stand on the command line."""
    written = click.core.ParameterSource.COMMANDLINE
    return {k: v for k, v in values.items() if context.get_parameter_source(k) is written}
