"""`mlm-plugin pocket`: its command line. Torch is imported once the work begins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.errors import UserError
from mlm_plugin.files import require_writable

__all__ = ["run_pocket"]


def run_pocket(argv: Sequence[str]) -> int:
    """Run `mlm-plugin pocket ...`; returns the exit code.

    Raises:
        UserError: an unknown flag, a missing one, or a device that is not there.
    """
    parser = CommandParser(
        prog="mlm-plugin pocket", description="The pocket world and its diffusion model."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_build, _add_concept, _add_demo, _add_bench):
        add(commands)
    given = parser.parse_args(list(argv))
    return given.run(given)


def _add_build(commands) -> None:
    build = commands.add_parser(
        "build",
        help="train the pocket model from scratch",
        description="Train the pocket model from scratch: autoencoder, CLIP, oracle, U-Net. Hours "
        "on a CPU; the same command goes on where it stopped.",
    )
    build.add_argument("--output", required=True, type=Path, metavar="DIR",
                       help="Folder of the model.")  # fmt: skip
    build.add_argument("--tiny", action="store_true",
                       help="A miniature in under a minute, to see that it learns.")  # fmt: skip
    build.add_argument("--seed", type=int, default=0, metavar="N",
                       help="Names every random draw (default: 0).")  # fmt: skip
    build.add_argument("--device", default="auto", metavar="NAME",
                       help="auto, cpu, cuda, cuda:1, mps (default: auto).")  # fmt: skip
    build.set_defaults(run=_run_build)


def _add_concept(commands) -> None:
    concept = commands.add_parser(
        "concept",
        help="write a new thing's training pictures and test prompts",
        description="Write DIR/train, a kohya data folder of four pictures that share background "
        "and position; DIR/test_prompts.txt for `mlm-plugin evaluate --prompts`, with what each "
        "prompt asks for beside it in test_prompts.json; and DIR/contexts.txt for "
        "`--mlm_prompt_set`.",
    )
    concept.add_argument("--concept", required=True, metavar="NAME",
                         help='Which one, as prompts call it, such as "sks dog".')  # fmt: skip
    concept.add_argument("--output", required=True, type=Path, metavar="DIR",
                         help="Folder to write to.")  # fmt: skip
    concept.set_defaults(run=_run_concept)


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="learn one thing plain and with the MLM term, and show both side by side",
        description="Train a LoRA of the built-in concept twice, with equal seeds, without and "
        "with the MLM term. Writes both files and DIR/grid.png: the same prompts and noise through "
        "the base model and both.",
    )
    _add_folders(demo, written="files")
    demo.add_argument("--concept", default="vvq cat", metavar="NAME",
                      help='What is learned, as prompts call it (default: "vvq cat").')  # fmt: skip
    demo.set_defaults(run=_run_demo)


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="methods, the MLM term and its rivals on concepts whose truth is known",
        description="Train every method plain and with the MLM term, and rivals of the term, on "
        "concepts the model has never seen; an oracle reads the pictures. Writes results.json, "
        "table.md and report.html; the same command goes on where it stopped.",
    )
    _add_folders(bench, written="results")
    bench.add_argument("--short", action="store_true",
                       help="LoRA and its nearest rivals only: minutes, not hours.")  # fmt: skip
    bench.add_argument("--method", nargs="+", metavar="M",
                       help="Only these methods (default: all of the plan).")  # fmt: skip
    bench.add_argument("--tuning", action="store_true",
                       help="On the concepts that settings are chosen on, not those that are "
                       "reported.")  # fmt: skip
    bench.add_argument("--jobs", type=int, default=1, metavar="N",
                       help="Trainings at once, each with its share of cores.")  # fmt: skip
    bench.set_defaults(run=_run_bench)


def _add_folders(command: argparse.ArgumentParser, *, written: str) -> None:
    command.add_argument("--output", required=True, type=Path, metavar="DIR",
                         help=f"Folder of the {written}.")  # fmt: skip
    command.add_argument("--model", default="pocket", metavar="DIR",
                         help="Folder of a pocket model (default: the built-in one).")  # fmt: skip


def _run_concept(given: argparse.Namespace) -> int:
    from mlm_plugin.pocket.concepts import find_concept, write_concept

    concept = find_concept(given.concept)
    write_concept(concept, given.output)
    print(f"{given.output}: pictures of {concept.name} in train/, test_prompts.txt, contexts.txt")
    return 0


def _run_demo(given: argparse.Namespace) -> int:
    from mlm_plugin.bench.plan import DEMO
    from mlm_plugin.pocket.concepts import find_concept

    concept = find_concept(given.concept)
    model = _prepare(given.model)
    from mlm_plugin.bench.demo import run_demo

    require_writable(given.output, "--output")
    return run_demo(DEMO, concept, model=model, output=given.output)


def _run_bench(given: argparse.Namespace) -> int:
    from mlm_plugin.bench.plan import FULL, SHORT, chosen

    plan = chosen(SHORT if given.short else FULL, methods=given.method, tuning=given.tuning)
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: must be at least 1")
    model = _prepare(given.model)
    from mlm_plugin.bench.run import run_bench

    return run_bench(plan, model=model, output=given.output, jobs=given.jobs)


def _prepare(name: str) -> Path:
    """A quiet console, and the folder of a pocket model."""
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
            "(`mlm-plugin pocket build` makes one)"
        )
    return model


def _run_build(given: argparse.Namespace) -> int:
    from mlm_plugin.pocket.build import FULL, TINY, build
    from mlm_plugin.pocket.stage import Interrupted

    if given.seed < 0:
        raise UserError(f"--seed {given.seed}: must not be negative")
    try:
        card = build(
            given.output,
            recipe=TINY if given.tiny else FULL,
            seed=given.seed,
            device=_device(given.device),
        )
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    for name, share in card["accuracy"].items():
        print(f"  {name:<12} {share:6.1%}")
    print(f"  {'two at once':<12} {card['mean_of_pairs']:6.1%}")
    print(f"{given.output}: {card['num_prompts']} held-out prompts, see quality.json")
    return 0


def _device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used ({reason}); try auto") from error
    return device
