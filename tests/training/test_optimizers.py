"""Optimizers by kohya's names: the right class, clear refusals, and one working step."""

import importlib
import logging
import sys

import pytest
import torch

from mlm_plugin.errors import UserError
from mlm_plugin.training.optimizers import (
    OPTIMIZERS,
    create_optimizer,
    import_class,
    is_schedule_free,
    optimizer_description,
    parse_arguments,
    set_optimizer_mode,
    uses_relative_step,
)

# (name, optimizer_args, description): sd-scripts 48d368fa, library/train_util.py get_optimizer,
# printed by tests/reference/derive_losses.py.
DESCRIPTIONS = [
    (
        "AdamW",
        ["weight_decay=0.1", "betas=0.9,0.99"],
        "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
    ),
    ("sgdnesterov", [], "torch.optim.sgd.SGD(momentum=0.9)"),
    (
        "Adafactor",
        ["scale_parameter=False"],
        "transformers.optimization.Adafactor(scale_parameter=False,relative_step=True)",
    ),
    ("RAdam", [], "torch.optim.radam.RAdam"),
    (
        "Prodigy",
        ["decouple=True", "weight_decay=0.01"],
        "prodigyopt.prodigy.Prodigy(decouple=True,weight_decay=0.01)",
    ),
    ("AdamW8bit", [], "bitsandbytes.optim.adamw.AdamW8bit"),
]


def parameter_groups(*rates):
    groups = []
    for rate in rates or (1e-2,):
        torch.manual_seed(0)
        groups.append({"params": [torch.nn.Parameter(torch.randn(80, 64))], "lr": rate})
    return groups


def make(name, *optimizer_args, groups=None, learning_rate=1e-2):
    return create_optimizer(
        name,
        groups or parameter_groups(learning_rate),
        learning_rate=learning_rate,
        optimizer_args=optimizer_args,
    )


def installed(name):
    package = OPTIMIZERS[name].path.split(".")[0]
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_lowers_a_loss_or_names_the_package_to_install(name):
    if not installed(name):
        with pytest.raises(UserError, match=f"pip install {OPTIMIZERS[name].package}"):
            make(name.lower())
        return
    groups = parameter_groups(1.0 if "DAdapt" in name or name == "Prodigy" else 1e-2)
    optimizer = create_optimizer(name.upper(), groups, learning_rate=1e-2)
    weight = groups[0]["params"][0]
    losses = []
    for _ in range(20):
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) < losses[0]


@pytest.mark.parametrize(("name", "arguments", "expected"), DESCRIPTIONS)
def test_the_description_is_that_of_sd_scripts(name, arguments, expected):
    if name in OPTIMIZERS and not installed(name):
        pytest.skip(f"{OPTIMIZERS[name].package} is not installed")
    assert optimizer_description(name, arguments) == expected


def test_an_empty_name_is_adamw_and_equals_torchs_own():
    groups, reference_groups = parameter_groups(), parameter_groups()
    optimizer = make("", "weight_decay=0.1", "betas=0.8,0.9", groups=groups)
    reference = torch.optim.AdamW(reference_groups, weight_decay=0.1, betas=(0.8, 0.9))
    for group, step in ((groups, optimizer), (reference_groups, reference)):
        group[0]["params"][0].square().sum().backward()
        step.step()
    assert type(optimizer) is torch.optim.AdamW
    assert torch.equal(groups[0]["params"][0], reference_groups[0]["params"][0])


def test_groups_keep_their_rates_and_the_callers_groups_are_unchanged():
    groups = parameter_groups(0.1, 0.2)
    optimizer = make("AdamW", groups=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    make("Adafactor", groups=groups)
    assert [group["lr"] for group in groups] == [0.1, 0.2]


def test_a_class_path_and_a_torch_name_are_found():
    assert type(make("RAdam")) is torch.optim.RAdam
    assert type(make("torch.optim.SGD", "momentum=0.5")) is torch.optim.SGD


def test_nesterov_has_momentum_and_is_nesterov():
    group = make("sgdnesterov").param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    assert make("SGDNesterov", "momentum=0.5").param_groups[0]["momentum"] == 0.5


def test_adafactor_steps_relatively_unless_disabled(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = make("Adafactor")
    assert uses_relative_step(optimizer)
    assert optimizer.param_groups[0]["lr"] is None
    assert "unet_lr" in caplog.text
    plain = make("Adafactor", "relative_step=False", "scale_parameter=False")
    assert not uses_relative_step(plain)
    assert plain.param_groups[0]["lr"] == 1e-2
    assert uses_relative_step(make("Adafactor", "relative_step=False", "warmup_init=True"))


@pytest.mark.skipif(not installed("Prodigy"), reason="prodigyopt is not installed")
def test_prodigy_takes_the_first_rate_for_all_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = make("Prodigy", groups=parameter_groups(1.0, 0.5), learning_rate=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert "0.5 without effect" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make("Prodigy", learning_rate=1e-4)
    assert "around 1.0" in caplog.text


@pytest.mark.skipif(not installed("AdamW8bit"), reason="bitsandbytes is not installed")
def test_adamw8bit_holds_its_state_in_8_bits_and_survives_a_save_on_the_cpu():
    groups = parameter_groups()
    optimizer = make("AdamW8bit", groups=groups)
    weight = groups[0]["params"][0]
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    again = make("AdamW8bit", groups=groups)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[weight]["state1"], optimizer.state[weight]["state1"])


@pytest.mark.skipif(not installed("AdamWScheduleFree"), reason="schedulefree is not installed")
def test_a_schedule_free_optimizer_trains_at_one_point_and_evaluates_at_another():
    groups = parameter_groups()
    optimizer = make("AdamWScheduleFree", groups=groups)
    assert is_schedule_free(optimizer)
    weight = groups[0]["params"][0]
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = weight.detach().clone()
    set_optimizer_mode(optimizer, training=False)
    assert not torch.equal(weight, trained)
    set_optimizer_mode(optimizer, training=True)
    torch.testing.assert_close(weight.detach(), trained)


def test_an_optimizer_without_modes_ignores_them():
    optimizer = make("AdamW")
    set_optimizer_mode(optimizer, training=False)
    assert not is_schedule_free(optimizer)


def test_a_missing_bitsandbytes_points_to_adamw(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes, or use optimizer_type=AdamW"):
        make("AdamW8bit")


@pytest.mark.skipif(not installed("AdamW8bit"), reason="bitsandbytes is not installed")
def test_a_bitsandbytes_that_cannot_step_on_the_cpu_is_refused_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mlm_plugin.training.optimizers.version", lambda _: "0.49.2")
    with pytest.raises(UserError, match="bitsandbytes 0.49.2 needs a GPU"):
        make("AdamW8bit")


@pytest.mark.parametrize(
    ("name", "argument", "named"),
    [
        ("AdamW", "weight_decay", "'weight_decay'"),
        ("AdamW", "weight_decay=a lot", "'weight_decay=a lot'"),
        ("AdamW", "=1", "'=1'"),
        ("AdamW", "weight_dekay=0.1", "AdamW has no weight_dekay; it has betas"),
        ("AdamW", "lr=0.1", "learning_rate"),
        ("AdamW", "betas=2,3", "betas"),
        ("AdamV", "eps=1", "optimizer_type=AdamV"),
        ("DAdaptEverything", "eps=1", "optimizer_type=DAdaptEverything"),
        ("no_such_package.Adam", "eps=1", "no_such_package"),
        ("torch.optim.Adamm", "eps=1", "no class Adamm in torch.optim"),
        ("torch.optim.lr_scheduler", "eps=1", "no class lr_scheduler"),
    ],
)
def test_a_mistake_is_refused_by_name_in_one_line(name, argument, named):
    with pytest.raises(UserError, match=named) as caught:
        make(name, argument)
    assert "\n" not in str(caught.value)


def test_arguments_are_python_literals_and_texts_may_hold_equal_signs():
    parsed = parse_arguments("optimizer_args", ["a=1", "b=0.9,0.99", "c=True", "d='x=y'", "e=None"])
    assert parsed == {"a": 1, "b": (0.9, 0.99), "c": True, "d": "x=y", "e": None}


def test_a_bare_class_name_is_looked_up_in_the_default_module():
    found = import_class("SGD", option_name="optimizer_type", default_module="torch.optim")
    assert found is torch.optim.SGD
