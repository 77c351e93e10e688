"""Does the score from text alone rank files as pictures do?

Run by ``python -m research.bench.text_score``.

The plan, written before the run: LoRAs of the reported concepts, trained at three settings and
evaluated at five steps. For every evaluation the oracle's prompt fidelity and identity, and what
``ContextScore`` says of the same weights. The score at the keys and values was chosen on the tuning
concepts. Reported are Spearman's rank correlations of score and prompt fidelity: over all
evaluations, the same at equal identity (partial correlation), at equal step, and within runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.demo.command import add_folders, prepare_model
from mlm_plugin.evaluation.measures import student_t_quantile
from mlm_plugin.failures import exit_code_of
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.pocket.concepts import REPORTED
from research.bench.plan import ARMS, Trial

__all__ = [
    "RECORD",
    "SETTINGS",
    "STEPS",
    "correlations",
    "intervals",
    "read_evaluations",
    "spearman",
]

RECORD = Path(__file__).parents[1] / "results" / "text_score.json"
STEPS = (25, 50, 100, 150, 200)
SETTINGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "plain": ("lora plain", {"unet_lr": "5e-3", "text_encoder_lr": "5e-4"}),
    "plain, strong text encoder": ("lora plain", {"unet_lr": "5e-3", "text_encoder_lr": "5e-3"}),
    "with the term": ("lora both/states", {"text_encoder_lr": "5e-4", "weight": "0.3"}),
}
"""Arm and setting by name. The second is what a user gets who gives both parts the same rate."""

Evaluation = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    """Train what is missing; every finished run is recorded at once."""
    parser = CommandParser(prog="python -m research.bench.text_score", description=__doc__)
    add_folders(parser, written="scratch files")
    given = parser.parse_args(list(argv))
    model = prepare_model(given.model)
    from research.bench.context import BenchContext

    context = BenchContext(model, given.output)
    for concept in REPORTED:
        for name, (arm, setting) in SETTINGS.items():
            evaluations = read_evaluations()
            if any((one["concept"], one["setting"]) == (concept.name, name) for one in evaluations):
                continue
            evaluations += _run(name, Trial(ARMS[arm], setting, concept, 0), context)
            _write(evaluations)
            print(f"{concept.name}, {name}: done", flush=True)
    return 0


def read_evaluations(path: Path = RECORD) -> list[Evaluation]:
    """The records; empty before the first run."""
    return json.loads(read_text(path)) if path.exists() else []


def _write(evaluations: Iterable[Evaluation]) -> None:
    lines = ",\n".join(json.dumps(one) for one in evaluations)
    with atomic_path(RECORD) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _run(name: str, trial: Trial, context) -> list[Evaluation]:
    from mlm_plugin.demo.trial import ConceptTest, EvaluationCallback
    from mlm_plugin.training.context_score import ContextScore, ScoredModel, ScorePrompts
    from research.bench.trial import trainer_of

    trainer = trainer_of(trial, context, context.folder / "text_score")
    concept = trial.concept
    texts = [text.replace("{}", concept.name) for text in context.prompts(concept, "free")[1]][:32]
    trainer.method.train(False)
    prompts = ScorePrompts(texts, [concept.name] * len(texts))
    score = ContextScore(ScoredModel.of_method(trainer.method), prompts)
    evaluations: list[Evaluation] = []

    class ScoredEvaluations(EvaluationCallback):
        def on_step_end(self, trainer, result) -> None:
            super().on_step_end(trainer, result)
            step = trainer.progress.current_step
            if step in self.steps:
                with trainer.evaluating():
                    reading = score()
                found = self.evaluations[step].scores
                evaluations.append(
                    {
                        "concept": concept.name,
                        "setting": name,
                        "step": step,
                        "fidelity": round(found.prompt_fidelity, 4),
                        "identity": round(found.identity, 4),
                        **{key: round(share, 4) for key, share in reading._asdict().items()},
                    }
                )

    test = ConceptTest(concept, 0, context.oracle, context.sampling, num_pictures=1)
    trainer.callbacks = [ScoredEvaluations(test, STEPS)]
    trainer.run()
    return evaluations


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank. 0 where one side does not vary."""
    ranks = [_ranks(values) for values in (xs, ys)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(rank.std() > 0 for rank in ranks) else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[inverse]


def partial(xy: float, xz: float, yz: float) -> float:
    """Correlation of x and y at equal z."""
    return (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5


def correlations(evaluations: Sequence[Evaluation], score: str) -> dict[str, float]:
    """What is reported of one of the two scores."""

    def rho(members: Sequence[Evaluation], x: str, y: str) -> float:
        return spearman([one[x] for one in members], [one[y] for one in members])

    def mean_within(key: Callable[[Evaluation], Any]) -> float:
        groups = defaultdict(list)
        for one in evaluations:
            groups[key(one)].append(one)
        return mean(rho(members, score, "fidelity") for members in groups.values())

    overall = rho(evaluations, score, "fidelity")
    return {
        "all files": overall,
        "at equal identity": partial(
            overall, rho(evaluations, score, "identity"), rho(evaluations, "fidelity", "identity")
        ),
        "files of one step": mean_within(lambda one: one["step"]),
        "files of one concept": mean_within(lambda one: one["concept"]),
        "steps of one run": mean_within(lambda one: (one["concept"], one["setting"])),
    }


def intervals(evaluations: Sequence[Evaluation], score: str) -> dict[str, float]:
    """Half the width of the 95 % intervals of ``correlations``, by the jackknife over concepts.

    ``se^2 = (n - 1) / n * sum_i (r_(i) - mean r)^2``, ``r_(i)`` without the i-th of n concepts.

    Source: Efron and Stein 1981, "The jackknife estimate of variance".
    """
    concepts = sorted({one["concept"] for one in evaluations})
    without = [
        correlations([one for one in evaluations if one["concept"] != left_out], score)
        for left_out in concepts
    ]
    n = len(concepts)
    return {
        kind: student_t_quantile(n - 1)
        * float(np.std([found[kind] for found in without]) * (n - 1) ** 0.5)
        for kind in without[0]
    }


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
