"""What a fine-tuned text encoder gains from the contextualizer of its base, on the pocket model.

    python train_network_mlm.py --config_file presets/quickstart.toml --method dreambooth \
        --learning_rate 1e-4 --learning_rate_te 3e-4 --max_train_steps 150 --mlm_loss_weight 0 \
        --save_diffusers_folder --output_dir tuned --output_name tuned
    python -m research.benchmarks.contextualizer_start --fine_tune tuned/tuned

Prints the share of hidden held-out words that are named: by the shipped contextualizer as it is,
after some steps from there, and after as many steps from nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import CLIPTextModel, CLIPTokenizer

from mlm_plugin.contextualizer_file import read_contextualizer
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.shipped import CONTEXTUALIZER, SHIPPED
from mlm_plugin.pretraining.run import Start, pretrain
from research.pocket_model.contextualizer import CONTEXTUALIZER_RECIPE, contextualizer_captions


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fine_tune", type=Path, required=True, help="Its diffusers folder.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 50, 150])
    given = parser.parse_args()
    text_encoder = TextEncoder(
        CLIPTokenizer.from_pretrained(given.fine_tune / "tokenizer"),
        CLIPTextModel.from_pretrained(given.fine_tune / "text_encoder").eval(),
    )
    network, facts = read_contextualizer(SHIPPED / CONTEXTUALIZER)
    print(f"shipped, on its own encoder, {facts.num_steps} steps: {facts.accuracy:.1%}", flush=True)
    captions = contextualizer_captions(seed=0)
    adapted = CONTEXTUALIZER_RECIPE.continued()
    start = Start(network, facts.accuracy, facts.text_encoder)
    with TemporaryDirectory() as folder:
        for steps in given.steps:
            for name, recipe, from_where in (
                ("from the shipped one", adapted, start),
                ("from nothing", CONTEXTUALIZER_RECIPE, None),
            ):
                scores = pretrain(
                    text_encoder,
                    Path(folder) / "contextualizer.safetensors",
                    options=dataclasses.replace(recipe, max_train_steps=steps),
                    captions=captions,
                    start=from_where,
                    show_progress=False,
                )
                print(f"{name}, {steps} steps: {scores.accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
