"""What is compared: one arm per method and regularizer, and the grids over weights and parts.

Learning rates, weights and lengths were chosen on the tuning concepts; the table reports others.
Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import CONTEXT_FAMILIES, REPORTED, TUNING, Concept

__all__ = [
    "DEMO",
    "FULL",
    "METHOD_FLAGS",
    "MLM_WEIGHT",
    "SHORT",
    "Arm",
    "BenchPlan",
    "ContextChoice",
    "chosen",
]

Flags = Mapping[str, str]


@dataclass(frozen=True)
class ContextChoice:
    """Which prompts a term reads: how many, and what they may name."""

    number: int = 1000
    families: tuple[str, ...] = CONTEXT_FAMILIES


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        method: of ``--method``.
        regularizer: ``plain``, ``mlm``, a rival, ``prior_preservation`` or ``unet_only``.
        weight: of its term.
        variant: what differs from the default, for ablations.
        flags: further options of the trainer.
        contexts: the prompts of the term.
        num_blocks: of the contextualizer; 0 names every word from its own state alone.
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
        """A file's name and a row's key."""
        weight = f"-{self.weight:g}" if self.weight else ""
        variant = f"-{self.variant.replace(' ', '_')}" if self.variant else ""
        return f"{self.method}-{self.regularizer}{weight}{variant}"


@dataclass(frozen=True)
class BenchPlan:
    """Arms, concepts, seeds, and when to look.

    Attributes:
        arms: what is compared.
        concepts: to learn.
        seeds: of every arm.
        looks: steps at which a training is looked at, by method.
        ablations: further arms, with the first seed alone.
        num_pictures: for each test prompt.
        num_steps: of the sampler.
        guidance: of the sampler.
    """

    arms: tuple[Arm, ...]
    concepts: tuple[Concept, ...]
    seeds: tuple[int, ...]
    looks: Mapping[str, tuple[int, ...]]
    ablations: tuple[Arm, ...] = ()
    num_pictures: int = 1
    num_steps: int = 15
    guidance: float = 4.0

    def num_train_steps(self, method: str) -> int:
        """The last look."""
        return self.looks[method][-1]


COSINE = {"lr_scheduler": "cosine"}  # so that the last look is at settled weights
LORA = {"network_dim": "8", "network_alpha": "8", "learning_rate": "5e-3"}
METHOD_FLAGS: Mapping[str, Flags] = {
    "lora": {**LORA, **COSINE},
    "dreambooth": {"learning_rate": "3e-4", **COSINE},
    "textual_inversion": {"learning_rate": "2e-2", "init_word": "CLASS", **COSINE},
    "xti": {"learning_rate": "3e-2", "init_word": "CLASS", **COSINE},
    "custom_diffusion": {"learning_rate": "2e-3", "init_word": "CLASS", **COSINE},
    "pivotal": {**LORA, "embedding_lr": "1e-2", "init_word": "CLASS", **COSINE},
}
"""``CLASS`` stands for the class word."""

MLM_WEIGHT: Mapping[str, float] = dict.fromkeys(METHOD_FLAGS, 0.1) | {
    "textual_inversion": 0.03, "xti": 0.03,
}  # fmt: skip
LOOKS = dict.fromkeys(METHOD_FLAGS, (50, 100, 200, 300))

METHODS = tuple(
    arm for method in METHOD_FLAGS for arm in (Arm(method), Arm(method, "mlm", MLM_WEIGHT[method]))
)
RIVALS = (
    Arm("lora", "unet_only", flags={"network_train_unet_only": "true"}),
    Arm("lora", "prior_preservation", 1.0),
    Arm("lora", "output_preservation", 1.0),
    Arm("lora", "core", 0.03),
    Arm("lora", "textboost", 0.1),
    Arm("lora", "classdiffusion", 0.1),
    Arm("dreambooth", "core", 0.03),
    Arm("pivotal", "core", 0.03),
)
WEIGHTS = tuple(Arm("lora", "mlm", weight) for weight in (0.03, 0.3, 1.0))


def _ablation(variant: str, **changes) -> Arm:
    return Arm("lora", "mlm", MLM_WEIGHT["lora"], variant, **changes)


HIDDEN_WORDS = tuple(
    Arm(
        method,
        "mlm",
        MLM_WEIGHT[method],
        "hidden words",
        flags={"mlm_target": "word", "mlm_probability": "0.15"},
    )
    for method in METHOD_FLAGS
)
"""The term as the paper has it: the hidden words themselves are the targets."""

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
    arms=(*METHODS, *RIVALS),
    concepts=REPORTED,
    seeds=(0, 1, 2),
    looks=LOOKS,
    ablations=ABLATIONS,
)
SHORT = BenchPlan(
    arms=(*METHODS[:2], RIVALS[0], RIVALS[3], RIVALS[4]),
    concepts=REPORTED[:3],
    seeds=(0,),
    looks=LOOKS,
)
DEMO = replace(SHORT, looks={"lora": (300,)}, num_steps=30)


def chosen(plan: BenchPlan, *, methods: Sequence[str] | None, tuning: bool) -> BenchPlan:
    """A part of a plan.

    Args:
        plan: the whole.
        methods: that stay; ``None``: all.
        tuning: whether the tuning concepts take the place of the reported ones.

    Raises:
        UserError: a method that the plan does not have.
    """
    known = list(dict.fromkeys(arm.method for arm in (*plan.arms, *plan.ablations)))
    for method in methods or ():
        if method not in known:
            raise UserError(f"--method {method}: not in this plan; it has {', '.join(known)}")

    def kept(arms: Sequence[Arm]) -> tuple[Arm, ...]:
        return tuple(arm for arm in arms if methods is None or arm.method in methods)

    concepts = TUNING[: len(plan.concepts)] if tuning else plan.concepts
    return replace(plan, arms=kept(plan.arms), ablations=kept(plan.ablations), concepts=concepts)
