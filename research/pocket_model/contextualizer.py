"""How contextualizers of the pocket model are pretrained: on captions of its world."""

from __future__ import annotations

from collections.abc import Callable

from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.pocket.captions import caption_scene
from mlm_plugin.pocket.world import Scene, draw_scene, generator_of

__all__ = ["CONTEXTUALIZER_RECIPE", "contextualizer_captions"]

NUM_CAPTIONS = 20_000
CONTEXTUALIZER_RECIPE = PretrainOptions(
    max_train_steps=1500,
    batch_size=64,
    learning_rate=2e-3,
    eval_every_n_steps=250,
    num_layers=2,
    caption_share=1.0,
)


def contextualizer_captions(*, seed: int, draw: Callable[..., Scene] = draw_scene) -> list[str]:
    """Captions of the world, with ordinary subjects, for a contextualizer to learn from.

    Args:
        seed: seed of every draw.
        draw: draws the scenes, called like ``draw_scene``.
    """
    rng = generator_of("contextualizer captions", seed)
    return [caption_scene(draw(rng), rng).text for _ in range(NUM_CAPTIONS)]
