"""What is compared: arms, each with a grid of six settings, and the claims that are tested.

An arm is a way to train; its setting is found on the tuning concepts by ``search.py``, with the
same number of trials for every arm. ``PLAN.md`` states the rules. Options are written as the
trainer's flags and are checked only when a trial starts. Does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mlm_plugin.demo.options import BATCH_SIZE, LORA
from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import REPORTED, TUNING, Concept

__all__ = [
    "ARMS",
    "CLAIMED",
    "CLAIMS",
    "CONTROLS",
    "NUM_SETTINGS",
    "PLAN",
    "RATES",
    "RECOMMENDED",
    "REPORT_SEEDS",
    "SEARCHED",
    "UNTRAINED",
    "Arm",
    "BenchPlan",
    "Claim",
    "Family",
    "Trial",
    "find_arms",
    "shorter",
    "trials_at_rates",
    "trials_to_report",
    "tuning_trials",
]

Flags = Mapping[str, str]
NUM_SETTINGS = 6
REPORT_SEEDS = (0, 1)
TUNING_SEED = 0


class BenchPlan(NamedTuple):
    """How every trial is trained and evaluated.

    Attributes:
        evaluation_steps: steps after which a training is evaluated; the last one ends it.
        num_steps: steps of the sampler.
        guidance: guidance scale of the sampler.
    """

    evaluation_steps: tuple[int, ...] = (50, 100, 200)
    num_steps: int = 10
    guidance: float = 4.0


PLAN = BenchPlan()


@dataclass(frozen=True)
class Family:
    """Arms that train the same parts, and the learning rates among which they choose.

    Attributes:
        name: name in tables and on the command line.
        title: name in README.
        method: value of ``--method``.
        flags: options of all its trials.
        term_rates: an option and three values, for arms that also choose the weight of a term.
        plain: the grid of plain training.
        other_rates: what the best plain setting has besides, for arms with a term.
    """

    name: str
    title: str
    method: str
    flags: Flags = field(default_factory=dict)
    term_rates: tuple[str, tuple[str, ...]] = ("", ())
    plain: tuple[Flags, ...] = ()
    other_rates: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A way to train, and the settings among which the tuning concepts choose.

    Attributes:
        family: what is trained.
        form: ``plain``, a form of the MLM term, or a rival.
        regularizer: ``plain``, ``mlm``, a class of ``rivals.py`` or ``prior_preservation``.
        grid: six settings; ``weight`` is the weight of the term, the rest are flags.
        flags: options of all its trials.
        grammar: of the contexts: ``free``, ``linked`` or ``disjoint``.
        second_grid: six settings around the one found in the first, or none.
    """

    family: Family
    form: str
    regularizer: str
    grid: tuple[Flags, ...]
    flags: Flags = field(default_factory=dict)
    grammar: str = "free"
    second_grid: tuple[Flags, ...] = ()

    @property
    def name(self) -> str:
        """Name in tables and on the command line: ``lora encoder/class``."""
        return f"{self.family.name} {self.form}"

    @property
    def settings(self) -> tuple[Flags, ...]:
        """Those of both grids."""
        return (*self.grid, *self.second_grid)


class Trial(NamedTuple):
    """One training: a setting of an arm, on a concept, with a seed."""

    arm: Arm
    setting: Flags
    concept: Concept
    seed: int


class Claim(NamedTuple):
    """A comparison that is tested: ``ours`` has more prompt fidelity at the same identity."""

    ours: str
    theirs: str


def _grid(axes: Mapping[str, Sequence[str]]) -> tuple[Flags, ...]:
    combinations = itertools.product(*axes.values())
    return tuple(dict(zip(axes, values, strict=True)) for values in combinations)


COSINE = {"lr_scheduler": "cosine"}  # so that the weights have settled at the last evaluation
TOKENS = {**COSINE, "init_word": "CLASS"}  # replaced by the class word
TEXT_RATES = ("1.5e-4", "5e-4", "1.5e-3")

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "lora",
            "LoRA",
            "lora",
            LORA,
            ("text_encoder_lr", TEXT_RATES),
            _grid({"unet_lr": ("2.5e-3", "5e-3"), "text_encoder_lr": TEXT_RATES}),
            {"unet_lr": "2.5e-3"},
        ),
        Family(
            "lora_unet_only",
            "LoRA, U-Net alone",
            "lora",
            {**LORA, "network_train_unet_only": "true"},
            ("unet_lr", ("2.5e-3", "3.5e-3", "5e-3")),
            _grid({"unet_lr": ("1.5e-3", "2.5e-3", "3.5e-3", "5e-3", "7e-3", "1e-2")}),
        ),
        Family(
            "dreambooth",
            "DreamBooth",
            "dreambooth",
            COSINE,
            ("learning_rate_te", ("1e-5", "3e-5", "1e-4")),
            _grid(
                {
                    "learning_rate": ("7.5e-5", "1.5e-4"),
                    "learning_rate_te": ("1e-5", "3e-5", "1e-4"),
                }
            ),
            {"learning_rate": "1.5e-4"},
        ),
        Family(
            "pivotal",
            "pivotal tuning",
            "pivotal",
            {**LORA, "unet_lr": "2.5e-3", "init_word": "CLASS"},  # as plain LoRA was found best
            ("text_encoder_lr", TEXT_RATES),
            _grid({"embedding_lr": ("3e-3", "1e-2"), "text_encoder_lr": TEXT_RATES}),
            {"embedding_lr": "1e-2"},
        ),
        Family(
            "custom_diffusion",
            "Custom Diffusion",
            "custom_diffusion",
            TOKENS,
            ("learning_rate", ("2.5e-4", "5e-4", "1e-3")),
            _grid({"learning_rate": ("1.25e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")}),
        ),
        Family(
            "textual_inversion",
            "Textual Inversion",
            "textual_inversion",
            TOKENS,
            ("learning_rate", ("1e-2", "2e-2", "4e-2")),
            _grid({"learning_rate": ("5e-3", "1e-2", "2e-2", "3e-2", "4e-2", "8e-2")}),
        ),
        Family(
            "xti",
            "XTI",
            "xti",
            TOKENS,
            ("learning_rate", ("1.5e-2", "3e-2", "6e-2")),
            _grid({"learning_rate": ("7.5e-3", "1.5e-2", "2e-2", "3e-2", "4e-2", "6e-2")}),
        ),
    )
}

FORMS: Mapping[str, Flags] = {
    f"{where}/{target}": {
        "mlm_read_at": {"cross": "cross_attention"}.get(where, where),
        "mlm_target": target,
    }
    for where, target in (
        ("encoder", "class"),
        ("encoder", "states"),
        ("cross", "class"),
        ("cross", "states"),
        ("both", "states"),
        ("encoder", "word"),
    )
}
"""Where the MLM term reads, and what it compares."""

WEIGHTS = {
    **dict.fromkeys(FORMS, ("0.1", "1")),
    "core": ("0.03", "0.3"),
    "textboost": ("0.1", "1"),
    "classdiffusion": ("0.1", "1"),
    "output_preservation": ("0.3", "3"),
    "prior_preservation": ("0.1", "1"),
    "encoder/word": ("0.03", "0.3"),
}  # two weights, a decade apart
LOW_WEIGHTS = ("0.01", "0.1")
LOW = ("textual_inversion", "xti", "custom_diffusion both/states")
"""With weights a decade lower: embeddings alone are trained, or 0.1 had cost likeness."""


def _plain(family: str) -> Arm:
    return Arm(FAMILIES[family], "plain", "plain", FAMILIES[family].plain)


def _term(family: str, form: str, *, grammar: str = "free") -> Arm:
    """Three learning rates times two weights."""
    flags = {**FAMILIES[family].other_rates, **FORMS.get(form, {})}
    if form == "encoder/word":
        flags["mlm_probability"] = "0.15"  # as in the paper
    if form == "prior_preservation":  # as many pictures of the concept as in other arms
        flags["train_batch_size"] = str(2 * BATCH_SIZE)
    rate, values = FAMILIES[family].term_rates
    weights = LOW_WEIGHTS if {family, f"{family} {form}"} & set(LOW) else WEIGHTS[form]
    grid = _grid({rate: values, "weight": weights})
    regularizer = "mlm" if form in FORMS else form
    name = form if grammar == "free" else f"{form}/{grammar}"
    return Arm(FAMILIES[family], name, regularizer, grid, flags, grammar)


def _control(family: str, setting: Flags) -> Arm:
    """The recommended form at the setting found for it, with contexts of no word that is tested."""
    term = _term(family, RECOMMENDED[family], grammar="disjoint")
    return replace(term, grid=(setting,), second_grid=())


def _directional(family: str) -> Arm:
    """Directional Textual Inversion, whose rate acts on vectors of norm 1."""
    grid = _grid({"learning_rate": ("1e-3", "2.5e-3", "6e-3", "1.5e-2", "4e-2", "1e-1")})
    return Arm(FAMILIES[family], "directional", "plain", grid, {"directional_embedding": "true"})


def _directional_term(family: str) -> Arm:
    """The same with the term, around the rate that was found without it."""
    grid = _grid({"learning_rate": ("6e-3", "1.5e-2", "4e-2"), "weight": LOW_WEIGHTS})
    flags = {"directional_embedding": "true", **FORMS["encoder/states"]}
    return Arm(FAMILIES[family], "directional/states", "mlm", grid, flags)


TARGETS_OF_TRAINED_ENCODERS = (
    "encoder/class", "encoder/states", "cross/class", "cross/states", "both/states",
)  # fmt: skip
TEXT_RIVALS = ("core", "textboost", "classdiffusion")
TERMS: Mapping[str, tuple[str, ...]] = {
    "lora": (
        *TEXT_RIVALS, *TARGETS_OF_TRAINED_ENCODERS, "output_preservation", "prior_preservation",
        "encoder/word",
    ),
    "lora_unet_only": ("cross/class", "cross/states", "output_preservation"),
    "dreambooth": (*TEXT_RIVALS, *TARGETS_OF_TRAINED_ENCODERS, "prior_preservation"),
    "pivotal": (*TEXT_RIVALS, *TARGETS_OF_TRAINED_ENCODERS, "prior_preservation"),
    "custom_diffusion": ("core", "encoder/class", "both/states"),
    "textual_inversion": ("encoder/class", "encoder/states"),
    "xti": ("encoder/class", "encoder/states"),
}  # fmt: skip

RECOMMENDED: Mapping[str, str] = {
    "lora": "both/states",
    "lora_unet_only": "cross/states",
    "dreambooth": "both/states",
    "pivotal": "both/states",
    "custom_diffusion": "both/states",
}
"""The form whose claims are tested, by family. Set from the tuning scores before a reported trial
runs, as ``PLAN.md`` says."""

LORA_RATES: tuple[Flags, ...] = ({}, {"unet_lr": "1.25e-3"}, {"unet_lr": "6.25e-4"})
PIVOTAL_RATES: tuple[Flags, ...] = (
    {},
    {"unet_lr": "1.25e-3", "embedding_lr": "3e-2"},
    {"unet_lr": "1.25e-3"},
)


def _around(rates: tuple[Flags, ...], found: Flags, *, inner: str, outer: str) -> tuple[Flags, ...]:
    """Six settings around the one found for a term: other rates, and weights on both sides.

    Args:
        rates: none, then two others that plain training also tries.
        found: in the first search.
        inner: the other weight of the first grid.
        outer: the weight a decade beyond the one found, on its other side.
    """
    here, nearer, farther = ({**found, **other} for other in rates)
    return (
        {**here, "weight": outer},
        *({**nearer, "weight": weight} for weight in (found["weight"], outer, inner)),
        *({**farther, "weight": weight} for weight in (found["weight"], outer)),
    )


def _text(rate: str, weight: str) -> Flags:
    return {"text_encoder_lr": rate, "weight": weight}


SECOND_GRIDS: Mapping[str, tuple[Flags, ...]] = {
    "lora plain": _grid(
        {"unet_lr": ("6.25e-4", "1.25e-3"), "text_encoder_lr": ("5e-5", "1.5e-4", "5e-4")}
    ),
    "lora core": _around(LORA_RATES, _text("1.5e-4", "0.3"), inner="0.03", outer="3"),
    "lora textboost": _around(LORA_RATES, _text("1.5e-4", "0.1"), inner="1", outer="0.01"),
    "lora classdiffusion": _around(LORA_RATES, _text("1.5e-4", "1"), inner="0.1", outer="10"),
    "lora output_preservation": _around(LORA_RATES, _text("1.5e-3", "3"), inner="0.3", outer="30"),
    "lora prior_preservation": _around(LORA_RATES, _text("5e-4", "0.1"), inner="1", outer="0.01"),
    "lora both/states": _around(LORA_RATES, _text("1.5e-4", "0.1"), inner="1", outer="0.01"),
    "pivotal plain": (
        {"embedding_lr": "3e-2", "text_encoder_lr": "1.5e-4"},
        *_grid(
            {
                "unet_lr": ("1.25e-3",),
                "embedding_lr": ("3e-2",),
                "text_encoder_lr": ("5e-5", "1.5e-4", "5e-4"),
            }
        ),
        {"unet_lr": "1.25e-3", "embedding_lr": "1e-2", "text_encoder_lr": "1.5e-4"},
        {"unet_lr": "1.25e-3", "embedding_lr": "1e-1", "text_encoder_lr": "1.5e-4"},
    ),
    "pivotal core": _around(PIVOTAL_RATES, _text("1.5e-4", "0.03"), inner="0.3", outer="0.003"),
    "pivotal textboost": _around(PIVOTAL_RATES, _text("5e-4", "0.1"), inner="1", outer="0.01"),
    "pivotal classdiffusion": _around(PIVOTAL_RATES, _text("5e-4", "1"), inner="0.1", outer="10"),
    "pivotal prior_preservation": _around(
        PIVOTAL_RATES, _text("1.5e-4", "1"), inner="0.1", outer="10"
    ),
    "pivotal both/states": _around(PIVOTAL_RATES, _text("1.5e-4", "0.1"), inner="1", outer="0.01"),
}
"""The second search of the arms of the claims: lower rates of the U-Net, and weights that the first
one did not reach."""

SEARCHED = tuple(
    replace(arm, second_grid=SECOND_GRIDS.get(arm.name, ()))
    for arm in (
        *(_plain(family) for family in FAMILIES),
        *(_term(family, form) for family, forms in TERMS.items() for form in forms),
        *(_term("lora", form, grammar="linked") for form in ("encoder/class", "encoder/word")),
        _directional("textual_inversion"),
        _directional("xti"),
        _directional_term("textual_inversion"),
    )
)

CONTROLS = tuple(
    _control(family, {"text_encoder_lr": "1.5e-4", "weight": "0.1"})
    for family in ("lora", "pivotal")
)
"""At the settings of the first search."""
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*SEARCHED, *CONTROLS)}

RATES: Mapping[str, tuple[Flags, ...]] = {
    name: tuple({**found, "unet_lr": rate} for rate in ("1.25e-3", "5e-3"))
    for name, found in (
        ("lora plain", {"text_encoder_lr": "1.5e-4"}),
        (f"lora {RECOMMENDED['lora']}", {"text_encoder_lr": "1.5e-4", "weight": "0.1"}),
    )
}
"""What the first search found at a U-Net's rate of 2.5e-3, at half and at twice that rate."""

UNTRAINED = Arm(
    Family("untrained", "untrained", "none"),
    "model",
    "untrained",
    ({"words": "concept"}, {"words": "class"}),
)
"""The model before any training, prompted with the concept's name (where every curve starts) and
with the class word (the most that prompt fidelity can be). It has nothing to tune."""


def _claims() -> tuple[Claim, ...]:
    found = []
    for family, form in RECOMMENDED.items():
        rivals = [name for name in TERMS[family] if name not in FORMS]
        found += [Claim(f"{family} {form}", f"{family} {name}") for name in ("plain", *rivals)]
    found.append(Claim(f"lora {RECOMMENDED['lora']}", "lora_unet_only plain"))
    return tuple(found)


CLAIMS = _claims()
"""Every comparison that gets a p-value; Holm's correction is over all of them."""
CLAIMED = tuple(dict.fromkeys(name for claim in CLAIMS for name in claim))
"""The arms that the claims are about."""


def find_arms(names: Sequence[str] | None) -> list[Arm]:
    """Arms by name, or all those of a family; ``None``: all of the plan.

    Raises:
        UserError: a name that the plan does not have.
    """
    found: list[Arm] = []
    for name in names if names is not None else FAMILIES:
        arms = [arm for arm in ARMS.values() if name in (arm.name, arm.family.name)]
        if not arms:
            known = ", ".join((*FAMILIES, *ARMS))
            raise UserError(f"--arms {name!r}: not in the plan; it has {known}")
        found += [arm for arm in arms if arm not in found]
    return found


def shorter(num_steps: int) -> str:
    """The stage that reports trainings that end after fewer steps, with schedules as long."""
    return f"report_{num_steps}"


def trials_at_rates(arm: Arm) -> list[Trial]:
    """The trials of an arm at other rates of the U-Net than the first search's."""
    return [trial for setting in RATES[arm.name] for trial in trials_to_report(arm, setting)]


def trials_to_report(arm: Arm, setting: Flags) -> list[Trial]:
    """The trials of an arm that the tables show, seed by seed."""
    return [Trial(arm, setting, concept, seed) for seed in REPORT_SEEDS for concept in REPORTED]


def tuning_trials(arm: Arm, settings: Sequence[Flags], concepts: slice) -> list[Trial]:
    """Trials of some settings on some tuning concepts."""
    return [
        Trial(arm, setting, concept, TUNING_SEED)
        for concept in TUNING[concepts]
        for setting in settings
    ]
