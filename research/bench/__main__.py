"""The command line of ``python -m research.bench``. Torch is imported when the work starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mlm_plugin.cli import run_command
from mlm_plugin.config.commands import CommandParser
from mlm_plugin.demo.command import add_folders, prepare_model
from mlm_plugin.errors import UserError
from research.bench.plan import FULL, SHORT, chosen

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the missing trials of the plan; returns the exit code.

    Raises:
        UserError: an unknown flag, a missing one, or a folder with other contents.
    """
    given = _parser().parse_args(list(argv))
    plan = chosen(SHORT if given.short else FULL, methods=given.method, tuning=given.tuning)
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: must be at least 1")
    model = prepare_model(given.model)
    from research.bench.run import run_bench

    return run_bench(plan, model=model, output=given.output, jobs=given.jobs)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m research.bench",
        description="Train every method plain and with the MLM term, and rivals of the term, on "
        "concepts the model has never seen; an oracle judges the pictures. Writes results.json, "
        "table.md and report.html; the same command continues where it stopped.",
    )
    add_folders(parser, written="results")
    parser.add_argument("--short", action="store_true",
                        help="LoRA and its nearest rivals only: minutes, not hours.")  # fmt: skip
    parser.add_argument("--method", nargs="+", metavar="M",
                        help="Only these methods (default: all of the plan).")  # fmt: skip
    parser.add_argument("--tuning", action="store_true",
                        help="On the concepts that settings are tuned on, not those that are "
                        "reported.")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="Trainings at once, each with its share of cores.")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
