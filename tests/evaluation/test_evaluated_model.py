"""A loaded model draws like diffusers, and leaves the base text encoder alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.evaluated_model import LearnedFiles, LoadSettings, load_evaluated_model
from mlm_plugin.export.checkpoint import save_checkpoint
from mlm_plugin.export.custom_diffusion_files import save_delta
from mlm_plugin.export.embedding_files import save_embedding, save_xti
from mlm_plugin.export.xti_pipeline import load_xti
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.cross_attention import layer_codes
from mlm_plugin.networks.create import create_network

PROMPT, NEGATIVE = "a photo of sks dog on the beach", "blurry"


def drawn(pipeline, **prompts):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **prompts,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


def ours(subject):
    states = subject.encode([NEGATIVE, PROMPT]).states
    return drawn(subject.pipeline, prompt_embeds=states[1:], negative_prompt_embeds=states[:1])


def theirs(pipeline, subject, prompt=PROMPT):
    pipeline.scheduler = subject.pipeline.scheduler
    return drawn(pipeline, prompt=prompt, negative_prompt=NEGATIVE)


@pytest.fixture
def files(toy_folder, tmp_path):
    """One file of each kind with random values large enough to see."""
    models = load_stable_diffusion(toy_folder)
    metadata = {"made": "for a test"}
    vectors_ND = torch.randn(2, 32) * 0.1
    save_embedding(
        tmp_path / "embedding.safetensors", {"emb_params": vectors_ND}, metadata=metadata
    )
    codes = layer_codes(models.unet)
    vectors_KND = torch.randn(len(codes), 1, 32) * 0.1
    save_xti(tmp_path / "xti.safetensors", vectors_KND, metadata=metadata, codes=codes)
    weights = {
        name: tensor + torch.randn_like(tensor) * 0.2
        for name, tensor in models.unet.state_dict().items()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    save_delta(tmp_path / "delta.safetensors", weights, unet=models.unet, metadata=metadata)
    network = create_network(models, NetworkOptions(network_dim=2, network_alpha=2.0))
    state = {key: torch.randn_like(value) * 0.3 if "lora_" in key[-16:] else value
             for key, value in network.kohya_state_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "lora.safetensors")
    half = {k: v / 2 if k.endswith("alpha") else v for k, v in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    return {kind: str(tmp_path / f"{kind}.safetensors")
            for kind in ("embedding", "xti", "delta", "lora", "half")}  # fmt: skip


def load(base, **files):
    return load_evaluated_model(str(base), LearnedFiles(**files), placeholder_token="sks")


@pytest.mark.parametrize("kind", ["lora", "embedding", "delta", "xti"])
def test_a_file_draws_what_a_user_of_diffusers_gets(toy_folder, files, kind):
    subject = load(toy_folder, **{kind: files[kind]})
    pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
    plain = theirs(StableDiffusionPipeline.from_pretrained(toy_folder), subject)
    if kind == "lora":
        file = Path(files[kind])
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        expected = theirs(pipeline, subject)
    elif kind == "embedding":
        pipeline.load_textual_inversion(files[kind], token="<learned>")
        expected = theirs(pipeline, subject, PROMPT.replace("sks", "<learned>"))
    elif kind == "delta":
        pipeline.unet.load_attn_procs(files[kind], _pipeline=pipeline)
        expected = theirs(pipeline, subject)
    else:
        xti = load_xti(pipeline, files[kind], placeholder_token="sks")
        pipeline.scheduler = subject.pipeline.scheduler
        expected = drawn(pipeline, prompt_embeds=xti.encode(PROMPT),
                         negative_prompt_embeds=xti.encode(NEGATIVE))  # fmt: skip
    torch.testing.assert_close(ours(subject), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_the_base_text_encoder_is_unchanged(toy_folder, toy_text_encoder, files):
    subject = load(toy_folder, lora=files["lora"])
    (base,) = subject.base_text_encoders
    assert base.fingerprint() == toy_text_encoder.fingerprint()
    with torch.no_grad():
        same = base.encode_captions([PROMPT])
        torch.testing.assert_close(same, toy_text_encoder.encode_captions([PROMPT]))
        assert not torch.allclose(subject.encode([PROMPT]).states, same, atol=1e-3)


def test_a_locon_of_lycoris_default_preset_is_drawn(toy_folder, tmp_path):
    """It has layers beyond those of ``networks.lora``, under the same names of tensors."""
    pytest.importorskip("lycoris")
    models = load_stable_diffusion(toy_folder)
    kind = {"network_module": "lycoris.kohya", "network_args": ("algo=locon",)}
    network = create_network(models, NetworkOptions(network_dim=2, network_alpha=2.0, **kind))
    generator = torch.Generator().manual_seed(0)
    for member in network.parts()["unet"]:
        member.data = 0.2 * torch.randn(member.shape, generator=generator)
    save_file(network.kohya_state_dict(), tmp_path / "x.safetensors")
    assert any("time_embedding" in key for key in network.kohya_state_dict())
    subject = load(toy_folder, lora=str(tmp_path / "x.safetensors"))
    inputs = torch.zeros(1, 4, 8, 8), 7, torch.ones(1, 5, models.unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = models.unet(*inputs).sample
        torch.testing.assert_close(subject.pipeline.unet(*inputs).sample, expected)
        with network.disabled():
            assert not torch.allclose(models.unet(*inputs).sample, expected, atol=1e-3)


@pytest.fixture
def predicts_v(toy_folder, tmp_path):
    """A folder of a model that predicts v and was made for zero terminal SNR."""
    folder = tmp_path / "v"
    shutil.copytree(toy_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    return folder


def test_a_checkpoint_is_drawn_as_what_it_was_trained_from(predicts_v, tmp_path, caplog):
    path = tmp_path / "x.safetensors"
    models = load_stable_diffusion(predicts_v)
    save_checkpoint(path, models.components, family=models.family, metadata={})
    for files in ({}, {"checkpoint": str(path)}):
        scheduler = load(predicts_v, **files).pipeline.scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)
    assert not caplog.messages
    load_evaluated_model(
        str(predicts_v), placeholder_token="sks", settings=LoadSettings(sampler="pndm")
    )
    assert "sampler pndm does not have" in caplog.text


def test_a_lora_of_weight_0_changes_nothing(toy_folder, files):
    off = load(toy_folder, lora=files["lora"], lora_weight=0.0)
    plain = load(toy_folder)
    torch.testing.assert_close(ours(off), ours(plain), atol=1e-5, rtol=1e-5)


def test_half_the_alpha_is_half_the_weight(toy_folder, files):
    half = load(toy_folder, lora=files["half"])
    weak = load(toy_folder, lora=files["lora"], lora_weight=0.5)
    full = load(toy_folder, lora=files["lora"])
    torch.testing.assert_close(ours(half), ours(weak), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours(half), ours(full), atol=1e-2)


def test_a_checkpoint_draws_in_the_base_models_place(toy_folder, tmp_path):
    trained = StableDiffusionPipeline.from_pretrained(toy_folder)
    with torch.no_grad():
        trained.text_encoder.get_input_embeddings().weight.mul_(1.5)
    trained.save_pretrained(tmp_path / "trained")
    subject = load(toy_folder, checkpoint=str(tmp_path / "trained"))
    torch.testing.assert_close(ours(subject), theirs(trained, subject), atol=1e-4, rtol=1e-4)
    base, now = (encoder.token_embedding.weight
                 for (encoder,) in (subject.base_text_encoders, subject.text_encoders))  # fmt: skip
    torch.testing.assert_close(now, base * 1.5)


@pytest.mark.parametrize("kind", ["lora", "embedding", "delta", "xti"])
def test_a_missing_file_is_one_line(toy_folder, kind):
    with pytest.raises(UserError, match=f"--{kind}: there is no file none.safetensors"):
        load(toy_folder, **{kind: "none.safetensors"})


def test_files_of_another_model_are_one_line(toy_folder, tmp_path):
    path = tmp_path / "wide.safetensors"
    save_embedding(path, {"emb_params": torch.randn(1, 768)}, metadata={"a": "b"})
    with pytest.raises(UserError, match="width 768"):
        load(toy_folder, embedding=str(path))
    save_file({"x.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "no_lora.safetensors")
    with pytest.raises(UserError, match="^/.*no_lora.safetensors: holds no LoRA"):
        load(toy_folder, lora=str(tmp_path / "no_lora.safetensors"))


@pytest.mark.parametrize(
    "args", [(), ("algo=loha",), ("algo=lokr", "factor=2"), ("algo=lora", "dora_wd=True")]
)
def test_everything_that_draws_moves_together(toy_folder, tmp_path, args):
    """LyCORIS keeps its modules in a network of its own, outside of the models."""
    if args:
        pytest.importorskip("lycoris")
    kind = {"network_module": "lycoris.kohya", "network_args": args} if args else {}
    options = NetworkOptions(network_dim=2, network_alpha=2.0, **kind)
    network = create_network(load_stable_diffusion(toy_folder), options)
    save_file(network.kohya_state_dict(), tmp_path / "network.safetensors")
    subject = load(toy_folder, lora=str(tmp_path / "network.safetensors"))
    subject.to(torch.device("meta"))
    drawing = (subject.pipeline.unet, subject.pipeline.vae, subject.pipeline.text_encoder)
    weights = [weight for model in drawing for weight in model.parameters()]
    weights += [weight for members in subject.network.parts().values() for weight in members]
    assert {weight.device.type for weight in weights} == {"meta"}
