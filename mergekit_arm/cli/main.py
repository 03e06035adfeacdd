"""The command group. Subcommands are imported when they are called, so ``--help`` is instant."""

from __future__ import annotations

import importlib
import sys

import click

from mergekit_arm import __version__
from mergekit_arm.errors import InputError, did_you_mean, first_line

COMMANDS = {
    "check": "Say in seconds what is wrong with a configuration.",
    "calibrate": "Measure a model's activations and write statistics for merging.",
    "inspect": "Show what statistics hold, or compare two.",
    "report": "Write a page with figures on statistics, a merge, a stream or a search.",
    "push": "Publish statistics on the Hub.",
    "import-imatrix": "Make statistics of a llama.cpp importance matrix.",
    "export-imatrix": "Write statistics as a llama.cpp importance matrix.",
    "stream": "Merge a run's checkpoints one after another, each merge a step.",
    "tune": "Search the numbers of a merge for what judges best.",
    "combine": "Add statistics that were measured apart.",
    "demo": "Train, calibrate and merge a very small model, in two minutes.",
}
"""Subcommand → its line in ``--help``; each is ``command`` in a file of ``cli/``."""


CONTINUED = ("calibrate", "stream", "tune")
"""Commands that keep their progress."""


def module_of(name: str) -> str:
    """Return the module of a subcommand, whose name may have dashes."""
    return f"mergekit_arm.cli.{name.replace('-', '_')}"


class LazyGroup(click.Group):
    """A group that knows its subcommands' names and imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(module_of(cmd_name))
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = not args or args[0] in COMMANDS or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:  # which completion is
            raise InputError(
                f"no command {args[0]!r}{did_you_mean(args[0], COMMANDS)}; "
                f"there are: {', '.join(COMMANDS)}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-arm")
@click.option(
    "--verbose", is_flag=True, help="Show a traceback when something fails; also behind a command."
)
def cli(verbose: bool) -> None:
    """Activation-informed merging for mergekit.

    Measure a model once; then `mergekit-yaml` merges with the methods aim, aim_<method> and arm.
    """


def main() -> None:
    """Run the command line; one line and exit status 2 or 1 when something is wrong."""
    arguments = [one for one in sys.argv[1:] if one != "--verbose"]
    verbose = len(arguments) < len(sys.argv) - 1
    try:
        # Not standalone, click returns the status of a command that ends by its own Exit.
        sys.exit(cli.main(arguments, prog_name="mergekit-arm", standalone_mode=False))
    except click.Abort:
        click.echo(f"Stopped. {_how_to_go_on(arguments)}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        if verbose:
            raise
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        # The last resort: whatever a library raises is still one line for the user.
        if verbose:
            raise
        from mergekit_arm.files import no_room  # seldom needed

        if no_room(error):
            said = f" ({first_line(error)})" if isinstance(error, OSError) else ""
            click.echo(f"Error: no room on the disk{said}. {_how_to_go_on(arguments)}", err=True)
            sys.exit(1)
        click.echo(
            f"Error: {type(error).__name__}: {first_line(error)} "
            "(run `mergekit-arm --verbose …` for the traceback)",
            err=True,
        )
        sys.exit(1)


def _how_to_go_on(arguments: list[str]) -> str:
    if any(one in CONTINUED for one in arguments[:1]):
        return "The same command goes on where it was."
    if arguments[:1] == ["demo"]:
        return "The same command with --force begins anew."
    return "Nothing half-written was left; the same command begins anew."
