"""The commands `burnish` and `optimize`. A command's module is imported when it is called: `--help` is quick."""

from __future__ import annotations

import importlib

import click

from burnish import __version__
from burnish.tools import terminal

COMMANDS = {
    "optimize": "Rewrite a model and prove what changed.",
    "inspect": "Show what a model consists of and what it costs.",
    "compare": "Find the worst difference of two models and the first node where they part.",
    "check": "Lock what a model is, and say what changed since.",
    "bench": "Time models in turns, in one backend or several side by side.",
    "tune": "Look for fast schedules of a model's kernels.",
    "run": "Run a model, compiled or not, and show what it computes.",
    "generate": "Write text with an exported decoder, and say how fast it comes.",
    "delta": "Keep variants of a model as what differs from it, and rebuild them byte for byte.",
    "passes": "List the passes and their options.",
    "demo": "Optimize the embedded models and show what was gained.",
}


class _Commands(click.Group):
    """A group that knows its commands by name and imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"burnish.tools.{cmd_name}_command")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise click.UsageError(
                f"there is no command `{args[0]}`" + (f", did you mean `{close[0]}`?" if close else ""), ctx
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="burnish %(version)s")
def burnish() -> None:
    """Compile trained models: read, rewrite under proof, write."""


def main() -> None:
    """Entry point of `burnish`."""
    terminal.run(burnish, prog_name="burnish")


def optimize_main() -> None:
    """Entry point of `optimize`, the short name of `burnish optimize`."""
    from burnish.tools.optimize_command import optimize_command

    terminal.run(optimize_command, prog_name="optimize")
