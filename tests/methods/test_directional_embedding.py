"""directional_embedding in every method that learns tokens, under several optimizers."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS, Export
from mlm_plugin.methods.checks import check_config
from mlm_plugin.models.directional_tokens import mean_norm

TOKEN_METHODS = [name for name, method in METHODS.items() if method.learns_tokens]
OPTIMIZERS = {
    "AdamW": {"optimizer_args": ["weight_decay=0.1"], "learning_rate": 2e-2},
    "SGDNesterov": {"learning_rate": 10.0},
    "Adafactor": {
        "optimizer_args": ["relative_step=False", "scale_parameter=False"],
        "learning_rate": 2e-2,
    },
    "Prodigy": {"learning_rate": 1.0},
    "Lion": {"learning_rate": 1e-2},
    "AdamWScheduleFree": {"learning_rate": 2e-2},
}
PACKAGES = {"Prodigy": "prodigyopt", "Lion": "lion_pytorch", "AdamWScheduleFree": "schedulefree"}
DIRECTIONAL = {"directional_embedding": True, "mlm_loss_weight": 0.1}
PLAIN = TrainConfig().replace(pretrained_model_name_or_path="model", output_dir="out")


def directional(trainer_of, method, **options):
    return trainer_of(method, **{**DIRECTIONAL, **options})


def relative_errors(method):
    """How far the norms of all vectors are from that of the vocabulary, relative to it."""
    errors = []
    for text_encoder, tokens in zip(
        method.models.text_encoders, method.learned_tokens, strict=True
    ):
        norm = mean_norm(text_encoder.token_embedding.weight)
        errors += [(v.norm(dim=-1) / norm - 1).abs().max() for v in tokens.vectors.values()]
    return torch.stack(errors)


def cosines_to_start(method):
    return torch.stack(
        [
            torch.cosine_similarity(direction, start, dim=-1).max()
            for tokens in method.learned_tokens
            for direction, start in zip(
                tokens.embeddings.values(), tokens.initial_directions, strict=True
            )
        ]
    )


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *((method, "AdamW") for method in TOKEN_METHODS),
        *(("textual_inversion", optimizer) for optimizer in OPTIMIZERS if optimizer != "AdamW"),
    ],
)
def test_every_vector_keeps_the_norm_of_the_vocabulary(method, optimizer, trainer_of):
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    options = {"optimizer_type": optimizer, **OPTIMIZERS[optimizer], "num_vectors_per_token": 2}
    trainer = directional(trainer_of, method, steps=8, **options)
    trainer.run()
    with trainer.evaluating():
        assert relative_errors(trainer.method).max() < 1e-6
    assert cosines_to_start(trainer.method).max() < 1 - 1e-6, "every vector has moved"
    if "ScheduleFree" not in optimizer:
        for direction in trainer.method.embedding_parameters():
            torch.testing.assert_close(
                direction.norm(dim=-1), torch.ones(direction.shape[:-1]), atol=1e-6, rtol=0
            )


def test_both_encoders_of_sdxl_have_norms_of_their_own(sdxl_trainer_of):
    trainer = directional(sdxl_trainer_of, "textual_inversion", learning_rate=2e-2)
    trainer.run()
    assert relative_errors(trainer.method).max() < 1e-6
    first, second = (tokens.norm for tokens in trainer.method.learned_tokens)
    assert first != second


def test_layers_of_xti_and_vectors_of_a_token_take_directions_of_their_own(trainer_of):
    trainer = directional(trainer_of, "xti", learning_rate=2e-2, num_vectors_per_token=2, steps=8)
    trainer.run()
    (direction,) = trainer.method.embedding_parameters()
    rows = direction.detach().flatten(0, 1)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    assert cosines.max() < 1 - 1e-4


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_resumed_run_ends_bit_identical(method, trainer_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "directional_kappa": 0.01}
    straight = directional(trainer_of, method, **options)
    straight.run()
    first = directional(trainer_of, method, **options)
    first.plan = dataclasses.replace(first.plan, num_steps=2)
    first.run()
    first.save_state(tmp_path / "state")
    second = directional(trainer_of, method, **options)
    second.load_state(tmp_path / "state")
    second.run()
    expected, found = straight.method.state_dict(), second.method.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_prior_of_a_resumed_run_is_that_of_the_first(trainer_of, tmp_path):
    first = directional(trainer_of, "textual_inversion")
    first.run()
    first.save_state(tmp_path / "state")
    other = directional(trainer_of, "textual_inversion", init_word="cat")
    other.load_state(tmp_path / "state")
    (expected,), (found,) = (
        trainer.method.only_tokens.initial_directions for trainer in (first, other)
    )
    assert torch.equal(expected, found)


def test_a_state_of_free_embeddings_is_refused(trainer_of, tmp_path):
    free = trainer_of("textual_inversion")
    free.save_state(tmp_path / "state")
    other = directional(trainer_of, "textual_inversion")
    with pytest.raises(UserError, match=r"initial_direction|directional_embedding"):
        other.load_state(tmp_path / "state")


def test_the_gradient_of_a_step_holds_the_prior_once(trainer_of):
    """Whatever the number of batches, and not weighted like the term."""
    gradients = []
    for accumulation in (1, 2):
        for kappa in (0.0, 0.5):
            trainer = directional(
                trainer_of,
                "textual_inversion",
                directional_kappa=kappa,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0,
            )
            (parameter,) = trainer.method.embedding_parameters()
            with torch.no_grad():  # at the start itself the prior has no gradient
                parameter.copy_(parameter.flip(-1))
            seen = []
            parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))
            trainer.optimizer.step = lambda: None
            batches = next(trainer._steps_of_epoch())
            torch.manual_seed(0)
            trainer._train_step(batches, exit_code=0)
            gradients.append(seen[-1].clone())
            mean = trainer.method.only_tokens.initial_directions[0]
    for plain, with_prior in (gradients[:2], gradients[2:]):
        direction = mean.flip(-1)
        tangent = mean - (mean * direction).sum(-1, keepdim=True) * direction
        torch.testing.assert_close(with_prior - plain, -0.5 * tangent, atol=1e-5, rtol=1e-4)


def test_a_strong_prior_keeps_the_direction_near_its_start(trainer_of):
    cosines = []
    for kappa in (0.0, 100.0):
        options = {"directional_kappa": kappa, "learning_rate": 1e-2, "mlm_loss_weight": 0}
        trainer = directional(trainer_of, "textual_inversion", steps=6, **options)
        trainer.run()
        cosines.append(cosines_to_start(trainer.method).min())
    assert cosines[1] > 1 - 0.5 * (1 - cosines[0])


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_the_files_hold_what_the_text_encoder_reads(method, trainer_of, tmp_path):
    trainer = directional(trainer_of, method, learning_rate=1e-2, num_vectors_per_token=2)
    trainer.run()
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind, file: {}))
    files = trainer.method.files(path)
    file = files[0] if method == "textual_inversion" else files[1]
    (vectors,) = trainer.method.only_tokens.vectors.values()
    saved = load_file(file)
    if method == "xti":
        layers = {tuple(layer.flatten().tolist()) for layer in saved.values()}
        assert layers == {tuple(layer.flatten().tolist()) for layer in vectors}
    else:
        assert torch.equal(saved["emb_params"], vectors[0])


def test_an_embedding_is_gone_on_with_whatever_its_norm(trainer_of, tmp_path):
    free = trainer_of("textual_inversion", learning_rate=5e-2, steps=8)
    free.run()
    path = tmp_path / "x.safetensors"
    free.method.export(Export(path, metadata=lambda kind, file: {}))
    trainer = directional(trainer_of, "textual_inversion", weights=path)
    assert relative_errors(trainer.method).max() < 1e-6
    (vectors,), (start,) = (t.method.only_tokens.vectors.values() for t in (trainer, free))
    torch.testing.assert_close(
        torch.cosine_similarity(vectors, start, dim=-1), torch.ones(vectors.shape[:-1])
    )


# --- options ---


def test_the_direction_of_an_embedding_that_is_not_trained_is_refused():
    config = PLAIN.replace(method="pivotal", directional_embedding=True, embedding_lr=0.0)
    with pytest.raises(UserError, match=r"directional_embedding .* embedding_lr = 0"):
        check_config(config)
    check_config(config.replace(embedding_lr=1e-3))


def test_a_prior_without_directions_has_no_effect(caplog):
    check_config(PLAIN.replace(method="xti", directional_kappa=0.1))
    (record,) = caplog.records
    assert record.getMessage() == "directional_kappa has no effect without directional_embedding"


@pytest.mark.parametrize("method", ["lora", "dreambooth"])
def test_a_method_without_tokens_names_the_option(method, caplog):
    check_config(PLAIN.replace(method=method, directional_embedding=True))
    (record,) = caplog.records
    assert record.getMessage() == f"directional_embedding has no effect with method = {method}"
