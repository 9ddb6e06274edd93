"""``optimum-cli ffmerge ...``: ffmerge's own command line, same arguments and exit codes.

Installed as ``optimum/commands/register/register_ffmerge.py``, where optimum-cli looks for
commands; no folder on that path may have an ``__init__.py``.
"""

from argparse import REMAINDER, ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def _print_help(file: Any = None) -> None:
    from ffmerge.__main__ import main

    main(["--help"])


class FfmergeCommand(BaseOptimumCLICommand):
    """Hands all that follows ``ffmerge`` on; optimum-cli's start imports nothing of ffmerge."""

    COMMAND = CommandInfo(
        name="ffmerge", help="Merge feed-forward sublayers, export to ONNX, share weights."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take every argument as it is; help is ffmerge's: its commands."""
        parser.add_argument("arguments", nargs=REMAINDER)
        parser.print_help = _print_help  # type: ignore[method-assign]

    def run(self) -> None:
        """Run ffmerge and exit with its code."""
        from ffmerge.__main__ import main

        main(self.args.arguments)


REGISTER_COMMANDS = [FfmergeCommand]
