"""What is compared: one setting per method and regularizer, and the grids over weights and parts.

Learning rates, weights and lengths were chosen on the tuning concepts; the table reports others.
Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlm_plugin.demo.options import LORA, MLM_WEIGHT
from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import CONTEXT_FAMILIES, REPORTED, TUNING, Concept

__all__ = [
    "FULL",
    "METHOD_FLAGS",
    "MLM_WEIGHTS",
    "SHORT",
    "BenchPlan",
    "ContextChoice",
    "Setting",
    "chosen",
]

Flags = Mapping[str, str]


@dataclass(frozen=True)
class ContextChoice:
    """The prompts of a term: how many, and which attributes they may name."""

    number: int = 1000
    families: tuple[str, ...] = CONTEXT_FAMILIES


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        method: value of ``--method``.
        regularizer: ``plain``, ``mlm``, a rival, ``prior_preservation`` or ``unet_only``.
        weight: weight of its term.
        variant: the difference to the default, for ablations.
        flags: additional options of the trainer.
        contexts: the prompts of the term.
        num_blocks: blocks of the contextualizer; 0 predicts every word from its own state alone.
    """

    method: str
    regularizer: str = "plain"
    weight: float = 0.0
    variant: str = ""
    flags: Flags = field(default_factory=dict)
    contexts: ContextChoice = ContextChoice()
    num_blocks: int = 2

    @property
    def name(self) -> str:
        """Name in files and progress messages."""
        weight = f"-{self.weight:g}" if self.weight else ""
        variant = f"-{self.variant.replace(' ', '_')}" if self.variant else ""
        return f"{self.method}-{self.regularizer}{weight}{variant}"


@dataclass(frozen=True)
class BenchPlan:
    """Settings, concepts, seeds, and when to evaluate.

    Attributes:
        settings: what is compared.
        concepts: concepts to learn.
        seeds: seeds for every setting.
        evaluation_steps: steps at which a training is evaluated, by method.
        ablations: additional settings, with the first seed only.
        num_pictures: pictures per test prompt.
        num_steps: steps of the sampler.
        guidance: guidance scale of the sampler.
    """

    settings: tuple[Setting, ...]
    concepts: tuple[Concept, ...]
    seeds: tuple[int, ...]
    evaluation_steps: Mapping[str, tuple[int, ...]]
    ablations: tuple[Setting, ...] = ()
    num_pictures: int = 1
    num_steps: int = 15
    guidance: float = 4.0

    def num_train_steps(self, method: str) -> int:
        """The step of the last evaluation."""
        return self.evaluation_steps[method][-1]


COSINE = {"lr_scheduler": "cosine"}  # so that the weights have settled at the last evaluation
METHOD_FLAGS: Mapping[str, Flags] = {
    "lora": LORA,
    "dreambooth": {"learning_rate": "3e-4", **COSINE},
    "textual_inversion": {"learning_rate": "2e-2", "init_word": "CLASS", **COSINE},
    "xti": {"learning_rate": "3e-2", "init_word": "CLASS", **COSINE},
    "custom_diffusion": {"learning_rate": "2e-3", "init_word": "CLASS", **COSINE},
    "pivotal": {**LORA, "embedding_lr": "1e-2", "init_word": "CLASS"},
}
"""``CLASS`` is replaced by the class word."""

MLM_WEIGHTS: Mapping[str, float] = dict.fromkeys(METHOD_FLAGS, MLM_WEIGHT) | {
    "textual_inversion": 0.03, "xti": 0.03,
}  # fmt: skip
EVALUATION_STEPS = dict.fromkeys(METHOD_FLAGS, (50, 100, 200, 300))

METHODS = tuple(
    setting
    for method in METHOD_FLAGS
    for setting in (Setting(method), Setting(method, "mlm", MLM_WEIGHTS[method]))
)
RIVALS = (
    Setting("lora", "unet_only", flags={"network_train_unet_only": "true"}),
    Setting("lora", "prior_preservation", 1.0),
    Setting("lora", "output_preservation", 1.0),
    Setting("lora", "core", 0.03),
    Setting("lora", "textboost", 0.1),
    Setting("lora", "classdiffusion", 0.1),
    Setting("dreambooth", "core", 0.03),
    Setting("pivotal", "core", 0.03),
)
WEIGHTS = tuple(Setting("lora", "mlm", weight) for weight in (0.03, 0.3, 1.0))


def _ablation(variant: str, **changes) -> Setting:
    return Setting("lora", "mlm", MLM_WEIGHTS["lora"], variant, **changes)


HIDDEN_WORDS = tuple(
    Setting(
        method,
        "mlm",
        MLM_WEIGHTS[method],
        "hidden words",
        flags={"mlm_target": "word", "mlm_probability": "0.15"},
    )
    for method in METHOD_FLAGS
)
"""The term of the paper: the masked words themselves are the targets."""

ABLATIONS = (
    *HIDDEN_WORDS,
    *WEIGHTS,
    *(
        _ablation(f"mask rate {rate}", flags={"mlm_probability": rate})
        for rate in ("0.15", "0.25")
    ),
    *(_ablation(f"{n} prompts", contexts=ContextChoice(number=n)) for n in (10, 100)),
    *(
        _ablation(
            f"no {family}",
            contexts=ContextChoice(
                families=tuple(other for other in CONTEXT_FAMILIES if other != family)
            ),
        )
        for family in CONTEXT_FAMILIES
    ),
    *(_ablation(f"{n} blocks", num_blocks=n) for n in (1, 4)),
    _ablation("position-wise head", num_blocks=0),
)  # fmt: skip

FULL = BenchPlan(
    settings=(*METHODS, *RIVALS),
    concepts=REPORTED,
    seeds=(0, 1, 2),
    evaluation_steps=EVALUATION_STEPS,
    ablations=ABLATIONS,
)
SHORT = BenchPlan(
    settings=(*METHODS[:2], RIVALS[0], RIVALS[3], RIVALS[4]),
    concepts=REPORTED[:3],
    seeds=(0,),
    evaluation_steps=EVALUATION_STEPS,
)


def chosen(plan: BenchPlan, *, methods: Sequence[str] | None, tuning: bool) -> BenchPlan:
    """A part of a plan.

    Args:
        plan: the whole plan.
        methods: methods to keep; ``None``: all.
        tuning: whether to use the tuning concepts instead of the reported ones.

    Raises:
        UserError: a method that the plan does not have.
    """
    known = list(dict.fromkeys(s.method for s in (*plan.settings, *plan.ablations)))
    for method in methods or ():
        if method not in known:
            raise UserError(f"--method {method}: not in this plan; it has {', '.join(known)}")

    def kept(settings: Sequence[Setting]) -> tuple[Setting, ...]:
        return tuple(s for s in settings if methods is None or s.method in methods)

    return replace(
        plan,
        settings=kept(plan.settings),
        ablations=kept(plan.ablations),
        concepts=TUNING[: len(plan.concepts)] if tuning else plan.concepts,
    )
