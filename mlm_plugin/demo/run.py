"""`mlm-plugin pocket demo`: one concept learned twice, and the effect on prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from mlm_plugin.demo.grid import comparison_grid
from mlm_plugin.demo.options import LORA, MLM_WEIGHT, Paths, mlm_options, run_options
from mlm_plugin.demo.trial import (
    ConceptTest,
    Evaluation,
    EvaluationCallback,
    Scores,
    create_trainer,
    pipeline_of,
)
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.pocket.concepts import Concept, prompt_templates, write_concept
from mlm_plugin.pocket.oracle import load_oracle
from mlm_plugin.pocket.shipped import CONTEXTUALIZER
from mlm_plugin.pocket.text_to_image import Sampling
from mlm_plugin.setup.console import output_to
from mlm_plugin.training.interrupt import Stopped

__all__ = ["run_demo"]

SEED = 1
NUM_TRAIN_STEPS = 300
SAMPLING = Sampling(num_steps=30, guidance=4.0)
NUM_SHOWN = 6  # prompts in the grid


def run_demo(
    concept: Concept,
    *,
    model: Path,
    output: Path,
    num_train_steps: int = NUM_TRAIN_STEPS,
    sampling: Sampling = SAMPLING,
) -> int:
    """Train without and with the term, write the files and ``grid.png``; returns the exit code.

    Args:
        concept: what is learned.
        model: folder of a pocket model.
        output: new files go here.
        num_train_steps: steps of each training.
        sampling: how pictures are drawn.
    """
    test = ConceptTest(
        concept, SEED, load_oracle(model / "oracle.safetensors"), sampling, num_pictures=1
    )
    folder = output / "concepts" / concept.name.replace(" ", "_")
    if not (folder / "train").exists():
        write_concept(concept, folder)
    term = mlm_options(
        MLM_WEIGHT, prompts=folder / "contexts.txt", contextualizer=model / CONTEXTUALIZER
    )
    base = pipeline_of(load_stable_diffusion(str(model)))
    evaluations = {"base model": test.evaluate(base)}
    ceiling = test.evaluate(base, words=concept.scene.subject).scores
    for title, name, more in (("plain", "plain", {}), ("with MLM", "mlm", term)):
        print(f"training {concept.name!r}, {title}: {num_train_steps} steps", flush=True)
        paths = Paths(model, folder / "train", output / name)
        options = run_options(paths, method="lora", num_steps=num_train_steps, seed=SEED)
        try:
            evaluations[title] = _train(test, {**options, **LORA, **more})
        except Stopped as stopped:
            print(f"stopped: {stopped}", file=sys.stderr)
            return stopped.exit_code
    texts = [prompt.text.replace("{}", concept.name) for prompt in prompt_templates(concept)]
    columns = {title: found.pictures for title, found in evaluations.items()}
    with atomic_path(output / "grid.png") as temporary:
        comparison_grid(concept, texts[:NUM_SHOWN], columns).save(temporary)
    print(f"wrote {output / 'plain' / 'last.safetensors'}, {output / 'mlm' / 'last.safetensors'} "
          f"and {output / 'grid.png'}")  # fmt: skip
    plain, mlm = (evaluations[title].scores for title in ("plain", "with MLM"))
    print(result_line(concept, plain, mlm, ceiling))
    return 0


def _train(test: ConceptTest, options: dict[str, str]) -> Evaluation:
    """Train, let the trainer write its files, and evaluate after the last step."""
    with output_to(Path(options["output_dir"]) / "log.txt"):
        trainer, _ = create_trainer(options)
        callback = EvaluationCallback(test, [int(options["max_train_steps"])])
        trainer.callbacks = [callback, *trainer.callbacks]
        trainer.run()
    return callback.last


def result_line(concept: Concept, plain: Scores, mlm: Scores, ceiling: Scores) -> str:
    """What the oracle saw, in one line."""
    return (
        f"of what {len(prompt_templates(concept))} prompts ask for, the pictures show "
        f"{plain.prompt_fidelity:.0%} plain and {mlm.prompt_fidelity:.0%} with MLM "
        f"({ceiling.prompt_fidelity:.0%} for an ordinary {concept.scene.subject}); the "
        f"{concept.scene.subject} is itself to {plain.identity:.0%} plain and {mlm.identity:.0%} "
        "with MLM"
    )
