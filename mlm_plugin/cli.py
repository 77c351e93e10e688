"""The command `mlm-plugin`. Each command's package is imported only when it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mlm_plugin import __version__
from mlm_plugin.failures import TRACEBACK, exit_code_of

__all__ = ["main", "train_main"]

USAGE = """\
usage: mlm-plugin COMMAND [...]

Keep prompts alive while a concept is learned (arXiv 2410.10058).

commands:
  train           teach a concept with the MLM regularizer (kohya's options and TOML files)
  pretrain        train a contextualizer by hand, on captions of your own
  prompts         print or count the prompts of a prompt set
  estimate        predict the GPU memory of a training, part by part, without loading anything
  evaluate        draw, score and report what was learned; --compare lays runs side by side
  sheet           draw a contact sheet of a finished LoRA: prompts by strengths
  doctor          examine a finished LoRA or embedding; weaken its text encoder part if need be
  compare         train with several sets of options on several subjects, and compare them
  pocket concept  write a thing the built-in model has never seen: pictures and test prompts
  pocket demo     train one concept with and without the MLM term, and show both
  convert-preset  turn a kohya_ss GUI preset (JSON) into a TOML

`mlm-plugin COMMAND --help` lists the options of a command.
`--traceback` with any command shows where an error comes from.\
"""


def _train(argv: Sequence[str]) -> int:
    from mlm_plugin.config.loading import load_config, parser
    from mlm_plugin.sd_scripts.locate import find_checkout, launch_options

    options = launch_options(argv)
    checkout = find_checkout(options, script=sys.argv[0])
    if checkout is not None:
        from mlm_plugin.sd_scripts.launch import train as train_in_sd_scripts

        return train_in_sd_scripts(argv, checkout, options)
    if "-h" in argv or "--help" in argv:
        parser(prog="train_network_mlm.py").print_help()
        return 0
    config = load_config(argv)  # a mistake is told before torch is imported, which takes seconds
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.train import train

    return train(config)


def _pretrain(argv: Sequence[str]) -> int:
    from mlm_plugin.config.pretraining import parse_pretrain

    command = parse_pretrain(argv)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.pretrain import run_pretrain

    return run_pretrain(command)


def _pocket(argv: Sequence[str]) -> int:
    from mlm_plugin.demo.command import run_pocket

    return run_pocket(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from mlm_plugin.evaluation.options import parse_evaluate

    command = parse_evaluate(argv)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.evaluate import run_evaluate

    return run_evaluate(command)


def _sheet(argv: Sequence[str]) -> int:
    from mlm_plugin.sheet.options import parse_sheet

    options = parse_sheet(argv)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.sheet import run_sheet

    return run_sheet(options)


def _doctor(argv: Sequence[str]) -> int:
    from mlm_plugin.doctor.options import parse_doctor

    options = parse_doctor(argv)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.doctor import run_doctor

    return run_doctor(options)


def _compare(argv: Sequence[str]) -> int:
    from mlm_plugin.compare.options import parse_compare
    from mlm_plugin.compare.plan import read_plan

    command = parse_compare(argv)
    plan = read_plan(command.plan)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.compare.run import run_compare

    return run_compare(command, plan)


def _estimate(argv: Sequence[str]) -> int:
    from mlm_plugin.estimate.options import parse_estimate

    command = parse_estimate(argv)
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.commands.estimate import run_estimate

    return run_estimate(command)


def _prompts(argv: Sequence[str]) -> int:
    from mlm_plugin.commands.prompts import run_prompts

    return run_prompts(argv)


def _convert_preset(argv: Sequence[str]) -> int:
    from mlm_plugin.config.gui_presets import run_convert_preset

    return run_convert_preset(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "pretrain": _pretrain,
    "prompts": _prompts,
    "estimate": _estimate,
    "evaluate": _evaluate,
    "sheet": _sheet,
    "doctor": _doctor,
    "compare": _compare,
    "pocket": _pocket,
    "convert-preset": _convert_preset,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `mlm-plugin`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [TRACEBACK]:  # first of all words, it counts as last
        arguments = [*arguments[1:], TRACEBACK]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"mlm-plugin {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"error: {name!r} is not a command; choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return exit_code_of(COMMANDS[name], arguments[1:])


def train_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `train_network_mlm.py`."""
    return exit_code_of(_train, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
