"""Real scripts of sd-scripts on models with real module names and toy widths. Run by path:

    python shrunken_sd_scripts.py build FOLDER TOKENIZER   models, tokenizers, contextualizers
    python shrunken_sd_scripts.py plain SCRIPT.py [...]    an unchanged script of the checkout
    python shrunken_sd_scripts.py mlm [...]                train_network_mlm.py in the checkout
    python shrunken_sd_scripts.py standalone [...]         train_network_mlm.py without it

The checkout is the one of SD_SCRIPTS_DIR. Its architectures are constants of its modules, which are
made smaller here, in this process; nothing else of it is changed. torchvision, of which two image
transforms are used, need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import runpy
import shutil
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CHECKOUT = Path(os.environ["SD_SCRIPTS_DIR"]).resolve()
WIDTH, WIDTH2 = 32, 64  # of the text encoders
VOCABULARY = 49408
T5 = {"d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
LANGUAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
GEMMA = {**LANGUAGE, "vocab_size": 512, "query_pre_attn_scalar": 16}
LUMINA = {
    "in_channels": 16,
    "dim": 96,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [16, 16, 16],
    "axes_lens": [300, 64, 64],
    "qk_norm": True,
    "cap_feat_dim": WIDTH,
}
WIDTH_T5 = 4096  # SD 3 joins the states of CLIP and T5 at this width, so it stays


def stand_in_for_torchvision() -> None:
    """The few transforms that are used. Call it after importing diffusers."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, value):
            for step in self.steps:
                value = step(value)
            return value

    class ToTensor:
        def __call__(self, array):
            return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255

    class Normalize:
        def __init__(self, mean, std):
            self.mean, self.std = mean[0], std[0]

        def __call__(self, tensor):
            return (tensor - self.mean) / self.std

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("transforms")
    for member in (Compose, ToTensor, Normalize):
        setattr(transforms, member.__name__, member)
    transforms.InterpolationMode = types.SimpleNamespace(NEAREST="nearest")
    transforms.functional = types.SimpleNamespace(
        resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size)
    )
    package.transforms = transforms
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    sys.modules.update({"torchvision": package, "torchvision.transforms": transforms})


def shrink() -> None:
    """Set the constants of the architectures."""
    sys.path.insert(0, str(CHECKOUT))
    from library import model_util, original_unet, sdxl_model_util, sdxl_original_unet

    original_unet.BLOCK_OUT_CHANNELS = (32, 32, 32, 32)
    original_unet.TIMESTEP_INPUT_DIM = 32
    original_unet.TIME_EMBED_DIM = 128
    original_unet.NORM_GROUPS = original_unet.TRANSFORMER_NORM_NUM_GROUPS = 8
    model_util.VAE_PARAMS_CH = 32
    model_util.VAE_PARAMS_CH_MULT = [1, 1, 1, 1]

    sdxl_original_unet.MODEL_CHANNELS = 32
    sdxl_original_unet.TIME_EMBED_DIM = 128
    sdxl_original_unet.ADM_IN_CHANNELS = WIDTH2 + 6 * 256
    full_size = sdxl_original_unet.Transformer2DModel
    sdxl_original_unet.Transformer2DModel = type(
        "Transformer2DModel",
        (full_size,),
        {
            "__init__": lambda self, **settings: full_size.__init__(
                self, **{**settings, "cross_attention_dim": WIDTH + WIDTH2}
            )
        },
    )
    shrink_sd3_and_flux()
    pass_tokenizers_to_sd3_train()
    shrink_anima_and_lumina()
    for module in (model_util, sdxl_model_util):
        module.CLIPTextConfig = shrunken_text_config(module.CLIPTextConfig)


def shrink_sd3_and_flux() -> None:
    """The same for them; the sizes of SD 3's image model are read off its weights."""
    from library import flux_models, flux_utils, sd3_models, sd3_utils

    spec = flux_models.configs["dev"]
    sizes = {"hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12], "vec_in_dim": WIDTH}
    spec.params = replace(spec.params, **sizes)
    spec.ae_params = replace(spec.ae_params, ch=32, ch_mult=[1, 1, 1, 1])
    flux_models.configs["schnell"].ae_params = spec.ae_params  # Lumina's too
    for name in ("VAEEncoder", "VAEDecoder"):
        full_size = getattr(sd3_models, name)
        setattr(sd3_models, name, partial(full_size, ch=32, ch_mult=(1, 1, 1, 1)))
    t5_config = flux_utils.T5Config
    flux_utils.T5Config = lambda **settings: t5_config(**{**settings, **T5})
    sd3_utils.CLIPTextConfig = shrunken_text_config(sd3_utils.CLIPTextConfig)
    flux_utils.CLIPConfig = shrunken_text_config(flux_utils.CLIPConfig)


def pass_tokenizers_to_sd3_train() -> None:
    """``sd3_train.py`` does not pass ``tokenizer_cache_dir`` on, so it would need a download."""
    from library.strategy_sd3 import Sd3TokenizeStrategy

    if "--tokenizer_cache_dir" not in sys.argv:
        return
    folder = sys.argv[sys.argv.index("--tokenizer_cache_dir") + 1]
    init = Sd3TokenizeStrategy.__init__

    def init_with_folder(self, max_length=256, tokenizer_cache_dir=None):
        init(self, max_length, tokenizer_cache_dir or folder)

    Sd3TokenizeStrategy.__init__ = init_with_folder


def shrink_anima_and_lumina() -> None:
    """The same for them. Their language models are built small, with Qwen3's real tokenizer."""
    from library import anima_models, lumina_models, lumina_util, strategy_lumina
    from library import qwen_image_autoencoder_kl as qwen_vae
    from transformers import AutoTokenizer

    narrow(
        anima_models, "Anima", model_channels=64, num_heads=2, num_blocks=2, adaln_lora_dim=8,
        crossattn_emb_channels=WIDTH,
    )  # fmt: skip
    narrow(
        anima_models, "LLMAdapter", source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH,
        num_layers=1, num_heads=2,
    )  # fmt: skip
    narrow(qwen_vae, "AutoencoderKLQwenImage", base_dim=8)

    params = lumina_models.LuminaParams
    params.get_2b_config = classmethod(lambda cls: cls(**LUMINA))
    config = lumina_util.Gemma2Config
    lumina_util.Gemma2Config = lambda **settings: config(**{**settings, **GEMMA})
    strategy_lumina.AutoTokenizer = types.SimpleNamespace(
        from_pretrained=lambda name, cache_dir: AutoTokenizer.from_pretrained(
            Path(cache_dir) / name.replace("/", "_")
        )
    )


def narrow(module, name: str, **sizes) -> None:
    """Replace a class by one that is built with these sizes, whatever is asked for."""
    full_size = getattr(module, name)

    def init(self, *args, **settings):
        full_size.__init__(self, *args, **{**settings, **sizes})

    setattr(module, name, type(name, (full_size,), {"__init__": init}))


def shrunken_text_config(full_size):
    def config(**settings):
        width = WIDTH if settings["hidden_size"] == 768 else WIDTH2
        small = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
        return full_size(**{**settings, **small, "num_attention_heads": 2})

    return config


def build(folder: Path, tokenizer: Path) -> None:
    """Random weights of each architecture, tokenizers and contextualizers."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as DiffusersUNet
    from library import model_util, sdxl_model_util, sdxl_original_unet
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    vae = AutoencoderKL(**model_util.create_vae_diffusers_config())

    def text_config(width: int, layers: int, **settings):
        return CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            projection_dim=width,
            eos_token_id=2,
            **settings,
        )

    unet = DiffusersUNet(
        sample_size=8,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vocabulary = CLIPTokenizer.from_pretrained(tokenizer)
    sd15 = CLIPTextModel(text_config(WIDTH, 12))
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=sd15,
        tokenizer=vocabulary,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd15")

    first = CLIPTextModel(text_config(WIDTH, 12))
    second = CLIPTextModelWithProjection(text_config(WIDTH2, 32, hidden_act="gelu"))
    sdxl_model_util.save_stable_diffusion_checkpoint(
        str(folder / "sdxl.safetensors"),
        first,
        second,
        sdxl_original_unet.SdxlUNet2DConditionModel(),
        0,
        0,
        None,
        vae,
        torch.tensor(4.6),
        None,
        torch.float32,
    )
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        shutil.copytree(tokenizer, folder / "tokenizers" / name)
    build_anima_and_lumina(folder)
    for name, model, arch in (
        ("sd15", sd15, "sd"),
        ("sdxl1", first, "sdxl"),
        ("sdxl2", second, "sdxl"),
        *build_sd3_and_flux(folder, text_config),
    ):
        write_contextualizer(folder / f"{name}.safetensors", model, vocabulary, arch=arch)


def build_sd3_and_flux(folder: Path, text_config):
    """Random weights of both, one file for each part, and T5's tokenizer.

    Returns:
        name, text encoder and architecture of each CLIP encoder.
    """
    from library import flux_models, sd3_models
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    params = sd3_models.SD3Params(
        patch_size=2,
        depth=2,
        num_patches=24 * 24,
        pos_embed_max_size=24,
        adm_in_channels=WIDTH + WIDTH2,
        qk_norm=None,
        x_block_self_attn_layers=[],
        context_embedder_in_features=WIDTH_T5,
        context_embedder_out_features=128,
        model_type="medium",
    )
    mmdit = sd3_models.create_sd3_mmdit(params)
    mmdit.pos_embed.zero_()
    save_part(folder / "parts" / "sd3", mmdit, prefix="model.diffusion_model.")
    save_part(folder / "parts" / "sd3_vae", sd3_models.SDVAE())

    spec = flux_models.configs["dev"]
    flux = flux_models.Flux(replace(spec.params, depth=1, depth_single_blocks=1))
    save_part(folder / "parts" / "flux", flux)
    save_part(folder / "parts" / "flux_ae", flux_models.AutoEncoder(spec.ae_params))

    settings = {"d_model": WIDTH_T5, "feed_forward_proj": "gated-gelu", **T5}
    save_part(folder / "parts" / "t5xxl", T5EncoderModel(T5Config(**settings)))
    save_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")

    clip_l = CLIPTextModelWithProjection(text_config(WIDTH, 12))
    clip_g = CLIPTextModelWithProjection(text_config(WIDTH2, 32, hidden_act="gelu"))
    clip = CLIPTextModel(text_config(WIDTH, 12))
    encoders = (("sd3_l", clip_l, "sd3"), ("sd3_g", clip_g, "sd3"), ("flux_l", clip, "flux"))
    for name, model, _ in encoders:
        save_part(folder / "parts" / name, model)
    return encoders


def build_anima_and_lumina(folder: Path) -> None:
    """Random weights of both; Qwen3 as a folder, with the tokenizer of the checkout."""
    from library import anima_models, lumina_models, lumina_util
    from library import qwen_image_autoencoder_kl as qwen_vae
    from transformers import Gemma2Model, Qwen3Config, Qwen3ForCausalLM

    transformer = anima_models.Anima(
        max_img_h=512, max_img_w=512, max_frames=128, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, pos_emb_cls="rope3d", pos_emb_learnable=True,
        use_adaln_lora=True, use_llm_adapter=True,
        rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "final_layer" in name:  # zero when new: nothing would be trained before it
            torch.nn.init.normal_(parameter, std=0.02)
    save_part(folder / "parts" / "anima", transformer, prefix="net.")
    save_part(folder / "parts" / "qwen_vae", qwen_vae.AutoencoderKLQwenImage())
    qwen = CHECKOUT / "configs" / "qwen3_06b"
    config = Qwen3Config.from_pretrained(qwen)
    for name, value in LANGUAGE.items():
        setattr(config, name, value)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    for path in qwen.iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, folder / "qwen3" / path.name)

    params = lumina_models.LuminaParams.get_2b_config()
    lumina = lumina_models.NextDiT_2B_GQA_patch2_Adaln_Refiner(params)
    torch.nn.init.normal_(lumina.final_layer.linear.weight, std=0.02)
    save_part(folder / "parts" / "lumina", lumina)
    save_part(folder / "parts" / "gemma2", Gemma2Model(lumina_util.Gemma2Config()))
    save_gemma_tokenizer(folder / "tokenizers" / "google_gemma-2-2b")


def save_gemma_tokenizer(folder: Path) -> None:
    """A tokenizer of Gemma's kind that knows some letters: BOS in front, no EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz0123456789,.",
    ]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)


def save_part(path: Path, module: torch.nn.Module, *, prefix: str = "") -> None:
    """The weights of a module in one file."""
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    weights = {
        prefix + name: weight.contiguous().clone()  # T5 holds its table under two names
        for name, weight in module.state_dict().items()
    }
    save_file(weights, path.with_suffix(".safetensors"))


def save_t5_tokenizer(folder: Path) -> None:
    """A tokenizer of T5's kind that knows some letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(folder)


def write_contextualizer(path: Path, model, tokenizer, *, arch: str) -> None:
    """Three steps of pretraining: wiring, not quality."""
    from mlm_plugin.config.pretraining import PretrainOptions
    from mlm_plugin.pretraining.run import pretrain
    from mlm_plugin.sd_scripts.text_encoders import wrap_text_encoder

    options = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)
    text_encoder = wrap_text_encoder(model.eval(), tokenizer, arch=arch, clip_skip=None)
    pretrain(text_encoder, path, options=options, show_progress=False)


def write_weights_of_every_process(folder: Path) -> None:
    """``rank0.pt``, ``rank1.pt``: what each process holds when training ends.

    accelerate 1.6 leaves frozen models alone on several GPUs but not on several CPU processes,
    where the plain trainer ends with an error too: here they are left alone on both.
    """
    from accelerate import Accelerator

    end_training, prepare_model = Accelerator.end_training, Accelerator.prepare_model

    def prepare_frozen(self, model, device_placement=None, evaluation_mode=False):
        is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
        return prepare_model(self, model, device_placement, evaluation_mode or is_frozen)

    def wrapped(self):
        network = self.unwrap_model(self._models[-1])
        torch.save(network.state_dict(), folder / f"rank{self.process_index}.pt")
        end_training(self)

    Accelerator.end_training, Accelerator.prepare_model = wrapped, prepare_frozen


def share_draws() -> None:
    """The n-th noise and the n-th timestep are the same in every program that does this.

    Two trainers draw in different places, so one seed gives them different noise; with this they
    can be compared step by step. Latents are the mean of the VAE's posterior.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    counts = {"noise": 0, "timestep": 0}
    randn_like, randint = torch.randn_like, torch.randint

    def generator(kind: str) -> torch.Generator:
        counts[kind] += 1
        return torch.Generator().manual_seed(1000 * counts[kind] + len(kind))

    def shared_noise(tensor, **_settings):
        if tensor.dim() != 4:
            return randn_like(tensor)
        return torch.randn(tensor.shape, generator=generator("noise")).to(tensor)

    def shared_timesteps(low, high, size, **settings):
        if tuple(size) != (1,):
            return randint(low, high, size, **settings)
        return randint(low, high, size, generator=generator("timestep"))

    torch.randn_like, torch.randint = shared_noise, shared_timesteps
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()


def main() -> None:
    """See the module docstring."""
    mode, *rest = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    if "RANK_WEIGHTS" in os.environ:
        write_weights_of_every_process(Path(os.environ["RANK_WEIGHTS"]))
    if "SHARED_DRAWS" in os.environ:
        share_draws()
    if mode != "standalone":
        stand_in_for_torchvision()
        shrink()
    if mode == "build":
        build(Path(rest[0]), Path(rest[1]))
    elif mode == "plain":
        sys.argv = [str(CHECKOUT / rest[0]), *rest[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:  # mlm, standalone
        sys.argv = [str(ROOT / "train_network_mlm.py"), *rest]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
