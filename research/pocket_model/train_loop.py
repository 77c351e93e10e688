"""One training loop: seeded, with progress, resumable, averaged. Knows no pictures.

Every step draws from a generator named by training, seed and step, so that a resumed training
equals an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mlm_plugin.files import atomic_path
from mlm_plugin.pocket.world import generator_of
from mlm_plugin.training.interrupt import StopRequest

__all__ = ["Interrupted", "Job", "TrainPlan", "run_train_loop"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPlan:
    """Length and speed of one training."""

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    save_every_n_steps: int = 500


@dataclass(frozen=True)
class Job:
    """Settings of a training.

    Attributes:
        plan: length, batch size, learning rate.
        seed: determines every random draw.
        state_path: the state file; removed by the caller once the result is saved.
        device: where the models are.
        show_progress: whether to show a bar.
    """

    plan: TrainPlan
    seed: int
    state_path: Path
    device: torch.device = torch.device("cpu")
    show_progress: bool = True


class Interrupted(Exception):
    """A signal stopped the building; the same command continues."""

    def __init__(self, exit_code: int):
        super().__init__("building stopped; the same command continues")
        self.exit_code = exit_code


def run_train_loop(
    name: str,
    modules: Mapping[str, nn.Module],
    loss_of: Callable[[np.random.Generator, int], tuple[Tensor, dict[str, float]]],
    job: Job,
) -> float:
    """Train ``modules``; at the end they have the averaged weights.

    A state file is written every ``save_every_n_steps`` and on SIGINT or SIGTERM; the same call
    continues from it.

    Args:
        name: name in the progress bar and of the random streams.
        modules: the modules to train.
        loss_of: computes the loss of a batch and numbers to show, from the step's generator and the
            step.
        job: settings and state file.

    Returns:
        Seconds of training, including those before a resume.

    Raises:
        Interrupted: after a signal, with the state saved.
    """
    plan = job.plan
    run = _Run(modules, job)
    run.resume()
    shown: dict[str, float] = {}
    bar = tqdm(
        total=plan.num_steps,
        initial=run.step,
        desc=name,
        disable=not job.show_progress,
        mininterval=1,
    )
    with bar, StopRequest() as stop:
        while run.step < plan.num_steps:
            began = time.monotonic()
            rng = generator_of(name, job.seed, run.step)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**62)))
                loss, numbers = loss_of(rng, run.step)
            run.update(loss)
            run.seconds += time.monotonic() - began
            for key, value in {"loss": float(loss.detach()), **numbers}.items():
                shown[key] = value + 0.95 * (shown.get(key, value) - value)
            bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()}, refresh=False)
            bar.update()
            if stop or run.step % plan.save_every_n_steps == 0:
                run.save()
            if stop:
                raise Interrupted(stop.exit_code)
    logger.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    run.load_average()
    return run.seconds


class _Run:
    def __init__(self, modules: Mapping[str, nn.Module], job: Job):
        plan = job.plan
        self.modules, self.plan, self.state_path = nn.ModuleDict(modules), plan, job.state_path
        self.made_for = {**asdict(plan), "seed": job.seed}
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            betas=(0.9, 0.98),
        )
        self.step, self.seconds = 0, 0.0

    def update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * rate_share(self.step, self.plan)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.plan.ema_decay, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def load_average(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    def save(self) -> None:
        state = {
            "made_for": self.made_for,
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic_path(self.state_path) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        if not self.state_path.exists():
            return
        device = self.parameters[0].device
        state = torch.load(self.state_path, map_location=device, weights_only=True)
        if state["made_for"] != self.made_for:
            logger.warning("%s belongs to another recipe; starting again", self.state_path.name)
            return
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("continuing %s at step %d", self.state_path.name, self.step)


def rate_share(step: int, plan: TrainPlan) -> float:
    """Linear warm-up to 1, then cosine down to 0.02 at the last step."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.num_steps - plan.warmup_steps)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress)))
