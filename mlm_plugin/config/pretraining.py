"""Options of `mlm-plugin pretrain`, declared once. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlm_plugin.config.commands import LARGEST_SEED, CommandParser
from mlm_plugin.errors import UserError

__all__ = ["RECIPE", "SMALL_ENCODER", "PretrainCommand", "PretrainOptions", "parse_pretrain"]


RECIPE = 2
"""Increase it when masks, prompts or the network change: cached ones are then made again."""


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainOptions:
    """Recipe of the pretraining."""

    max_train_steps: int = _option(
        3000, "Upper bound of the steps; it stops earlier when the held-out loss is flat."
    )
    batch_size: int = _option(128, "Prompts per step.")
    learning_rate: float = _option(
        5e-4, "Peak rate of AdamW; linear warm-up, cosine decay to a tenth."
    )
    warmup_steps: int = _option(100, "Steps of the warm-up.")
    mlm_probability: float = _option(
        0.25,
        "Share of words to mask; more than in training, so that each prompt gives more labels.",
    )
    eval_every_n_steps: int = _option(250, "Steps between two evaluations on the held-out prompts.")
    patience: int = _option(
        3, "Stop after this many evaluations that lower the held-out loss by less than 1 %."
    )
    num_held_out: int = _option(512, "Held-out prompts.")
    width: int = _option(0, "Inner width of the contextualizer; 0: by the text encoder, 64 to 384.")
    num_layers: int = _option(
        4, "Blocks of the contextualizer; 0: every word is predicted from its own state alone."
    )
    caption_share: float = _option(0.5, "Share of prompts that are drawn from --captions.")
    seed: int = _option(0, "Random seed.")

    def __post_init__(self):
        for name in ("max_train_steps", "batch_size", "eval_every_n_steps", "patience",
                     "num_held_out"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"--{name} = {getattr(self, name)}: must be at least 1")
        for name in ("num_layers", "warmup_steps", "seed", "width"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} = {getattr(self, name)}: must be at least 0")
        if self.seed > LARGEST_SEED:
            raise UserError(f"--seed = {self.seed}: must be at most {LARGEST_SEED}")
        if not 0 <= self.learning_rate < math.inf:
            raise UserError(f"--learning_rate = {self.learning_rate}: must be finite, at least 0")
        if not 0 < self.mlm_probability <= 1:
            raise UserError(f"--mlm_probability = {self.mlm_probability}: must be above 0, up to 1")
        if not 0 < self.caption_share <= 1:
            raise UserError(f"--caption_share = {self.caption_share}: must be above 0, up to 1")

    def continued(self) -> PretrainOptions:
        """The recipe when it starts from the contextualizer of a similar text encoder."""
        return dataclasses.replace(
            self,
            max_train_steps=self.max_train_steps // 10,
            learning_rate=self.learning_rate / 2,
            warmup_steps=min(self.warmup_steps, self.max_train_steps // 100),
            eval_every_n_steps=max(1, self.max_train_steps // 60),
        )


SMALL_ENCODER = PretrainOptions(
    max_train_steps=300, batch_size=64, learning_rate=2e-3, eval_every_n_steps=100, num_layers=2
)
"""Enough for a text encoder far smaller than CLIP's, such as the built-in one."""


@dataclass(frozen=True)
class PretrainCommand:
    """The options of `mlm-plugin pretrain`."""

    pretrained_model_name_or_path: str
    output: str
    captions: tuple[str, ...]
    clip_skip: int | None
    tokenizer_cache_dir: str | None
    options: PretrainOptions


def parse_pretrain(argv: Sequence[str]) -> PretrainCommand:
    """Read the command line of `mlm-plugin pretrain`.

    Raises:
        UserError: an unknown flag, a missing one, or a value out of range.
    """
    parser = CommandParser(
        prog="mlm-plugin pretrain",
        allow_abbrev=False,
        description="Train a contextualizer for a text encoder. Only mlm_target class and word "
        "need one, and their runs make it themselves (--mlm_contextualizer auto); run this by "
        "hand to use captions of your own.",
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True, metavar="MODEL",
                        help="Folder, hub id or file of the model, as in training.")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE",
                        help="The .safetensors file to write; SDXL has two, "
                             "FILE_te1 and FILE_te2.")  # fmt: skip
    parser.add_argument("--captions", nargs="+", default=(), metavar="FILE",
                        help="Text files, one caption per line.")  # fmt: skip
    parser.add_argument("--clip_skip", type=int, metavar="N", help="As in the training to come.")
    parser.add_argument("--tokenizer_cache_dir", metavar="DIR", help="As in training.")
    for item in dataclasses.fields(PretrainOptions):
        parser.add_argument(
            f"--{item.name}",
            type=type(item.default),
            default=item.default,
            metavar="X" if isinstance(item.default, float) else "N",
            help=item.metadata["help"].replace("%", "%%") + " (default: %(default)s)",
        )
    given = vars(parser.parse_args(list(argv)))
    if not given["output"].endswith(".safetensors"):
        raise UserError(f"--output {given['output']}: the name must end in .safetensors")
    options = PretrainOptions(
        **{item.name: given.pop(item.name) for item in dataclasses.fields(PretrainOptions)}
    )
    if given["clip_skip"] is not None and given["clip_skip"] < 1:
        raise UserError(f"--clip_skip = {given['clip_skip']}: must be at least 1")
    if options.caption_share != PretrainOptions.caption_share and not given["captions"]:
        raise UserError(
            f"--caption_share = {options.caption_share}: does nothing without --captions"
        )
    return PretrainCommand(**{**given, "captions": tuple(given["captions"])}, options=options)
