"""The facts of each method: its rates, the options it reads, and whether the MLM term acts."""

import pytest

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.methods.checks import check_config, check_model

USABLE = TrainConfig().replace(
    pretrained_model_name_or_path="model", output_dir="out", network_alpha=4.0, network_dim=4
)
NO_NETWORK = TrainConfig().replace(pretrained_model_name_or_path="model", output_dir="out")
TOKEN_METHODS = ("textual_inversion", "xti", "custom_diffusion", "pivotal")


def why_no_gradient(config, *, read_at="encoder", **count):
    method = METHODS[config.schedule.method]
    return method.why_no_gradient(config.replace(mlm_read_at=read_at), **count)


def trained_text_encoders(config, *, num_text_encoders):
    method = METHODS[config.schedule.method]
    return method.trained_text_encoders(config, num_text_encoders=num_text_encoders)


@pytest.mark.parametrize(
    ("fact", "names"),
    [
        ("supports_sdxl", ("lora", "dreambooth", "textual_inversion", "pivotal")),
        ("trains_network", ("lora", "pivotal")),
        ("learns_tokens", TOKEN_METHODS),
        ("trains_base_weights", ("dreambooth", "custom_diffusion")),
        ("supports_fused_backward", ("dreambooth",)),
    ],
)
def test_a_fact_holds_for_these_of_our_methods(fact, names):
    ours = ("lora", "dreambooth", *TOKEN_METHODS)
    assert {name for name in ours if getattr(METHODS[name], fact)} == set(names)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora", {"unet", "textencoder1", "textencoder2"}),
        ("dreambooth", {"unet", "textencoder1", "textencoder2"}),
        ("textual_inversion", {"embedding"}),
        ("pivotal", {"unet", "textencoder1", "textencoder2", "embedding"}),
    ],
)
def test_the_parts_of_a_method_in_sdxl(name, parts):
    assert METHODS[name].learning_rates(NO_NETWORK, num_text_encoders=2).keys() == parts


def test_a_training_state_depends_on_the_rates_and_stops_of_its_parts_and_on_little_more():
    assert METHODS["xti"].state_options() == {
        "num_vectors_per_token",
        "directional_embedding",
        "directional_kappa",
        "embedding_lr",
        "stop_embedding_training",
    }
    assert METHODS["pivotal"].state_options() == METHODS["lora"].state_options().union(
        METHODS["xti"].state_options()
    )
    assert METHODS["custom_diffusion"].state_options() == METHODS["xti"].state_options() | {
        "stop_unet_training"
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_run_with_the_defaults_and_have_the_mlm_term(method, caplog):
    config = NO_NETWORK.replace(method=method)
    check_config(config)
    assert not caplog.records
    assert why_no_gradient(config) is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"quantize_unet": "nf4", "method": "dreambooth"},
            ["quantize_unet = 'nf4'", "method = 'dreambooth'", "lora, textual_inversion, xti"],
        ),
        ({"quantize_unet": "int8", "method": "custom_diffusion"}, ["quantize_unet = 'int8'"]),
        ({"text_encoder_lr": (1e-4, -1e-5)}, ["text_encoder_lr = -1e-05", "negative"]),
        ({"cache_text_encoder_outputs": True}, ["cache_text_encoder_outputs", "unet_only"]),
        (
            {"cache_text_encoder_outputs": True, "method": "textual_inversion"},
            ["cache_text_encoder_outputs"],
        ),
        ({"unet_lr": -1.0}, ["unet_lr"]),
        (
            {"unet_lr": 0.0, "text_encoder_lr": (0.0,)},
            ["unet_lr and text_encoder_lr are all 0", "nothing would be trained"],
        ),
        (
            {"fused_backward_pass": True},
            ["fused_backward_pass", "method = 'lora'", "dreambooth"],
        ),
    ],
)
def test_a_contradiction_names_its_options(changes, parts, refused):
    with refused(parts):
        check_config(USABLE.replace(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora", "learning_rate": 0.0}, "learning_rate is 0"),
        (
            {"method": "lora", "unet_lr": 0.0, "text_encoder_lr": (0.0,)},
            "unet_lr and text_encoder_lr are all 0",
        ),
        (
            {"method": "dreambooth", "learning_rate": 0.0, "learning_rate_te": 0.0},
            "learning_rate and learning_rate_te are all 0",
        ),
        (
            {"method": "dreambooth", "learning_rate": 0.0, "no_train_text_encoder": True},
            "learning_rate is 0",
        ),
        ({"method": "textual_inversion", "embedding_lr": 0.0}, "embedding_lr is 0"),
        ({"method": "xti", "learning_rate": 0.0}, "learning_rate is 0"),
        (
            {"method": "custom_diffusion", "learning_rate": 0.0},
            "learning_rate is 0",
        ),
        (
            {
                "method": "pivotal",
                "unet_lr": 0.0,
                "text_encoder_lr": (0.0,),
                "embedding_lr": 0.0,
            },
            "unet_lr and text_encoder_lr and embedding_lr are all 0",
        ),
    ],
)
def test_a_run_whose_rates_are_all_0_is_refused_by_their_names(changes, said):
    with pytest.raises(UserError, match="nothing would be trained") as caught:
        check_config(NO_NETWORK.replace(**changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "trained", "untrained"),
    [
        ("lora", {"unet_lr": 1e-4}, {}),
        ("lora", {"text_encoder_lr": (1e-4,)}, {"embedding_lr": 1e-4, "learning_rate_te": 1e-4}),
        ("dreambooth", {"learning_rate_te": 1e-6}, {"unet_lr": 1e-4, "embedding_lr": 1e-4}),
        ("textual_inversion", {"embedding_lr": 5e-4}, {"unet_lr": 1e-4, "learning_rate_te": 1e-4}),
        ("xti", {"embedding_lr": 5e-4}, {"text_encoder_lr": (1e-4,)}),
        ("custom_diffusion", {"embedding_lr": 5e-4}, {"unet_lr": 1e-4}),
        ("pivotal", {"embedding_lr": 5e-4}, {"learning_rate_te": 1e-4}),
    ],
)
def test_a_method_is_trained_by_its_own_rates_alone(method, trained, untrained):
    config = NO_NETWORK.replace(method=method, learning_rate=0.0, mlm_loss_weight=0.0)
    check_config(config.replace(**trained))
    with pytest.raises(UserError, match="nothing would be trained"):
        check_config(config.replace(**untrained))


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("lora", {"unet_lr": -1.0}, "unet_lr = -1"),
        ("dreambooth", {"learning_rate_te": -1.0}, "learning_rate_te = -1"),
        ("custom_diffusion", {"learning_rate": -1.0, "embedding_lr": 1.0}, "learning_rate = -1"),
        ("xti", {"embedding_lr": -1.0}, "embedding_lr = -1"),
    ],
)
def test_a_negative_rate_is_refused_by_its_name(method, changes, named):
    with pytest.raises(UserError, match=named):
        check_config(NO_NETWORK.replace(method=method, **changes))


WITHOUT_GRADIENT = [
    ({"network_train_unet_only": True}, "network_train_unet_only"),
    ({"text_encoder_lr": (0.0,)}, "text_encoder_lr = 0"),
    ({"learning_rate": 0.0, "unet_lr": 1e-4}, "learning_rate = 0"),
    (
        {"network_module": "lycoris.kohya", "network_args": ("preset=unet-transformer-only",)},
        "preset=unet-transformer-only",
    ),
    ({"method": "dreambooth", "no_train_text_encoder": True}, "no_train_text_encoder"),
    ({"method": "dreambooth", "learning_rate_te": 0.0}, "learning_rate_te = 0"),
    ({"method": "custom_diffusion", "embedding_lr": 0.0}, "embedding_lr = 0"),
    (
        {"method": "pivotal", "embedding_lr": 0.0, "text_encoder_lr": (0.0,), "unet_lr": 1e-4},
        "text_encoder_lr = 0",
    ),
    (
        {"method": "pivotal", "embedding_lr": 0.0, "network_train_unet_only": True},
        "network_train_unet_only",
    ),
]


@pytest.mark.parametrize(("changes", "named"), WITHOUT_GRADIENT)
def test_mlm_without_a_gradient_is_refused_with_the_reason(changes, named):
    config = USABLE.replace(**changes, mlm_read_at="encoder")
    assert named in why_no_gradient(config)
    with pytest.raises(UserError, match=named) as caught:
        check_config(config)
    assert "mlm_loss_weight = 0" in str(caught.value)
    check_config(config.replace(mlm_loss_weight=0.0))
    assert why_no_gradient(USABLE) is None


@pytest.mark.parametrize(("changes", "named"), WITHOUT_GRADIENT)
def test_where_the_u_net_is_trained_the_term_reads_there(changes, named):
    config = USABLE.replace(**changes)
    method = METHODS[config.schedule.method]
    assert method.mlm_read_at(USABLE) == "both"
    assert method.mlm_read_at(config) == "cross_attention"
    assert why_no_gradient(config, read_at="auto") is None
    check_config(config)
    reason = why_no_gradient(config, read_at="both")
    assert named in reason
    both = config.replace(mlm_read_at="both").mlm
    message = no_gradient_message(both, reason, elsewhere=True)
    assert "nothing at the text encoder" in message
    assert "take mlm_read_at = cross_attention" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"network_train_text_encoder_only": True, "text_encoder_lr": (0.0,)}, "text_encoder_only"),
        ({"unet_lr": 0.0, "text_encoder_lr": (0.0,)}, "unet_lr = 0"),
        ({"method": "xti", "embedding_lr": 0.0}, "trains no U-Net"),
    ],
)
def test_a_term_at_the_cross_attention_needs_keys_and_values_that_are_trained(changes, named):
    reason = why_no_gradient(USABLE.replace(**changes), read_at="cross_attention")
    assert named in reason
    assert ", and " in reason


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_token_embeddings_give_the_mlm_term_its_gradient_whatever_else_is_off(method):
    config = NO_NETWORK.replace(method=method, learning_rate=0.0, embedding_lr=1e-3)
    assert why_no_gradient(config) is None
    assert why_no_gradient(config.replace(text_encoder_lr=(0.0,), unet_lr=0.0)) is None
    assert why_no_gradient(config.replace(network_train_unet_only=True)) is None
    assert why_no_gradient(config.replace(no_train_text_encoder=True, learning_rate_te=0.0)) is None


def test_pivotal_needs_embeddings_or_text_encoder_modules_for_the_mlm_term():
    pivotal = NO_NETWORK.replace(method="pivotal")
    assert why_no_gradient(pivotal.replace(embedding_lr=0.0)) is None
    assert why_no_gradient(pivotal.replace(network_train_unet_only=True)) is None
    assert why_no_gradient(pivotal.replace(embedding_lr=0.0, network_train_unet_only=True))


def test_a_method_minds_only_its_own_options():
    dreambooth = NO_NETWORK.replace(method="dreambooth")
    assert why_no_gradient(dreambooth.replace(network_train_unet_only=True)) is None
    assert why_no_gradient(dreambooth.replace(text_encoder_lr=(0.0,), embedding_lr=0.0)) is None
    assert why_no_gradient(dreambooth.replace(learning_rate=0.0, learning_rate_te=1e-6)) is None
    assert why_no_gradient(dreambooth.replace(learning_rate=0.0)).startswith("learning_rate = 0")
    assert "learning_rate_te" in why_no_gradient(dreambooth.replace(learning_rate_te=0.0))
    assert why_no_gradient(USABLE.replace(no_train_text_encoder=True, learning_rate_te=0.0)) is None
    assert why_no_gradient(USABLE.replace(embedding_lr=0.0)) is None


def test_the_text_encoder_rate_of_a_lora_falls_back_to_learning_rate():
    frozen = USABLE.replace(learning_rate=0.0, unet_lr=1e-4)
    assert why_no_gradient(frozen).startswith("learning_rate = 0")
    assert why_no_gradient(frozen.replace(text_encoder_lr=(5e-5,))) is None
    assert why_no_gradient(USABLE.replace(text_encoder_lr=(0.0,))).startswith("text_encoder_lr = 0")


def test_with_two_text_encoders_one_that_is_trained_is_enough_for_the_mlm_term():
    second = USABLE.replace(text_encoder_lr=(0.0, 1e-4))
    assert why_no_gradient(second) is None
    assert why_no_gradient(second, num_text_encoders=1).startswith("text_encoder_lr = 0")
    dreambooth = NO_NETWORK.replace(method="dreambooth", learning_rate_te1=0.0)
    assert why_no_gradient(dreambooth) is None
    none = dreambooth.replace(learning_rate_te2=0.0)
    reason = why_no_gradient(none)
    assert reason.startswith("learning_rate_te1 = 0 and learning_rate_te2 = 0 leaves")
    assert why_no_gradient(none, num_text_encoders=1) is None  # it has learning_rate_te
    assert why_no_gradient(dreambooth.replace(learning_rate_te=0.0)).startswith("learning_rate_te1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True]),
        ({"text_encoder_lr": (1e-4,)}, [True, True]),
        ({"text_encoder_lr": (1e-4, 0.0)}, [True, False]),
        ({"network_train_unet_only": True}, [False, False]),
        ({"method": "dreambooth", "learning_rate_te1": 0.0}, [False, True]),
        (
            {"method": "dreambooth", "learning_rate_te": 0.0, "learning_rate_te1": 1e-6},
            [True, False],
        ),
        ({"method": "dreambooth", "no_train_text_encoder": True}, [False, False]),
        ({"method": "textual_inversion"}, [True, True]),
        ({"method": "pivotal", "text_encoder_lr": (0.0, 0.0)}, [True, True]),
        ({"method": "pivotal", "embedding_lr": 0.0, "text_encoder_lr": (0.0, 1.0)}, [False, True]),
    ],
)
def test_the_mlm_term_reaches_the_text_encoders_before_whose_output_something_is_trained(
    changes, expected
):
    assert trained_text_encoders(NO_NETWORK.replace(**changes), num_text_encoders=2) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_method_made_of_one_text_encoder_refuses_sdxl(method):
    config = NO_NETWORK.replace(method=method)
    check_model(config, is_sdxl=False)
    if METHODS[method].supports_sdxl:
        check_model(config, is_sdxl=True)
        return
    with pytest.raises(UserError, match=rf"method = '{method}'.* model is SDXL; use one of lora"):
        check_model(config, is_sdxl=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_encoder_lr": (1e-4, 1e-5)}, "the second text_encoder_lr"),
        ({"stop_text_encoder2_training": 5}, "stop_text_encoder2_training"),
        ({"method": "dreambooth", "learning_rate_te1": 1e-6}, "learning_rate_te1"),
    ],
)
def test_an_option_of_the_second_text_encoder_is_named_where_there_is_none(changes, named, caplog):
    config = NO_NETWORK.replace(**changes)
    check_model(config, is_sdxl=True)
    assert not caplog.records
    check_model(config, is_sdxl=False)
    assert [record.getMessage().split(" has no effect")[0] for record in caplog.records] == [named]


def test_what_a_frozen_text_encoder_leaves_unread_is_named(caplog):
    config = NO_NETWORK.replace(method="dreambooth", no_train_text_encoder=True)
    config = config.replace(mlm_loss_weight=0.0, save_diffusers_folder=True)
    check_config(config)
    assert not caplog.records
    check_config(config.replace(learning_rate_te=1e-6, stop_text_encoder_training=0.5))
    (record,) = caplog.records
    assert record.getMessage() == (
        "learning_rate_te, stop_text_encoder_training have no effect with no_train_text_encoder"
    )


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion", "xti", "custom_diffusion"])
def test_the_scale_of_a_network_does_not_matter_where_none_is_trained(method, caplog):
    check_config(NO_NETWORK.replace(method=method, network_dim=32))
    assert "network_alpha is 1" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, "both"),
        ({"network_train_unet_only": True}, "cross_attention"),
        ({"network_train_text_encoder_only": True}, "encoder"),
        ({"method": "dreambooth"}, "both"),
        ({"method": "textual_inversion"}, "encoder"),
        ({"mlm_target": "class"}, "encoder"),
    ],
)
def test_states_are_read_wherever_something_is_trained(changes, place):
    config = USABLE.replace(**changes)
    method = METHODS[config.schedule.method]
    assert method.mlm_read_at(config) == place
