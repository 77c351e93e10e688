"""The command line of ``python -m research.bench``. Torch is imported when the work starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.demo.command import add_folders, prepare_model
from mlm_plugin.errors import UserError
from mlm_plugin.failures import exit_code_of
from research.bench.plan import CLAIMED, PLAN, RATES, UNTRAINED, find_arms, shorter
from research.bench.records import RECORDS, Records

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the missing trials of a stage; returns the exit code.

    Raises:
        UserError: an unknown flag, a missing one, or an arm that cannot be reported yet.
    """
    given = _parser().parse_args(list(argv))
    if given.steps and given.stage != "report":
        raise UserError("--steps is for --stage report alone")
    reports = given.stage == "report"
    arms = find_arms(given.arms or {"report": CLAIMED, "rates": tuple(RATES)}.get(given.stage))
    if given.stage == "rates":
        arms = [arm for arm in arms if arm.name in RATES]
        if not arms:
            raise UserError(f"--arms {' '.join(given.arms)}: --stage rates has {', '.join(RATES)}")
    if reports and not given.steps:
        arms.insert(0, UNTRAINED)
    stage, plan = given.stage, PLAN
    if given.steps:
        stage, plan = shorter(given.steps), PLAN._replace(evaluation_steps=(given.steps,))
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: must be at least 1")
    model = prepare_model(given.model)
    from research.bench.context import BenchContext
    from research.bench.run import Limits, fingerprint_of_model, run_stage

    return run_stage(
        stage,
        arms,
        context=BenchContext(model, given.output, plan),
        records=Records(given.records, fingerprint_of_model(model)),
        limits=Limits(given.jobs, given.minutes),
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m research.bench",
        description="Find the setting of every arm of the plan on the tuning concepts, then train "
        "it on others; an oracle judges the pictures. The same command continues where it "
        "stopped. `python -m research.bench.pages` writes the tables.",
    )
    parser.add_argument("--stage", choices=("tuning", "report", "rates"), required=True,
                        help="The search for settings, what is reported, or the same at other "
                        "rates of the U-Net.")  # fmt: skip
    parser.add_argument("--arms", nargs="+", metavar="A",
                        help='Arms such as "lora plain", or families such as lora (default: the '
                        "whole plan; for the report, the arms of the claims; for rates, those "
                        "that it has).")  # fmt: skip
    add_folders(parser, written="scratch files")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR",
                        help="Folder of the records (default: those of the checkout).")  # fmt: skip
    parser.add_argument("--steps", type=int, choices=PLAN.evaluation_steps[:-1],
                        help="Report trainings that are shorter, schedule included.")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="Trainings at once, each with its share of cores.")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M",
                        help="Start no trial after M minutes.")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
