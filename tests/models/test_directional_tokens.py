"""Directional tokens: the norm of ordinary tokens, steps on the sphere, the prior's gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.models.directional_tokens import (
    DirectionalTokens,
    mean_norm,
    von_mises_fisher_loss,
)

CAPTION = "a photo of sks dog"


def tokens_of(text_encoder, *, num_variants=1, num_vectors=1, kappa=0.0):
    torch.manual_seed(0)
    start = torch.randn(num_variants, num_vectors, text_encoder.token_embedding.embedding_dim)
    return DirectionalTokens(text_encoder, {"sks": start}, kappa=kappa)


def loss_of(text_encoder):
    return text_encoder.encode_captions([CAPTION]).square().sum()


def reference_step(direction, gradient, *, mean, kappa, lr):
    """A Riemannian step on the unit sphere with the prior, in the order of the paper."""
    gradient = gradient - kappa * mean
    tangent = gradient - (gradient * direction).sum(-1, keepdim=True) * direction
    moved = direction - lr * tangent
    return moved / moved.norm(dim=-1, keepdim=True)


def test_the_mean_norm_leaves_out_unused_tokens():
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert mean_norm(table) == 3.0


def test_the_text_encoder_reads_vectors_of_the_vocabularys_mean_norm(toy_text_encoder):
    tokens = tokens_of(toy_text_encoder, num_variants=2, num_vectors=3)
    (vectors,) = tokens.vectors.values()
    norm = toy_text_encoder.token_embedding.weight.norm(dim=-1).mean()
    torch.testing.assert_close(vectors.norm(dim=-1), norm.expand(2, 3))
    read = toy_text_encoder.token_embedding(toy_text_encoder.tokenize_trimmed(["sks"]))
    assert torch.equal(read[0, 1:4], vectors[0])


def test_the_gradient_of_the_prior_is_the_mean_direction_in_the_tangent_plane():
    torch.manual_seed(0)
    v, mu = (F.normalize(torch.randn(2, 3, 8), dim=-1) for _ in range(2))
    v.requires_grad_()
    von_mises_fisher_loss([v], [mu], 0.3).backward()
    tangent = mu - (mu * v).sum(-1, keepdim=True) * v
    torch.testing.assert_close(v.grad, -0.3 * tangent.detach())


def test_the_prior_is_the_log_density_up_to_a_constant():
    mu = F.normalize(torch.randn(1, 4), dim=-1)
    assert von_mises_fisher_loss([mu], [mu], 2.0).item() == pytest.approx(-2.0)
    assert von_mises_fisher_loss([-mu], [mu], 2.0).item() == pytest.approx(2.0)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_a_step_of_sgd_is_the_papers_riemannian_step(toy_text_encoder, kappa):
    tokens = tokens_of(toy_text_encoder, num_vectors=2, kappa=kappa)
    (parameter,) = tokens.embeddings.values()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    expected = parameter.detach().clone()
    mean = expected.clone()
    for _ in range(5):
        vectors = (tokens.norm * expected).requires_grad_()  # e = m v, so dL/dv = m dL/de
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DirectionalTokens, "vectors", {"sks": vectors})
            (gradient,) = torch.autograd.grad(loss_of(toy_text_encoder), vectors)
        gradient = tokens.norm * gradient
        expected = reference_step(expected, gradient, mean=mean, kappa=kappa, lr=0.1)

        prior = tokens.prior_loss()
        (loss_of(toy_text_encoder) + (0 if prior is None else prior)).backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens.retract()
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)
        expected = parameter.detach().clone()  # else differences of rounding add up
    assert not torch.allclose(expected, mean, atol=1e-3)


def test_the_gradient_is_tangent_and_a_step_cannot_change_the_norm(toy_text_encoder):
    tokens = tokens_of(toy_text_encoder)
    (parameter,) = tokens.embeddings.values()
    loss_of(toy_text_encoder).backward()
    along = F.cosine_similarity(parameter.grad, parameter, dim=-1)
    assert along.abs().max() < 1e-5
    with torch.no_grad():
        parameter.mul_(7.0)  # what weight decay and the like may do
    norm = tokens.vectors["sks"].norm(dim=-1).item()
    assert math.isclose(norm, tokens.norm.item(), rel_tol=1e-6)


def test_the_prior_alone_turns_a_direction_back_to_where_it_began(toy_text_encoder):
    tokens = tokens_of(toy_text_encoder, kappa=1.0)
    (parameter,), (start,) = tokens.embeddings.values(), tokens.initial_directions
    with torch.no_grad():
        parameter.copy_(F.normalize(torch.randn_like(parameter), dim=-1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for _ in range(100):
        tokens.prior_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens.retract()
    torch.testing.assert_close(parameter.detach(), start, atol=1e-5, rtol=0)


def test_frozen_directions_have_no_prior_and_stay_bit_for_bit(toy_text_encoder):
    tokens = tokens_of(toy_text_encoder, kappa=1.0)
    (parameter,) = tokens.embeddings.values()
    with torch.no_grad():
        parameter.mul_(1.5)
    before = parameter.detach().clone()
    parameter.requires_grad_(False)
    assert tokens.prior_loss() is None
    tokens.retract()
    assert torch.equal(parameter, before)
