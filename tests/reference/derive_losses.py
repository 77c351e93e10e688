"""Derive the loss and learning-rate numbers in tests/training by running sd-scripts itself.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_losses.py``

sd-scripts must be a checkout of kohya-ss/sd-scripts (the stored numbers come from commit
48d368fa), with its small requirements installed (imagesize, voluptuous, einops, toml, rich,
opencv-python-headless, ftfy). torchvision is not needed.
"""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

import torch
from sd_scripts import enable_imports

LOSS_DEFAULTS = {
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "adaptive_noise_scale": None,
    "multires_noise_iterations": None,
    "multires_noise_discount": 0.3,
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "min_snr_gamma": None,
    "debiased_estimation_loss": False,
    "scale_v_pred_loss_like_noise_pred": False,
    "v_pred_like_loss": None,
    "zero_terminal_snr": False,
    "min_timestep": None,
    "max_timestep": None,
    "loss_type": "l2",
    "huber_schedule": "snr",
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "v_parameterization": False,
    "masked_loss": False,
    "gradient_checkpointing": False,
}
V = {"v_parameterization": True}
LOSS_CASES = [
    {},
    V,
    {"noise_offset": 0.1},
    {"noise_offset": 0.1, "noise_offset_random_strength": True},
    {"noise_offset": 0.05, "adaptive_noise_scale": -0.4},
    {"multires_noise_iterations": 6, "multires_noise_discount": 0.3},
    {"noise_offset": 0.1, "multires_noise_iterations": 10, "multires_noise_discount": 0.8},
    {"ip_noise_gamma": 0.1},
    {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    {"min_timestep": 200, "max_timestep": 400},
    {"min_timestep": 500, "max_timestep": 500},
    {"min_snr_gamma": 5.0},
    {"min_snr_gamma": 5.0, **V},
    {"debiased_estimation_loss": True},
    {"debiased_estimation_loss": True, **V},
    {"scale_v_pred_loss_like_noise_pred": True, **V},
    {"v_pred_like_loss": 0.5},
    {"min_snr_gamma": 1.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True},
    {"zero_terminal_snr": True, **V},
    {"zero_terminal_snr": True, "min_snr_gamma": 5.0, **V},
    {"loss_type": "l1"},
    {"loss_type": "huber"},
    {"loss_type": "huber", "huber_schedule": "exponential", "huber_scale": 0.7},
    {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 0.7},
    {"loss_type": "smooth_l1"},
    {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
    {"loss_type": "smooth_l1", "zero_terminal_snr": True, "min_timestep": 998, **V},
    {"masked_loss": True},
    {"masked_loss": True, "loss_type": "huber", "min_snr_gamma": 5.0},
]
SCHEDULER_DEFAULTS = {
    "optimizer_type": "AdamW",
    "max_train_steps": 20,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "lr_scheduler_timescale": None,
    "lr_scheduler_min_lr_ratio": None,
    "lr_scheduler_type": "",
    "lr_scheduler_args": None,
}
SCHEDULER_CASES = [  # (options, number of processes)
    ({}, 1),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, 1),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1}, 1),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1}, 2),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 2}, 1),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, 1),
    ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0, "lr_warmup_steps": 3}, 1),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 3}, 1),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 3, "lr_scheduler_timescale": 8}, 1),
    ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1}, 1),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 0.25},
        1,
    ),
    (
        {
            "lr_scheduler": "warmup_stable_decay",
            "lr_decay_steps": 8,
            "lr_scheduler_num_cycles": 2,
            "lr_scheduler_min_lr_ratio": 0.2,
        },
        1,
    ),
    (
        {
            "lr_scheduler": "piecewise_constant",
            "lr_scheduler_args": ["step_rules='1:5,0.1:10,0.01'"],
        },
        1,
    ),
    ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=10"]}, 1),
    (
        {
            "lr_scheduler_type": "torch.optim.lr_scheduler.StepLR",
            "lr_scheduler_args": ["step_size=5", "gamma=0.5"],
        },
        1,
    ),
]
OPTIMIZER_CASES = [
    ("AdamW", ["weight_decay=0.1", "betas=0.9,0.99"]),
    ("sgdnesterov", []),
    ("Adafactor", ["scale_parameter=False"]),
    ("RAdam", []),
    ("Prodigy", ["decouple=True", "weight_decay=0.01"]),
    ("AdamW8bit", []),
]
PROMPT_LINES = [
    "a photo of a dog --n blurry, low quality --w 640 --h 448 --d 42 --s 20 --l 6.5 --ss euler_a",
    "a photo of a dog, in the park",
    "a dog --W 70 --s 5000",
]


def main() -> None:
    """Print Python literals to paste into the tests."""
    enable_imports()
    train_util = importlib.import_module("library.train_util")
    trainer = importlib.import_module("train_network").NetworkTrainer()
    print("LOSSES = [")
    for case in LOSS_CASES:
        print(f"    ({case}, {_loss(trainer, case)!r}),")
    print("]\nLEARNING_RATES = [")
    for case, num_processes in SCHEDULER_CASES:
        print(f"    ({case}, {num_processes}, {_rates(train_util, case, num_processes)}),")
    print("]\nDESCRIPTIONS = [")
    for name, arguments in OPTIMIZER_CASES:
        print(f"    ({name!r}, {arguments}, {_description(train_util, name, arguments)!r}),")
    print("]\nPROMPTS = [")
    for line in PROMPT_LINES:
        print(f"    ({line!r}, {train_util.line_to_prompt_dict(line)}),")
    print("]")


def _loss(trainer, case: dict) -> float:
    """One call of process_batch with a linear stand-in for the U-Net; two images of 16 x 12."""
    args = SimpleNamespace(**(LOSS_DEFAULTS | case))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 12, generator=generator)
    masks = torch.rand(2, 1, 128, 96, generator=generator)
    noise_scheduler = trainer.get_noise_scheduler(args, torch.device("cpu"))
    trainer.call_unet = lambda *call: 0.3 * call[3] + 1e-4 * call[4].view(-1, 1, 1, 1)
    batch = {"latents": latents, "loss_weights": torch.tensor([1.0, 0.5])}
    batch["text_encoder_outputs_list"] = [torch.zeros(1)]
    if args.masked_loss:
        batch["conditioning_images"] = (masks * 2 - 1).expand(-1, 3, -1, -1)
    trainer.vae_scale_factor = 1.0
    torch.manual_seed(7)
    random.seed(7)
    return trainer.process_batch(
        batch,
        [None],
        None,
        None,
        None,
        noise_scheduler,
        torch.float32,
        torch.float32,
        SimpleNamespace(device="cpu", autocast=_no_autocast),
        args,
        None,
        None,
        train_text_encoder=False,
    ).item()


def _rates(train_util, case: dict, num_processes: int) -> list[float]:
    args = SimpleNamespace(**(SCHEDULER_DEFAULTS | case))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = train_util.get_scheduler_fix(args, optimizer, num_processes)
    rates = []
    for _ in range(args.max_train_steps):
        rates.append(round(scheduler.get_last_lr()[0], 6))
        optimizer.step()
        scheduler.step()
    return rates


def _description(train_util, name: str, arguments: list[str]) -> str:
    args = SimpleNamespace(
        optimizer_type=name,
        optimizer_args=arguments,
        use_8bit_adam=False,
        use_lion_optimizer=False,
        fused_backward_pass=False,
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler="constant",
    )
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}
    optimizer_name, text, _ = train_util.get_optimizer(args, [group])
    return f"{optimizer_name}({text})" if text else optimizer_name


class _no_autocast:  # noqa: N801 - a context manager
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


if __name__ == "__main__":
    main()
