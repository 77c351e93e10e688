"""Draws the tiles of a contact sheet: one model, whose LoRA changes its strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from PIL.Image import Image

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.evaluated_model import EvaluatedModel
from mlm_plugin.evaluation.generate import DrawingSettings, draw
from mlm_plugin.networks.base import Network

__all__ = ["check_parts", "draw_columns"]


def check_parts(network: Network, *, text_encoder_scale: float | None) -> None:
    """Refuse strengths that would act on nothing.

    Raises:
        UserError: a strength of its own for the text encoders, and the file lacks one of the parts.
    """
    if text_encoder_scale is None:
        return
    if not network.num_text_encoder_modules:
        raise UserError(
            "--text_encoder_scale: the file changes the U-Net alone; drop it, --scales are its "
            "strengths"
        )
    if not network.num_unet_modules:
        raise UserError(
            "--text_encoder_scale: the file changes the text encoder alone; drop it, --scales are "
            "its strengths"
        )


def draw_columns(
    model: EvaluatedModel,
    prompts: Sequence[str],
    scales: Sequence[float],
    settings: DrawingSettings,
    *,
    text_encoder_scale: float | None = None,
    on_picture: Callable[[int], None] = lambda number: None,
) -> Iterator[list[Image]]:
    """The pictures of each column from top to bottom; every prompt from the noise of one seed.

    Args:
        model: on its device, with a network.
        prompts: of the rows.
        scales: strengths of the columns; 0 is the base model.
        settings: how to draw.
        text_encoder_scale: of the text encoders' part, unless the column is the base model's.
        on_picture: told how many more pictures are ready.
    """
    for scale in scales:
        of_text = scale if text_encoder_scale is None or scale == 0 else text_encoder_scale
        model.network.set_strength(text_encoder=of_text, unet=scale)
        column = []
        for start in range(0, len(prompts), settings.batch_size):
            batch = prompts[start : start + settings.batch_size]
            column += draw(model, batch, [settings.seed] * len(batch), settings)
            on_picture(len(batch))
        yield column
