"""The command line of `mlm-plugin pocket`. Torch is imported only when the work starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.errors import UserError
from mlm_plugin.files import require_writable

__all__ = ["DEFAULT_CONCEPT", "add_folders", "prepare_model", "run_pocket"]

IN_A_CHECKOUT = {"build": "research.pocket_model", "bench": "research.bench"}
"""Commands that are not in the installed package, and the modules that replace them."""

DEFAULT_CONCEPT = "zwx robot"
"""Of the demo: one of the three reported concepts of which plain training draws least."""


def run_pocket(argv: Sequence[str]) -> int:
    """Run `mlm-plugin pocket ...`; returns the exit code.

    Raises:
        UserError: an unknown command or flag, a missing one, or one that needs a checkout.
    """
    if argv and argv[0] in IN_A_CHECKOUT:
        raise UserError(
            f"pocket {argv[0]}: not part of the installed package; in a checkout run "
            f"`python -m {IN_A_CHECKOUT[argv[0]]}`"
        )
    parser = CommandParser(
        prog="mlm-plugin pocket", description="The pocket world and its diffusion model."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_concept, _add_demo):
        add(commands)
    given = parser.parse_args(list(argv))
    return given.run(given)


def _add_concept(commands) -> None:
    concept = commands.add_parser(
        "concept",
        help="write a new concept's training pictures and test prompts",
        description="Write DIR/train, a kohya data folder of four pictures that share background "
        "and position; DIR/test_prompts.txt for `mlm-plugin evaluate --prompts`, with what each "
        "prompt asks for beside it in test_prompts.json; and DIR/contexts.txt for "
        "`--mlm_prompt_set`.",
    )
    concept.add_argument("--concept", required=True, metavar="NAME",
                         help='Its name in prompts, such as "sks dog".')  # fmt: skip
    concept.add_argument("--output", required=True, type=Path, metavar="DIR",
                         help="Folder to write to.")  # fmt: skip
    concept.set_defaults(run=_run_concept)


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="learn one concept with and without the MLM term, and show both side by side",
        description="Train a LoRA of a concept twice, with equal seeds, without and with the MLM "
        "term, at rates that the bench found. Writes both files and DIR/demo.png: the same "
        "prompts and noise through the base model and both, with a mark where a picture is not as "
        "asked. Stopped, the same command goes on.",
    )
    add_folders(demo, written="files")
    demo.add_argument("--concept", default=DEFAULT_CONCEPT, metavar="NAME",
                      help=f'Its name in prompts (default: "{DEFAULT_CONCEPT}").')  # fmt: skip
    demo.set_defaults(run=_run_demo)


def add_folders(command: argparse.ArgumentParser, *, written: str) -> None:
    """Declare ``--output`` and ``--model``."""
    command.add_argument("--output", required=True, type=Path, metavar="DIR",
                         help=f"Folder of the {written}.")  # fmt: skip
    command.add_argument("--model", default="pocket", metavar="DIR",
                         help="Folder of a pocket model (default: the built-in one).")  # fmt: skip


def _run_concept(given: argparse.Namespace) -> int:
    from mlm_plugin.pocket.concepts import find_concept, write_concept

    concept = find_concept(given.concept)
    folders = sorted((given.output / "train").glob("[0-9]*_*"))
    others = [path.name for path in folders if not path.name.endswith(f"_{concept.name}")]
    if others:
        raise UserError(
            f"--output {given.output}: holds another concept (train/{others[0]}); choose another "
            "folder"
        )
    write_concept(concept, given.output)
    print(f"{given.output}: pictures of {concept.name} in train/, test_prompts.txt, contexts.txt")
    return 0


def _run_demo(given: argparse.Namespace) -> int:
    from mlm_plugin.pocket.concepts import find_concept

    concept = find_concept(given.concept)
    model = prepare_model(given.model)
    from mlm_plugin.demo.run import run_demo

    require_writable(given.output, "--output")
    return run_demo(concept, model=model, output=given.output)


def prepare_model(name: str) -> Path:
    """Silence the console and find the folder of a pocket model.

    Raises:
        UserError: the folder has no oracle.
    """
    from mlm_plugin.setup.console import quiet_imports

    quiet_imports()
    from mlm_plugin.config.options import LogOptions
    from mlm_plugin.setup.builtin_names import model_path
    from mlm_plugin.setup.console import quiet_libraries, setup_console

    setup_console(LogOptions(console_log_level="WARNING"))
    quiet_libraries()
    model = Path(model_path(name))
    if not (model / "oracle.safetensors").is_file():
        raise UserError(
            f"--model {name}: no oracle.safetensors there; give the folder of a pocket model "
            "(`python -m research.pocket_model` in a checkout makes one)"
        )
    return model
