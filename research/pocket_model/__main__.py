"""``python -m research.pocket_model``: train the pocket model from scratch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.errors import UserError
from mlm_plugin.failures import exit_code_of

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Train and print the quality of the model; returns the exit code.

    Raises:
        UserError: an unknown flag, a missing one, or a device that is not available.
    """
    given = _parser().parse_args(list(argv))
    if given.seed < 0:
        raise UserError(f"--seed {given.seed}: must not be negative")
    from research.pocket_model.build import FULL, TINY, build
    from research.pocket_model.train_loop import Interrupted

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


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m research.pocket_model",
        description="Train the pocket model from scratch: autoencoder, CLIP, oracle, U-Net. Hours "
        "on a CPU; the same command continues where it stopped.",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR",
                        help="Folder of the model.")  # fmt: skip
    parser.add_argument("--tiny", action="store_true",
                        help="A miniature in under a minute, to see that it learns.")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="Names every random draw (default: 0).")  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="auto, cpu, cuda, cuda:1, mps (default: auto).")  # fmt: skip
    return parser


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


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
