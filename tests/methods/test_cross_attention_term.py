"""The term at the U-Net's cross-attention, on the real trainer of every method."""

import pytest
import torch

from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.setup.builtin_names import contexts_path, contextualizer_path, model_path

TRAINS_KEYS = ("lora", "dreambooth", "custom_diffusion", "pivotal")
UNET_ONLY = {
    "lora": {"network_train_unet_only": True},
    "dreambooth": {"no_train_text_encoder": True},
    "pivotal": {"network_train_unet_only": True, "embedding_lr": 0},
    "custom_diffusion": {"embedding_lr": 0},
}
TARGETS = ("states", "class", "word")


def term_of(trainer, call=0):
    trainer.method.train(False)
    return trainer._term(call)


def disturb(trainer, part):
    with torch.no_grad():
        for parameter in trainer.method.parts()[part]:
            parameter.add_(0.05 * torch.randn_like(parameter))


def reached(trainer):
    """Parts with a gradient of the term."""
    trainer._term(0).loss.backward()
    return {
        part
        for part, members in trainer.method.parts().items()
        if any(p.grad is not None and p.grad.any() for p in members)
    }


@pytest.mark.parametrize("read_at", ["encoder", "cross_attention", "both"])
@pytest.mark.parametrize("name", METHODS)
def test_the_term_is_zero_before_training_and_rises_when_the_concept_takes_over(
    name, read_at, trainer_of
):
    """With a placeholder in front of the class word, and with one that has its own embedding."""
    for target in ("states", "class"):
        trainer = trainer_of(name, mlm_read_at=read_at, mlm_target=target, mlm_batch_size=8)
        assert [term_of(trainer, call).loss.item() for call in range(3)] == pytest.approx(
            [0, 0, 0], abs=2e-5
        )
        for part in trainer.method.parts():
            disturb(trainer, part)
        assert term_of(trainer).loss.item() > 1e-3


@pytest.mark.parametrize("read_at", ["encoder", "cross_attention", "both"])
def test_the_term_of_sdxl_is_zero_before_training_too(read_at, sdxl_trainer_of):
    for target in ("states", "class"):
        trainer = sdxl_trainer_of("lora", mlm_read_at=read_at, mlm_target=target, mlm_batch_size=8)
        assert [term_of(trainer, call).loss.item() for call in range(3)] == pytest.approx(
            [0, 0, 0], abs=2e-5
        )
        for part in trainer.method.parts():
            disturb(trainer, part)
        assert term_of(trainer).loss.item() > 1e-3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_the_term_reaches_the_keys_and_values_of_every_method_that_trains_them(
    name, target, trainer_of
):
    trainer = trainer_of(name, mlm_read_at="cross_attention", mlm_target=target)
    for part in trainer.method.parts():
        disturb(trainer, part)
    assert ("unet" in reached(trainer)) == (name in TRAINS_KEYS)
    if name in ("textual_inversion", "xti"):
        assert reached(trainer) == {"embedding"}


@pytest.mark.parametrize("name", METHODS)
def test_at_both_places_their_losses_are_averaged(name, trainer_of):
    trainer = trainer_of(name, mlm_read_at="both", mlm_target="states")
    disturb(trainer, next(iter(trainer.method.parts())))
    output = term_of(trainer)
    assert output.parts.keys() == {"te1", "cross_attention"}
    assert output.loss == torch.stack(list(output.parts.values())).mean()


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("lora", ["textencoder"]),
        ("dreambooth", ["textencoder"]),
        ("pivotal", ["textencoder", "embedding"]),
    ],
)
def test_an_encoder_that_is_frozen_during_the_run_takes_nothing_from_the_pull_on_the_u_net(
    name, frozen, trainer_of
):
    trainer = trainer_of(name, mlm_read_at="both", mlm_target="states")
    for part in trainer.method.parts():
        disturb(trainer, part)
    place = term_of(trainer).parts["cross_attention"]
    for part in frozen:
        trainer.method.freeze(part)
    assert term_of(trainer).loss == place
    with torch.no_grad():
        assert "te1" in term_of(trainer).parts


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", UNET_ONLY)
def test_a_run_that_trains_the_u_net_alone_has_a_term_and_no_text_encoder(name, target, trainer_of):
    options = {**UNET_ONLY[name], "mlm_target": target, "mlm_loss_weight": 1}
    trainer = trainer_of(name, cache_text_encoder_outputs=True, cache_latents=True, **options)
    assert trainer.mlm_read_at == "cross_attention"
    (text_encoder,) = trainer.models.text_encoders

    def refuse(*_args, **_kwargs):
        raise AssertionError("the text encoder was run")

    text_encoder.model.forward = refuse
    first = term_of(trainer).loss.item()
    disturb(trainer, "unet")
    assert abs(term_of(trainer).loss.item() - first) > 1e-4
    trainer.run()


@pytest.mark.parametrize("target", TARGETS)
def test_the_term_pulls_changed_keys_and_values_back(target, trainer_of):
    trainer = trainer_of("lora", **UNET_ONLY["lora"], mlm_target=target, mlm_batch_size=8)
    disturb(trainer, "unet")
    optimizer = torch.optim.Adam(trainer.method.parameters(), lr=2e-3)
    losses = []
    for call in range(30):
        loss = term_of(trainer, call % 3).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # masked words cannot be guessed by the toy's contextualizer, which has learned nothing
    assert sum(losses[-3:]) < (0.98 if target == "word" else 0.9) * sum(losses[:3])


def test_a_lora_that_starts_from_a_file_is_compared_with_the_model_without_it(trainer_of, tmp_path):
    options = {**UNET_ONLY["lora"], "mlm_target": "states", "mlm_loss_weight": 1}
    first = trainer_of("lora", **options)
    disturb(first, "unet")
    expected = term_of(first).loss.item()
    from mlm_plugin.methods import Export

    first.method.export(Export(tmp_path / "a.safetensors", lambda _kind, _file: {}))
    second = trainer_of("lora", **options, network_weights=tmp_path / "a.safetensors")
    assert term_of(second).loss.item() == pytest.approx(expected, rel=1e-4)
    both = trainer_of("lora", mlm_target="states", mlm_read_at="both")
    assert both.regularizer.encoders[0].targets[0].teacher_ND is not None


def test_a_network_without_modules_in_the_text_encoder_is_read_at_the_u_net_alone(
    trainer_of, tmp_path
):
    """Its ranks come from a file of the U-Net alone; the options do not say that."""
    from mlm_plugin.methods import Export

    first = trainer_of("lora", network_train_unet_only=True, mlm_target="states")
    first.method.export(Export(tmp_path / "a.safetensors", lambda _kind, _file: {}))
    from_file = {"network_weights": tmp_path / "a.safetensors", "dim_from_weights": True}
    trainer = trainer_of("lora", mlm_target="states", **from_file)
    assert "textencoder" not in {p for p, weights in trainer.method.parts().items() if weights}
    disturb(trainer, "unet")
    output = term_of(trainer)
    assert output.loss > 1e-3
    assert not output.parts  # those of several places, which would be averaged


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_lycoris_is_seen_through(algo, trainer_of):
    pytest.importorskip("lycoris")
    trainer = trainer_of(
        "lora",
        network_module="lycoris.kohya",
        network_args=[f"algo={algo}"],
        mlm_read_at="cross_attention",
        mlm_target="states",
    )
    before = term_of(trainer).loss.item()
    disturb(trainer, "unet")
    assert term_of(trainer).loss.item() > before + 1e-5
    assert "unet" in reached(trainer)


def test_a_packed_u_net_is_read(trainer_of):
    options = {**UNET_ONLY["lora"], "mlm_loss_weight": 1}
    for target in ("states", "class"):
        trainer = trainer_of("lora", quantize_unet="int8", mlm_target=target, **options)
        disturb(trainer, "unet")
        assert term_of(trainer).loss.item() > 1e-4
        assert reached(trainer) == {"unet"}


def test_dreambooth_keeps_the_weights_of_before_in_half_precision(trainer_of):
    trainer = trainer_of("dreambooth", mlm_read_at="cross_attention", mlm_target="states")
    unet, cross_attention = trainer.models.unet, trainer.regularizer.cross_attention
    name = cross_attention_names(unet)[0]
    layer = unet.get_submodule(f"{name}.to_k")
    before = layer.weight.detach().clone()
    disturb(trainer, "unet")
    kept = cross_attention.by_layer[0][0].weight()
    assert torch.equal(kept, before.half().float())
    assert not torch.allclose(layer.weight, before, atol=1e-2)


def test_a_network_without_keys_and_values_is_refused(trainer_of, tmp_path):
    pytest.importorskip("lycoris")
    preset = tmp_path / "convolutions.toml"
    preset.write_text(
        'unet_target_module = ["ResnetBlock2D"]\nunet_target_name = []\n'
        "text_encoder_target_module = []\ntext_encoder_target_name = []\n"
    )
    network = {"network_module": "lycoris.kohya", "network_args": [f"preset={preset}"]}
    with pytest.raises(UserError, match="U-Net's keys and values"):
        trainer_of("lora", **network, mlm_read_at="cross_attention", mlm_target="states")


@pytest.mark.parametrize("target", TARGETS)
def test_sdxl_is_read_with_both_encoders_states(target, sdxl_trainer_of):
    options = {"network_train_unet_only": True, "cache_text_encoder_outputs": True}
    trainer = sdxl_trainer_of("lora", **options, mlm_target=target, mlm_loss_weight=1)
    assert len(trainer.regularizer.encoders) == 2
    before = term_of(trainer).loss.item()
    disturb(trainer, "unet")
    rise = term_of(trainer).loss.item() - before
    assert (abs(rise) if target == "word" else rise) > 1e-5  # hidden words are never told exactly
    assert reached(trainer) == {"unet"}


def test_with_one_of_two_text_encoders_trained_the_other_ones_states_are_kept(sdxl_trainer_of):
    trainer = sdxl_trainer_of(
        "lora", text_encoder_lr=[1e-3, 0.0], mlm_read_at="both", mlm_target="states"
    )
    first, second = trainer.regularizer.encoders
    assert first.targets[0].states_LD is None
    assert second.targets[0].states_LD is not None
    assert trainer._term(0).parts.keys() == {"te1", "cross_attention"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("target", ["states", "class"])
def test_a_real_contextualizer_in_half_precision_costs_nothing_before_training(
    target, precision, trainer_of
):
    """Targets are computed as the term is: in one precision."""
    trainer = trainer_of(
        "dreambooth",
        pretrained_model_name_or_path=model_path("pocket"),
        mlm_prompt_set=contexts_path("pocket"),
        mlm_target=target,
        mlm_contextualizer="auto" if target == "states" else contextualizer_path("pocket"),
        mlm_batch_size=8,
        mlm_read_at="encoder",
        mixed_precision=precision,
    )
    losses = [term_of(trainer, call).loss.item() for call in range(3)]
    assert losses == pytest.approx([0, 0, 0], abs=2e-6)


@pytest.mark.parametrize("arguments", [["dora_wd=True"], ["algo=glora"]])
def test_lycoris_that_reads_the_weights_is_seen_in_half_precision(arguments, trainer_of):
    pytest.importorskip("lycoris")
    trainer = trainer_of(
        "lora",
        **UNET_ONLY["lora"],
        network_module="lycoris.kohya",
        network_args=arguments,
        mixed_precision="bf16",
        mlm_target="states",
        mlm_loss_weight=1,
    )
    disturb(trainer, "unet")
    assert reached(trainer) == {"unet"}


def test_a_network_that_replaces_keys_and_values_is_refused_where_they_are_read(trainer_of):
    pytest.importorskip("lycoris")
    full = {"network_module": "lycoris.kohya", "network_args": ["algo=full"]}
    with pytest.raises(UserError, match="algo=full.*mlm_read_at = encoder"):
        trainer_of("lora", **full, mlm_target="states")
    assert term_of(trainer_of("lora", **full, mlm_target="states", mlm_read_at="encoder")).loss == 0
