"""How strongly the MLM term pulls, and what gradient clipping makes of it, in short pocket runs.

    python -m research.benchmarks.term_strength {less,clip} [--steps 100] [--seeds 0 1]
        [--weights 0.1 1] [--target states] [--optimizers NAME ...] [--savings NAME ...]

``less``: the term at every n-th step, or on fewer prompts. *Loss pull* is the drop of the term's
loss, on fixed prompts, that the term causes, as a share of that of the default. *Weight pull* is
the same of the text side's weights. Much of how far a run moves is noise of its prompts, so the
shift ``d`` against the run without the term is projected onto that of another run with other
prompts, ``d_other``: ``<d, d_other> / <d_1, d_other>`` with ``d_1`` of the default.

``clip``: whether the term slows the U-Net because the norm of both gradients together is clipped.
The median norm of the gradient, the mean clip factor ``min(1, limit / norm)``, and the length of
the U-Net's path (the sum of the norms of its updates), as ratios to the run without the term.

All runs of a seed see the same pictures, noise and timesteps. One line of JSON per comparison;
those that docs/method.md reports are in ``research/results/term_strength.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache, partial
from statistics import mean, median

import torch
from torch import Tensor

from mlm_plugin.commands.train import check_run, trainer_of
from mlm_plugin.config.loading import load_config
from mlm_plugin.training.callbacks import Callback
from mlm_plugin.training.trainer import Trainer

OPTIONS = {
    "method": "lora",
    "pretrained_model_name_or_path": "pocket",
    "train_data_dir": "pocket",
    "caption_extension": ".txt",
    "resolution": "64",
    "network_dim": "8",
    "network_alpha": "8",
    "learning_rate": "5e-3",
    "lr_scheduler": "cosine",  # so that the weights have settled at the end
    "train_batch_size": "4",
    "max_data_loader_n_workers": "0",
    "mlm_prompt_set": "pocket",
    "output_dir": "unused",
}
TARGETS = {
    "states": {"mlm_target": "states"},
    "class": {"mlm_target": "class", "mlm_contextualizer": "pocket"},
}
OPTIMIZERS = {
    "AdamW, no clipping": {"max_grad_norm": "0"},
    "AdamW, clipping": {"max_grad_norm": "1"},
    "AdamW, text encoder at 5e-4": {"text_encoder_lr": "5e-4"},
    "AdamW, clipping at 0.05": {"max_grad_norm": "0.05"},  # about the norm without the term
    "Adafactor, clipping": {
        "optimizer_type": "Adafactor",
        "optimizer_args": "relative_step=False scale_parameter=False",
    },
    "AdamW8bit, clipping": {"optimizer_type": "AdamW8bit"},
    "SGD, no clipping": {"optimizer_type": "SGD", "learning_rate": "1.0", "max_grad_norm": "0"},
}
SAVINGS = {
    "n = 2": {"mlm_every_n_steps": "2"},
    "n = 4": {"mlm_every_n_steps": "4"},
    "n = 4, weight 0.025": {"mlm_every_n_steps": "4", "mlm_loss_weight": "0.025"},
    "batch 4": {"mlm_batch_size": "4"},
    "batch 2": {"mlm_batch_size": "2"},
}
NO_WEIGHT = "1e-30"  # measures the term's loss, and its gradient rounds to nothing
EVALUATION_CALLS = range(10**6, 10**6 + 16)  # prompts that no step draws


class Watch(Callback):
    """Sums the norms of the U-Net's updates and notes the norm of every gradient."""

    def __init__(self):
        self.path_length, self.norms = 0.0, []

    def on_train_start(self, trainer: Trainer) -> None:
        self._before = unet_weights(trainer)
        clip = trainer._clip_gradients

        def noted() -> Tensor:
            norm = clip()
            self.norms.append(norm.item())
            return norm

        trainer._clip_gradients = noted

    def on_step_end(self, trainer: Trainer, result) -> None:
        weights = unet_weights(trainer)
        self.path_length += (weights - self._before).norm().item()
        self._before = weights


def unet_weights(trainer: Trainer) -> Tensor:
    return flat(trainer.method.parts()["unet"])


def text_weights(trainer: Trainer) -> Tensor:
    parts = trainer.method.parts()
    return flat([p for part in parts if part != "unet" for p in parts[part]])


def flat(parameters) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


@cache
def run(seed: int, *, steps: int, **options: str) -> dict:
    """One training; ``text`` are the final weights of the text side."""
    flat_options = {**OPTIONS, **options, "seed": str(seed), "max_train_steps": str(steps)}
    config = load_config(
        [part for name, value in flat_options.items() for part in (f"--{name}", *value.split())]
    )
    trainer = trainer_of(check_run(config))
    watch = Watch()
    trainer.callbacks = [watch]
    trainer.run()
    limit = config.optimizer.max_grad_norm or float("inf")
    return {
        "loss": term_loss(trainer) if trainer.regularizer else None,
        "norm": median(watch.norms),
        "clip_factor": mean(min(1.0, limit / norm) for norm in watch.norms),
        "path_length": watch.path_length,
        "text": text_weights(trainer),
    }


@torch.no_grad()
def term_loss(trainer: Trainer) -> float:
    """The term on fixed prompts."""
    with trainer.evaluating():
        return mean(trainer._term(call).loss.item() for call in EVALUATION_CALLS)


def compare_savings(
    seed: int, *, weight: str, steps: int, savings: Sequence[str] = tuple(SAVINGS), **options: str
) -> dict:
    """What is left of the pull when the term acts less often, or on fewer prompts."""
    options = {"mlm_loss_weight": weight, **options}
    plain = run(seed, steps=steps, **options | {"mlm_loss_weight": NO_WEIGHT})
    other = run(seed, steps=steps, **options, mlm_seed="1000")
    full = run(seed, steps=steps, **options)
    drop = plain["loss"] - (full["loss"] + other["loss"]) / 2
    onto = other["text"] - plain["text"]
    moved = (full["text"] - plain["text"]) @ onto
    found = {
        "loss_without": plain["loss"],
        "loss_with": full["loss"],
        "loss_other_prompts": other["loss"],
        "noise": 1 - (moved / (onto @ onto)).item(),
    }
    for name in savings:
        less = run(seed, steps=steps, **options | SAVINGS[name])
        found[f"loss pull, {name}"] = (plain["loss"] - less["loss"]) / drop
        found[f"weight pull, {name}"] = ((less["text"] - plain["text"]) @ onto / moved).item()
    return found


def compare_clipping(seed: int, *, weight: str, steps: int, **options: str) -> dict:
    """Clip factor and path of the U-Net with the term, as ratios to those without."""
    plain = run(seed, steps=steps, mlm_loss_weight=NO_WEIGHT, **options)
    term = run(seed, steps=steps, mlm_loss_weight=weight, **options)
    return {
        "norm_without": plain["norm"],
        "norm_with": term["norm"],
        "clip_factor_without": plain["clip_factor"],
        "clip_factor_ratio": term["clip_factor"] / plain["clip_factor"],
        "unet_path_ratio": term["path_length"] / plain["path_length"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", choices=("less", "clip"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--weights", nargs="+", default=["0.1"])
    parser.add_argument("--target", choices=TARGETS, default="states")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--savings", nargs="+", choices=SAVINGS, default=list(SAVINGS))
    args = parser.parse_args()
    compare = compare_clipping
    if args.comparison == "less":
        compare = partial(compare_savings, savings=args.savings)
    for optimizer in args.optimizers:
        for weight in args.weights:
            for seed in args.seeds:
                options = {**OPTIMIZERS[optimizer], **TARGETS[args.target]}
                found = compare(seed, weight=weight, steps=args.steps, **options)
                row = {
                    "comparison": args.comparison, "steps": args.steps, "target": args.target,
                    "optimizer": optimizer, "weight": weight, "seed": seed,
                }  # fmt: skip
                numbers = {name: float(f"{value:.3g}") for name, value in found.items()}
                print(json.dumps(row | numbers), flush=True)


if __name__ == "__main__":
    main()
