"""Learning-rate schedules against sd-scripts' own numbers, and the rules around them."""

import logging

import pytest
import torch

from mlm_plugin.config.options import OptimizerOptions
from mlm_plugin.errors import UserError
from mlm_plugin.training.optimizers import create_optimizer
from mlm_plugin.training.schedulers import SCHEDULERS, create_scheduler, num_steps, scheduler_name

# (options, number of processes, factor of the first 20 steps): sd-scripts 48d368fa,
# library/train_util.py get_scheduler_fix, printed by tests/reference/derive_losses.py.
LEARNING_RATES = [
    ({}, 1,
     [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, 1,
     [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1}, 1,
     [0, 0.5, 1, 0.944444, 0.888889, 0.833333, 0.777778, 0.722222, 0.666667, 0.611111, 0.555556,
      0.5, 0.444444, 0.388889, 0.333333, 0.277778, 0.222222, 0.166667, 0.111111, 0.055556]),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1}, 2,
     [0, 0.25, 0.5, 0.75, 1, 0.972222, 0.944444, 0.916667, 0.888889, 0.861111, 0.833333,
      0.805556, 0.777778, 0.75, 0.722222, 0.694444, 0.666667, 0.638889, 0.611111, 0.583333]),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 2}, 1,
     [0, 0.5, 1, 0.992404, 0.969846, 0.933013, 0.883022, 0.821394, 0.75, 0.67101, 0.586824, 0.5,
      0.413176, 0.32899, 0.25, 0.178606, 0.116978, 0.066987, 0.030154, 0.007596]),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, 1,
     [1, 0.945503, 0.793893, 0.578217, 0.345492, 0.146447, 0.024472, 0.993844, 0.904508,
      0.726995, 0.5, 0.273005, 0.095492, 0.006156, 0.975528, 0.853553, 0.654508, 0.421783,
      0.206107, 0.054497]),
    ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0, "lr_warmup_steps": 3}, 1,
     [0, 0.333333, 0.666667, 1, 0.885813, 0.778547, 0.678201, 0.584775, 0.49827, 0.418685,
      0.346021, 0.280277, 0.221453, 0.16955, 0.124568, 0.086505, 0.055363, 0.031142, 0.013841,
      0.00346]),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 3}, 1,
     [0, 0.333333, 0.666667, 1, 0.866025, 0.774597, 0.707107, 0.654654, 0.612372, 0.57735,
      0.547723, 0.522233, 0.5, 0.480384, 0.46291, 0.447214, 0.433013, 0.420084, 0.408248,
      0.39736]),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 3, "lr_scheduler_timescale": 8}, 1,
     [0, 0.333333, 0.666667, 1, 0.942809, 0.894427, 0.852803, 0.816497, 0.784465, 0.755929,
      0.730297, 0.707107, 0.685994, 0.666667, 0.648886, 0.632456, 0.617213, 0.603023, 0.589768,
      0.57735]),
    ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1}, 1,
     [1, 0.99446, 0.977975, 0.950953, 0.914058, 0.868198, 0.814503, 0.754296, 0.689058,
      0.620396, 0.55, 0.479604, 0.410942, 0.345704, 0.285497, 0.231802, 0.185942, 0.149047,
      0.122025, 0.10554]),
    ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 0.25}, 1,
     [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.904508, 0.654508, 0.345492,
      0.095492]),
    ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 8, "lr_scheduler_num_cycles": 2,
      "lr_scheduler_min_lr_ratio": 0.2}, 1,
     [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.882843, 0.6, 0.317157, 0.2, 0.317157, 0.6,
      0.882843]),
    ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args":
      ["step_rules='1:5,0.1:10,0.01'"]}, 1,
     [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01,
      0.01, 0.01]),
    ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=10"]}, 1,
     [1, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472, 0,
      0.024472, 0.095492, 0.206107, 0.345492, 0.5, 0.654508, 0.793893, 0.904508, 0.975528]),
    ({"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR", "lr_scheduler_args":
      ["step_size=5", "gamma=0.5"]}, 1,
     [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125,
      0.125, 0.125]),
]  # fmt: skip


def parameter_groups(*rates):
    return [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": rate} for rate in rates]


def rates_of(optimizer, scheduler, *, num_steps=20):
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("case", "num_processes", "expected"), LEARNING_RATES)
def test_the_learning_rates_are_those_of_sd_scripts(case, num_processes, expected):
    optimizer = torch.optim.AdamW(parameter_groups(1.0), lr=1.0)
    scheduler = create_scheduler(
        optimizer, OptimizerOptions(**case), num_training_steps=20, num_processes=num_processes
    )
    assert rates_of(optimizer, scheduler) == pytest.approx(expected, abs=1e-6)


def test_every_schedule_but_adafactors_is_compared_with_sd_scripts():
    compared = {case.get("lr_scheduler", "constant") for case, _, _ in LEARNING_RATES}
    assert set(SCHEDULERS) - compared == {"adafactor"}


def test_every_group_keeps_its_own_rate():
    optimizer = torch.optim.AdamW(parameter_groups(1.0, 0.1))
    options = OptimizerOptions(lr_scheduler="linear")
    scheduler = create_scheduler(optimizer, options, num_training_steps=10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(("length", "steps"), [(0, 0), (0.0, 0), (7, 7), (0.1, 3), (1, 1)])
def test_a_length_below_one_is_a_ratio(length, steps):
    assert num_steps(length, 30) == steps


def test_a_resumed_schedule_continues_where_it_was():
    options = OptimizerOptions(lr_scheduler="cosine", lr_warmup_steps=3)
    optimizer = torch.optim.AdamW(parameter_groups(1.0))
    scheduler = create_scheduler(optimizer, options, num_training_steps=20)
    rates_of(optimizer, scheduler, num_steps=8)
    states = optimizer.state_dict(), scheduler.state_dict()
    rest = rates_of(optimizer, scheduler, num_steps=8)

    optimizer = torch.optim.AdamW(parameter_groups(1.0))
    scheduler = create_scheduler(optimizer, options, num_training_steps=20)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert rates_of(optimizer, scheduler, num_steps=8) == rest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler=cosin"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "adafactor"}, "optimizer_type=Adafactor"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("speed=2",)}, "speed"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("speed",)}, "'speed'"),
        ({"lr_scheduler_type": "NoSuchLR"}, "NoSuchLR"),
        ({"lr_scheduler_type": "no_such_package.LR"}, "no_such_package"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "T_max"),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_warmup_steps": 15,
                "lr_decay_steps": 10,
            },
            "15 [+] 10",
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_by_name(options, named):
    optimizer = torch.optim.AdamW(parameter_groups(1.0))
    with pytest.raises(UserError, match=named):
        create_scheduler(optimizer, OptimizerOptions(**options), num_training_steps=20)


def test_relative_step_adafactor_brings_its_schedule_and_starts_at_the_learning_rate(caplog):
    options = OptimizerOptions(
        optimizer_type="Adafactor", learning_rate=3e-4, lr_scheduler="cosine"
    )
    optimizer = create_optimizer(
        options.optimizer_type, parameter_groups(1e-4), learning_rate=options.learning_rate
    )
    with caplog.at_level(logging.WARNING):
        scheduler = create_scheduler(optimizer, options, num_training_steps=20)
    assert "lr_scheduler=cosine has no effect" in caplog.text
    assert scheduler_name(optimizer, options) == "adafactor:0.0003"
    assert scheduler.get_last_lr() == [3e-4]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] != 3e-4


def test_adafactor_tells_a_rate_for_groups_without_a_gradient_too():
    """As where a text encoder is frozen halfway, or gradients are gone after a fused step."""
    optimizer = create_optimizer("Adafactor", parameter_groups(1e-4, 1e-4), learning_rate=3e-4)
    options = OptimizerOptions(optimizer_type="Adafactor", learning_rate=3e-4)
    scheduler = create_scheduler(optimizer, options, num_training_steps=20)
    weight = optimizer.param_groups[1]["params"][0]
    for gradient in (torch.ones(2, 2), None):
        weight.grad = gradient
        optimizer.step()
        scheduler.step()
        first, second = scheduler.get_last_lr()
        assert first == 3e-4 != second


def test_a_schedule_free_optimizer_keeps_its_rate_and_says_what_it_ignores(caplog):
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(parameter_groups(0.5))
    options = OptimizerOptions(lr_scheduler="cosine", lr_warmup_steps=3)
    with caplog.at_level(logging.WARNING):
        scheduler = create_scheduler(optimizer, options, num_training_steps=20)
    assert "lr_scheduler=cosine" in caplog.text
    optimizer.train()
    assert rates_of(optimizer, scheduler) == [0.5] * 20
