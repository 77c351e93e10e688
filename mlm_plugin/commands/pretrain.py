"""`mlm-plugin pretrain`: load text encoders, train their contextualizers, print their scores."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mlm_plugin.config.options import LogOptions
from mlm_plugin.config.pretraining import PretrainCommand
from mlm_plugin.contextualizer_file import fits, read_contextualizer, save_contextualizer
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.corpus import read_caption_files, require_both_sides
from mlm_plugin.pretraining.find import pretrain_on_device
from mlm_plugin.pretraining.run import Interrupted, NotSaved, Scores, checksum, state_file
from mlm_plugin.setup.builtin_names import model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console

__all__ = ["run_pretrain"]


def run_pretrain(command: PretrainCommand) -> int:
    """Run the command; returns the exit code."""
    setup_console(LogOptions())
    quiet_libraries()
    captions = read_caption_files(command.captions)
    require_both_sides(captions, command.options.caption_share)  # before a model is loaded
    models = load_stable_diffusion(
        model_path(command.pretrained_model_name_or_path),
        ModelSettings(clip_skip=command.clip_skip, tokenizer_cache_dir=command.tokenizer_cache_dir),
    )
    text_encoders = models.text_encoders
    del models  # the U-Net is not needed
    outputs = output_files(Path(command.output), len(text_encoders))
    try:
        for text_encoder, output in zip(text_encoders, outputs, strict=True):
            is_resumed = output != outputs[-1] and state_file(outputs[-1]).is_file()
            if is_resumed and _is_made_so(output, text_encoder, command, captions):
                print(f"{output}: is done already")
                continue
            text_encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
            scores = pretrain_on_device(
                text_encoder, output, options=command.options, captions=captions
            )
            text_encoder.model.to("cpu")
            print(f"{output}: {_summary(scores)}")
            for name, family in scores.families.items():
                print(f"  {name:<24} {family.accuracy:6.1%}   {family.loss:6.3f} nats")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except NotSaved as error:
        print(f"error: {output} could not be saved ({error.strerror}){_rescued(error, output)}",
              file=sys.stderr)  # fmt: skip
        return 1
    if len(outputs) > 1:
        print(f"--mlm_contextualizer {','.join(map(str, outputs))}")
    return 0


def _is_made_so(
    output: Path, text_encoder: TextEncoder, command: PretrainCommand, captions: Sequence[str]
) -> bool:
    """Whether a file is for this text encoder and was made with these options and captions."""
    if not fits(output, text_encoder):
        return False
    recipe = {**asdict(command.options), "captions": checksum(captions)}
    made_with = read_contextualizer(output)[1].training
    return all(made_with.get(name) == value for name, value in recipe.items())


def _rescued(error: NotSaved, output: Path) -> str:
    """Where the contextualizer is instead: in the system's temporary folder."""
    try:
        path = Path(tempfile.mkdtemp(prefix="mlm_plugin-")) / output.name
        save_contextualizer(path, error.network, error.facts)
    except OSError as second:
        return f", nor in a temporary folder ({second})"
    return f"; it is saved as {path}, in a temporary folder: move it now"


def output_files(output: Path, num_text_encoders: int) -> list[Path]:
    """The file of each text encoder: ``output``, or ``output`` with a number for SDXL's two."""
    if num_text_encoders == 1:
        return [output]
    numbers = range(1, num_text_encoders + 1)
    return [output.with_name(f"{output.stem}_te{number}{output.suffix}") for number in numbers]


def _summary(scores: Scores) -> str:
    return f"names {scores.accuracy:.1%} of hidden held-out words, loss {scores.loss:.3f} nats"
