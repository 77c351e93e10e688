"""The diffusion loss against sd-scripts' own numbers, and the properties behind them."""

import logging
import random

import pytest
import torch
from diffusers import DDPMScheduler

from mlm_plugin.config.options import LossOptions
from mlm_plugin.errors import UserError
from mlm_plugin.training import diffusion_loss as dl

# (options, loss): sd-scripts 48d368fa, train_network.py NetworkTrainer.process_batch, printed by
# tests/reference/derive_losses.py.
LOSSES = [
    ({}, 0.4238239526748657),
    ({"v_parameterization": True}, 0.872201681137085),
    ({"noise_offset": 0.1}, 0.4091692566871643),
    ({"noise_offset": 0.1, "noise_offset_random_strength": True}, 0.4541338086128235),
    ({"noise_offset": 0.05, "adaptive_noise_scale": -0.4}, 0.4077483117580414),
    ({"multires_noise_iterations": 6, "multires_noise_discount": 0.3}, 0.5003812313079834),
    (
        {"noise_offset": 0.1, "multires_noise_iterations": 10, "multires_noise_discount": 0.8},
        0.3712240755558014,
    ),
    ({"ip_noise_gamma": 0.1}, 0.4230005741119385),
    ({"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}, 0.42394283413887024),
    ({"min_timestep": 200, "max_timestep": 400}, 0.4829769730567932),
    ({"min_timestep": 500, "max_timestep": 500}, 0.4281001389026642),
    ({"min_snr_gamma": 5.0}, 0.4238239526748657),
    ({"min_snr_gamma": 5.0, "v_parameterization": True}, 0.18584978580474854),
    ({"debiased_estimation_loss": True}, 1.3975129127502441),
    ({"debiased_estimation_loss": True, "v_parameterization": True}, 0.6863518953323364),
    ({"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True}, 0.18584978580474854),
    ({"v_pred_like_loss": 0.5}, 3.825477361679077),
    (
        {"min_snr_gamma": 1.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True},
        17.82000160217285,
    ),
    ({"zero_terminal_snr": True, "v_parameterization": True}, 0.8749049305915833),
    (
        {"zero_terminal_snr": True, "min_snr_gamma": 5.0, "v_parameterization": True},
        0.1861090064048767,
    ),
    ({"loss_type": "l1"}, 0.44808244705200195),
    ({"loss_type": "huber"}, 0.13643786311149597),
    (
        {"loss_type": "huber", "huber_schedule": "exponential", "huber_scale": 0.7},
        0.12898120284080505,
    ),
    (
        {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 0.7},
        0.10253025591373444,
    ),
    ({"loss_type": "smooth_l1"}, 0.6852244138717651),
    ({"loss_type": "smooth_l1", "huber_schedule": "exponential"}, 0.638538658618927),
    (
        {
            "loss_type": "smooth_l1",
            "zero_terminal_snr": True,
            "min_timestep": 998,
            "v_parameterization": True,
        },
        1.17140793800354,
    ),
    ({"masked_loss": True}, 0.21112152934074402),
    ({"masked_loss": True, "loss_type": "huber", "min_snr_gamma": 5.0}, 0.06811478734016418),
]


def noise_scheduler():
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def predict(noisy_latents, timesteps):
    return 0.3 * noisy_latents + 1e-4 * timesteps.view(-1, 1, 1, 1)


def latents_and_masks():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 12, generator=generator)
    return latents, torch.rand(2, 1, 128, 96, generator=generator)


def make_loss(case=None, **options):
    options = {**(case or {}), **options}
    options.pop("masked_loss", None)
    v_prediction = options.pop("v_parameterization", False)
    return dl.DiffusionLoss(
        noise_scheduler(),
        LossOptions(**options),
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )


def seed_everything(seed=7):
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.mark.parametrize(("case", "expected"), LOSSES, ids=lambda value: str(value))
def test_the_loss_is_that_of_sd_scripts(case, expected):
    latents, masks = latents_and_masks()
    loss_fn = make_loss(case)
    seed_everything()
    loss = loss_fn(
        predict,
        latents,
        loss_weights_B=torch.tensor([1.0, 0.5]),
        loss_masks=masks if case.get("masked_loss") else None,
    )
    torch.testing.assert_close(loss.item(), expected, rtol=2e-6, atol=0)


def test_every_loss_option_changes_some_number_of_the_table():
    used = {name for case, _ in LOSSES for name in case}
    assert set(LossOptions.__dataclass_fields__) <= used


def test_a_perfect_prediction_costs_nothing():
    latents, _ = latents_and_masks()
    for case in ({}, {"v_parameterization": True}, {"loss_type": "huber"}):
        loss_fn = make_loss(case)
        seed_everything()
        noised = dl.noise_latents(latents, loss_fn.noise_scheduler, loss_fn.options)
        target = loss_fn.target(latents, noised)
        seed_everything()
        loss = loss_fn(lambda *_, t=target: t, latents, loss_weights_B=torch.ones(2))
        assert loss.item() == 0.0


def test_the_velocity_is_orthogonal_to_the_noisy_latents_on_the_circle():
    """With latents and noise of unit norm, x_t and v are the two axes of a rotation."""
    loss_fn = make_loss(v_parameterization=True)
    latents = torch.eye(2).view(1, 1, 2, 2)[..., :1, :]
    noise = torch.eye(2).view(1, 1, 2, 2)[..., 1:, :]
    timesteps = torch.tensor([321])
    noisy_latents = loss_fn.noise_scheduler.add_noise(latents, noise, timesteps)
    noised = dl.NoisedLatents(noisy_latents, noise, timesteps)
    velocity = loss_fn.target(latents, noised)
    torch.testing.assert_close((velocity * noisy_latents).sum(), torch.tensor(0.0))
    torch.testing.assert_close(velocity.norm(), torch.tensor(1.0))


def test_ip_noise_changes_the_input_and_not_the_target():
    latents, _ = latents_and_masks()
    seed_everything()
    plain = dl.noise_latents(latents, noise_scheduler(), LossOptions())
    seed_everything()
    perturbed = dl.noise_latents(latents, noise_scheduler(), LossOptions(ip_noise_gamma=0.1))
    assert torch.equal(plain.noise, perturbed.noise)
    assert torch.equal(plain.timesteps, perturbed.timesteps)
    assert not torch.equal(plain.noisy_latents, perturbed.noisy_latents)


def test_timesteps_stay_in_their_range_and_reach_its_first_and_last():
    torch.manual_seed(0)
    timesteps = dl.sample_timesteps(2000, low=100, high=110)
    assert timesteps.min() == 100
    assert timesteps.max() == 109
    assert dl.sample_timesteps(3, low=5, high=5).tolist() == [5, 5, 5]


def test_pyramid_noise_has_unit_variance_and_is_smoother_than_white_noise():
    seed_everything()
    white = torch.randn(2, 4, 32, 32)
    pyramid = dl.add_pyramid_noise(white, iterations=6, discount=0.9)
    torch.testing.assert_close(pyramid.std(), torch.tensor(1.0))

    def neighbours(noise):
        return (noise[..., 1:] * noise[..., :-1]).mean()

    assert neighbours(pyramid) > neighbours(white) + 0.2


def test_offset_noise_is_constant_over_an_image_and_not_over_channels():
    latents, _ = latents_and_masks()
    torch.manual_seed(0)
    offset = dl.add_offset_noise(torch.zeros_like(latents), latents, strength=0.1)
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset))
    assert offset[:, :, 0, 0].unique().numel() == 8


def test_min_snr_leaves_noisy_timesteps_alone():
    snr = torch.tensor([0.1, 4.0, 5.0, 50.0])
    torch.testing.assert_close(
        dl.min_snr_weight(snr, gamma=5.0), torch.tensor([1.0, 1.0, 1.0, 0.1])
    )


def test_min_snr_of_noise_and_of_velocity_agree_on_the_same_error():
    """One error of x_0 is an error of v that is sqrt((snr + 1) / snr) times that of epsilon."""
    snr = torch.tensor([0.1, 1.0, 7.0, 100.0])
    epsilon = dl.min_snr_weight(snr, gamma=5.0) * dl.velocity_weight(snr)
    velocity = dl.min_snr_weight(snr, gamma=5.0, v_prediction=True)
    torch.testing.assert_close(epsilon, velocity)


def test_the_weights_at_the_first_timestep_are_finite():
    snr = dl.signal_to_noise(torch.tensor([1.0]))
    assert dl.debiased_weight(snr).isfinite().all()
    assert dl.velocity_weight(snr).isfinite().all()


def test_huber_is_square_for_small_errors_and_smooth_l1_linear_for_large_ones():
    zero, delta = torch.zeros(1, 1, 1, 2), torch.tensor([0.1])
    small = torch.full_like(zero, 1e-3)
    huber = dl.elementwise_loss(small, zero, loss_type="huber", huber_delta_B=delta)
    torch.testing.assert_close(huber, small**2, rtol=1e-2, atol=0)
    large = torch.full_like(zero, 1e3)
    smooth = dl.elementwise_loss(large, zero, loss_type="smooth_l1", huber_delta_B=delta)
    torch.testing.assert_close(smooth, 2 * large, rtol=1e-2, atol=0)


def test_a_mask_of_ones_changes_nothing_and_zeros_hide_an_error():
    loss = torch.rand(2, 4, 16, 12)
    torch.testing.assert_close(dl.masked(loss, torch.ones(2, 1, 128, 96)), loss)
    masks = torch.ones(2, 1, 128, 96)
    masks[..., :64, :] = 0
    hidden = dl.masked(loss, masks)
    assert hidden[:, :, :8].abs().max() == 0
    torch.testing.assert_close(hidden[:, :, 8:], loss[:, :, 8:])


# --- where the picture is -------------------------------------------------------------------


def test_the_mean_over_everywhere_is_the_plain_mean():
    loss = torch.rand(2, 4, 16, 12)
    masks = torch.ones(2, 1, 128, 96)
    torch.testing.assert_close(dl.mean_where(loss, masks), loss.mean(dim=(1, 2, 3)))


def test_the_mean_ignores_what_is_outside():
    loss = torch.rand(2, 4, 16, 12)
    masks = torch.zeros(2, 1, 128, 96)
    masks[0, :, :64, :48] = 1
    masks[1, :, 32:, 24:] = 1
    expected = torch.stack([loss[0, :, :8, :6].mean(), loss[1, :, 4:, 3:].mean()])
    torch.testing.assert_close(dl.mean_where(loss, masks), expected)
    outside = loss.clone()
    outside[0, :, 8:], outside[0, :, :, 6:] = 1e3, 1e3
    assert torch.equal(dl.mean_where(outside, masks)[0], dl.mean_where(loss, masks)[0])


def test_a_small_picture_counts_as_much_as_a_large_one():
    loss = torch.full((2, 4, 16, 12), 0.3)
    masks = torch.ones(2, 1, 128, 96)
    masks[1, :, 8:] = 0
    torch.testing.assert_close(dl.mean_where(loss, masks), torch.tensor([0.3, 0.3]))


def test_a_latent_that_is_half_covered_weighs_half():
    loss = torch.tensor([1.0, 5.0]).view(1, 1, 1, 2)
    masks = torch.ones(1, 1, 8, 16)
    masks[..., 12:] = 0
    torch.testing.assert_close(dl.mean_where(loss, masks), torch.tensor([(1 + 0.5 * 5) / 1.5]))


def test_a_mask_of_zeros_gives_no_loss_and_no_nan():
    loss = torch.rand(2, 4, 16, 12, requires_grad=True)
    masks = torch.ones(2, 1, 16, 12)
    masks[1] = 0
    loss_B = dl.mean_where(loss, masks)
    assert loss_B[1] == 0
    loss_B.sum().backward()
    assert loss.grad.isfinite().all()
    assert loss.grad[1].abs().max() == 0


def loss_of(predictor=predict, case=None, **more):
    latents, _ = latents_and_masks()
    seed_everything()
    return make_loss(case)(predictor, latents, **{"loss_weights_B": torch.ones(2), **more})


@pytest.mark.parametrize(
    "case",
    [{}, {"loss_type": "huber"}, {"min_snr_gamma": 5.0, "v_parameterization": True}],
    ids=str,
)
def test_valid_masks_of_ones_leave_the_loss_unchanged(case):
    plain = loss_of(case=case)
    torch.testing.assert_close(
        loss_of(case=case, valid_masks=torch.ones(2, 1, 128, 96)), plain, rtol=1e-6, atol=0
    )


def test_no_gradient_comes_from_where_no_picture_is():
    offset = torch.zeros(2, 4, 16, 12, requires_grad=True)
    masks = torch.ones(2, 1, 128, 96)
    masks[0, :, 64:] = 0
    loss_of(lambda noisy, steps: predict(noisy, steps) + offset, valid_masks=masks).backward()
    assert offset.grad[0, :, 8:].abs().max() == 0
    assert (offset.grad[0, :, :8] != 0).all()
    assert (offset.grad[1] != 0).all()


def test_valid_masks_count_per_image_before_its_weight():
    masks = torch.ones(2, 1, 128, 96)
    masks[0, :, 16:] = 0
    both = loss_of(valid_masks=masks, loss_weights_B=torch.tensor([1.0, 0.5]))
    first = loss_of(valid_masks=masks, loss_weights_B=torch.tensor([1.0, 0.0]))
    second = loss_of(valid_masks=masks, loss_weights_B=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(both, first + 0.5 * second)
    unmasked = loss_of(loss_weights_B=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(second, unmasked, rtol=1e-6, atol=0)
    assert not torch.isclose(first, loss_of(loss_weights_B=torch.tensor([1.0, 0.0])))


def test_what_a_loss_mask_hides_still_counts_as_picture():
    """As without valid masks: an image of which half is learned has half the loss."""
    loss_masks, valid_masks = torch.ones(2, 1, 128, 96), torch.ones(2, 1, 128, 96)
    loss_masks[:, :, :64] = 0
    valid_masks[..., 48:] = 0
    both = loss_of(loss_masks=loss_masks, valid_masks=valid_masks)
    learned = loss_of(valid_masks=loss_masks * valid_masks)
    torch.testing.assert_close(both, learned / 2)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_weights_and_the_callers_schedule():
    original = noise_scheduler()
    before = original.alphas_cumprod.clone()
    options = LossOptions(zero_terminal_snr=True)
    loss_fn = dl.DiffusionLoss(original, options, prediction_type="v_prediction")
    assert loss_fn.noise_scheduler.alphas_cumprod[-1].abs() < 1e-7
    assert torch.equal(original.alphas_cumprod, before)
    torch.testing.assert_close(loss_fn.snr_T, dl.signal_to_noise(before))


def test_the_loss_of_half_predictions_is_computed_in_fp32():
    latents, _ = latents_and_masks()
    loss = make_loss()(
        lambda noisy_latents, _: noisy_latents.half() * 100, latents, loss_weights_B=torch.ones(2)
    )
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_a_loss_weight_of_zero_removes_an_image_and_its_gradient():
    latents, _ = latents_and_masks()
    scale = torch.ones(2, 1, 1, 1, requires_grad=True)
    torch.manual_seed(0)
    loss = make_loss()(
        lambda noisy_latents, _: scale * noisy_latents,
        latents,
        loss_weights_B=torch.tensor([0.0, 1.0]),
    )
    loss.backward()
    assert scale.grad[0] == 0
    assert scale.grad[1] != 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, "scale_v_pred_loss_like_noise_pred"),
        ({"v_pred_like_loss": 0.1, "v_parameterization": True}, "v_pred_like_loss"),
        ({"loss_type": "huber", "huber_c": 0.0}, "huber_c"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        make_loss(options)


def test_a_huber_scale_that_the_schedule_does_not_read_is_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        make_loss(loss_type="huber", huber_scale=2.0)
    assert "huber_scale has no effect" in caplog.text
