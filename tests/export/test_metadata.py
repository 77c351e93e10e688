"""Metadata: kohya's keys and strings, ModelSpec, and ours."""

import base64
import dataclasses
import json
from datetime import datetime
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mlm_plugin import __version__
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.export.metadata import file_metadata
from mlm_plugin.export.run_facts import FileIdentity, RunFacts, dataset_facts, file_identity

# Every key that train_network.py writes for SD (kohya.md 5.2), with a run that saved a file.
KOHYA_KEYS = set(
    """
    ss_session_id ss_training_started_at ss_training_finished_at ss_output_name ss_learning_rate
    ss_text_encoder_lr ss_unet_lr ss_num_train_images ss_num_validation_images ss_num_reg_images
    ss_num_batches_per_epoch ss_num_epochs ss_gradient_checkpointing
    ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler
    ss_network_module ss_network_dim ss_network_alpha ss_network_dropout ss_mixed_precision
    ss_full_fp16 ss_v2 ss_base_model_version ss_clip_skip ss_max_token_length ss_cache_latents
    ss_seed ss_lowram ss_noise_offset ss_noise_offset_random_strength
    ss_multires_noise_iterations ss_multires_noise_discount ss_adaptive_noise_scale
    ss_zero_terminal_snr ss_training_comment ss_sd_scripts_commit_hash ss_optimizer
    ss_max_grad_norm ss_caption_dropout_rate ss_caption_dropout_every_n_epochs
    ss_caption_tag_dropout_rate ss_face_crop_aug_range ss_prior_loss_weight ss_min_snr_gamma
    ss_scale_weight_norms ss_ip_noise_gamma ss_ip_noise_gamma_random_strength
    ss_debiased_estimation ss_loss_type ss_huber_schedule ss_huber_scale ss_huber_c ss_fp8_base
    ss_fp8_base_unet ss_validation_seed ss_validation_split ss_max_validation_steps
    ss_validate_every_n_epochs ss_validate_every_n_steps ss_resize_interpolation ss_steps ss_epoch
    ss_tag_frequency ss_dataset_dirs ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash
    """.split()
)
FOLDER_KEYS = set(
    """
    ss_batch_size_per_device ss_total_batch_size ss_resolution ss_color_aug ss_flip_aug
    ss_random_crop ss_shuffle_caption ss_enable_bucket ss_bucket_no_upscale ss_min_bucket_reso
    ss_max_bucket_reso ss_keep_tokens ss_reg_dataset_dirs ss_bucket_info
    """.split()
)
MODELSPEC_KEYS = {
    f"modelspec.{name}"
    for name in (
        "sai_model_spec", "architecture", "implementation", "title", "resolution", "date",
        "prediction_type", "implementation_version", "trigger_phrase", "usage_hint",
    )
}  # fmt: skip

SUBSET = SubsetConfig(image_dir=Path("data/10_sks dog"), class_tokens="sks dog", num_repeats=10)
REG = SubsetConfig(image_dir=Path("reg/1_dog"), class_tokens="dog", is_reg=True)


def image(caption, *, subset=SUBSET, index=0, size=(512, 512), bucket=(512, 512), repeats=None):
    return SimpleNamespace(
        caption=caption,
        subset=subset,
        dataset_index=index,
        repeats=subset.num_repeats if repeats is None else repeats,
        is_reg=subset.is_reg,
        size=size,
        bucket=bucket,
    )


def facts(*, enable_bucket=True, num_datasets=1, **changes):
    datasets = [
        DatasetConfig(
            batch_size=2, resolution=(512, 512), enable_bucket=enable_bucket, subsets=(SUBSET, REG)
        )
    ] * num_datasets
    images = [
        picture
        for index in range(num_datasets)
        for picture in (
            image("a photo of sks dog, Lawn", index=index),
            image("sks dog, lawn", index=index, size=(600, 400), bucket=(640, 448)),
            image("dog", subset=REG, index=index, repeats=2),
        )
    ]
    run = RunFacts(
        session_id=7,
        started_at=1000.5,
        finished_at=2000.75,
        datasets=dataset_facts(datasets, images, triggers=["sks dog"]),
        num_batches_per_epoch=10,
        num_epochs=3,
        max_train_steps=30,
        base_model_version="sd_v1",
        prediction_type="epsilon",
        optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
        model=FileIdentity("sd15.safetensors", "cc6cb27103", "abc"),
        steps=20,
        epoch=2,
        concepts=(Concept("sks", "dog"),),
        mlm_read_at="encoder",
        mlm_target="class",
        mlm_prompt_set="living",
        mlm_contextualizer="0123",
        mlm_seed=5,
    )
    return dataclasses.replace(run, **changes)


def config(**values):
    return TrainConfig.from_flat({"output_name": "dog", "resolution": "512,512", **values})


def metadata(*, run=None, kind="lora", **values):
    return file_metadata(config(**values), run or facts(), kind=kind)


def test_a_folder_run_has_exactly_kohyas_keys_and_ours():
    keys = set(metadata())
    ours = {key for key in keys if key.startswith("ss_mlm_")}
    assert keys - ours == KOHYA_KEYS | FOLDER_KEYS | MODELSPEC_KEYS
    assert ours


def test_a_dataset_config_run_has_the_data_sets_instead_of_folder_keys():
    keys = {k for k in metadata(dataset_config="d.toml") if not k.startswith("ss_mlm_")}
    assert keys == KOHYA_KEYS | {"ss_datasets"} | MODELSPEC_KEYS


def test_everything_is_a_string_and_none_is_spelled_out():
    written = metadata(network_dim=8, learning_rate=1e-4, text_encoder_lr=(5e-5,))
    assert all(isinstance(value, str) for value in written.values())
    expected = {
        "ss_unet_lr": "None",
        "ss_text_encoder_lr": "5e-05",
        "ss_learning_rate": "0.0001",
        "ss_network_dim": "8",
        "ss_network_module": "networks.lora",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_resolution": "(512, 512)",
        "ss_session_id": "7",
        "ss_training_started_at": "1000.5",
        "ss_training_finished_at": "2000.75",
        "ss_steps": "20",
        "ss_epoch": "2",
        "ss_num_train_images": "20",
        "ss_num_reg_images": "1",
        "ss_lowram": "False",
        "ss_debiased_estimation": "False",
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_sd_model_name": "sd15.safetensors",
    }
    assert {key: written[key] for key in expected} == expected


def test_total_batch_size_counts_processes_and_accumulation():
    written = metadata(
        run=facts(num_processes=2), train_batch_size=3, gradient_accumulation_steps=4
    )
    assert written["ss_batch_size_per_device"] == "3"
    assert written["ss_total_batch_size"] == "24"


def test_network_args_are_stored_as_kohya_passes_them():
    stored = metadata(network_args=("conv_dim=4", "conv_alpha=1"), network_dropout=0.1)
    assert json.loads(stored["ss_network_args"]) == {
        "conv_dim": "4",
        "conv_alpha": "1",
        "dropout": 0.1,
    }
    assert "ss_network_args" not in metadata()


# --- data -----------------------------------------------------------------------------------


def test_tags_are_counted_truly_and_the_trigger_is_one_of_them():
    counts = json.loads(metadata()["ss_tag_frequency"])
    assert counts == {
        "10_sks dog": {"a photo of sks dog": 1, "lawn": 2, "sks dog": 1},
        "1_dog": {"dog": 1},
    }
    subset = dataclasses.replace(SUBSET, image_dir=Path("x"))
    dataset = DatasetConfig(batch_size=1, resolution=(512, 512), subsets=(subset,))
    captions = ("A photo of SKS dog on a lawn", "my sks dog", "sks dogs", "none")
    images = [image(caption, subset=subset) for caption in captions]
    (found,) = dataset_facts([dataset], images, triggers=["sks dog"])
    assert found.tag_frequency["x"]["sks dog"] == 2
    (plain,) = dataset_facts([dataset], images)
    assert "sks dog" not in plain.tag_frequency["x"]


def test_buckets_count_repeats_and_average_the_change_of_shape():
    info = json.loads(metadata()["ss_bucket_info"])
    assert info["buckets"] == {
        "0": {"resolution": [512, 512], "count": 12},
        "1": {"resolution": [640, 448], "count": 10},
    }
    assert info["mean_img_ar_error"] == pytest.approx(abs(640 / 448 - 1.5) / 3)
    assert metadata(run=facts(enable_bucket=False))["ss_bucket_info"] == "null"


def test_folders_are_split_into_training_and_regularisation():
    written = metadata()
    assert json.loads(written["ss_dataset_dirs"]) == {
        "10_sks dog": {"n_repeats": 10, "img_count": 2}
    }
    assert json.loads(written["ss_reg_dataset_dirs"]) == {"1_dog": {"n_repeats": 1, "img_count": 1}}


def test_a_folder_in_two_data_sets_gets_a_number():
    written = metadata(run=facts(num_datasets=2), dataset_config="d.toml")
    assert set(json.loads(written["ss_dataset_dirs"])) == {"10_sks dog", "10_sks dog (2)"}
    assert json.loads(written["ss_tag_frequency"])["10_sks dog"]["lawn"] == 2


def test_data_sets_are_described_with_kohyas_fields():
    (entry,) = json.loads(metadata(dataset_config="d.toml")["ss_datasets"])
    assert set(entry) == {
        "is_dreambooth", "batch_size_per_device", "num_train_images", "num_reg_images",
        "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "tag_frequency",
        "bucket_info", "resize_interpolation", "subsets",
    }  # fmt: skip
    assert entry["num_train_images"] == 20
    assert entry["is_dreambooth"] is True
    assert set(entry["subsets"][0]) == {
        "img_count", "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption",
        "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard",
        "caption_prefix", "caption_suffix", "resize_interpolation", "image_dir", "class_tokens",
        "is_reg",
    }  # fmt: skip
    assert entry["subsets"][1]["is_reg"] is True


# --- less and more --------------------------------------------------------------------------


def test_no_metadata_leaves_what_webuis_need_to_place_the_file():
    written = metadata(no_metadata=True, network_args=("conv_dim=4",))
    training = {key for key in written if key.startswith("ss_")}
    assert training == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim",
        "ss_network_alpha", "ss_network_args",
    }  # fmt: skip
    assert {key for key in written if key not in training} == MODELSPEC_KEYS - {
        "modelspec.trigger_phrase", "modelspec.usage_hint"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "prediction", "architecture", "is_v2", "resolution"),
    [
        ("sd_v1", "epsilon", "stable-diffusion-v1/lora", "False", "512x512"),
        ("sd_v2", "epsilon", "stable-diffusion-v2-512/lora", "True", "512x512"),
        ("sd_v2_v", "v_prediction", "stable-diffusion-v2-768-v/lora", "True", "768x768"),
        ("sdxl_base_v1-0", "epsilon", "stable-diffusion-xl-v1-base/lora", "False", "1024x1024"),
        (
            "sdxl_base_v1-0",
            "v_prediction",
            "stable-diffusion-xl-v1-base/lora",
            "False",
            "1024x1024",
        ),
    ],
)
def test_the_base_model_is_named_for_every_webui(
    version, prediction, architecture, is_v2, resolution
):
    run = facts(base_model_version=version, prediction_type=prediction)
    written = metadata(run=run, resolution=None, dataset_config="d.toml")
    assert written["ss_base_model_version"] == version
    assert written["ss_v2"] == is_v2
    assert written["modelspec.architecture"] == architecture
    assert written["modelspec.prediction_type"] == prediction.removesuffix("_prediction")
    assert written["modelspec.resolution"] == resolution


def test_the_code_whose_names_a_file_has_is_named():
    sdxl = facts(base_model_version="sdxl_base_v1-0")
    for kind in ("lora", "textual-inversion", "checkpoint"):
        implementation = metadata(run=sdxl, kind=kind)["modelspec.implementation"]
        assert implementation == "https://github.com/Stability-AI/generative-models"
    assert metadata()["modelspec.implementation"] == "diffusers"


def test_rates_of_two_text_encoders_are_a_list():
    written = metadata(text_encoder_lr=(5e-5, 1e-5))
    assert written["ss_text_encoder_lr"] == "[5e-05, 1e-05]"


def test_modelspec_fields_come_from_options_and_defaults():
    written = metadata(
        clip_skip=2,
        min_timestep=100,
        metadata_author="me",
        metadata_usage_hint="softly",
        metadata_trigger_phrase="call me",
        resolution="512,768",
    )
    assert written["modelspec.title"] == "dog"
    assert written["modelspec.author"] == "me"
    assert written["modelspec.usage_hint"] == "softly"
    assert written["modelspec.trigger_phrase"] == "call me"
    assert written["modelspec.encoder_layer"] == "2"
    assert written["modelspec.timestep_range"] == "100,1000"
    assert written["modelspec.resolution"] == "512x768"
    assert written["modelspec.implementation_version"] == f"mlm-plugin/{__version__}"
    assert written["modelspec.date"] == datetime.fromtimestamp(2000).isoformat()
    assert metadata()["modelspec.trigger_phrase"] == "sks dog"


def decoded(data_url):
    """The picture in a data URL of a JPEG."""
    kind, _, content = data_url.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(content, validate=True)))


@pytest.mark.parametrize("size", [(2000, 1000), (64, 96), (256, 256)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_a_thumbnail_file_is_embedded_small(size, mode, tmp_path):
    path = tmp_path / "a.tif"
    noise = Image.effect_noise(size, 100).convert("RGB")
    noise.convert(mode).save(path)
    thumbnail = metadata(metadata_thumbnail=str(path))["modelspec.thumbnail"]
    assert len(thumbnail) < 60_000
    shrunk = max(1, max(size) / 256)
    assert decoded(thumbnail).size == (size[0] / shrunk, size[1] / shrunk)


def test_a_thumbnail_that_is_gone_is_left_out_and_a_data_url_stays(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    for name in ("a.png", "b.png"):
        assert "modelspec.thumbnail" not in metadata(metadata_thumbnail=str(tmp_path / name))
    assert metadata(metadata_thumbnail="data:x")["modelspec.thumbnail"] == "data:x"


def test_a_sample_is_the_thumbnail_unless_the_user_gives_one():
    run = facts(thumbnail="data:sample")
    assert metadata(run=run)["modelspec.thumbnail"] == "data:sample"
    assert metadata(run=run, metadata_thumbnail="data:x")["modelspec.thumbnail"] == "data:x"


CONCEPTS = (Concept("sks", "dog"), Concept("zwx", "duck toy"))


@pytest.mark.parametrize(
    ("kind", "words", "needs", "trigger", "hint"),
    [
        ("lora", {}, (), "sks dog, zwx duck toy",
         "Trigger: sks dog, zwx duck toy. Strength: 1, as trained."),
        ("lora", {"sks": "x_embedding_sks", "zwx": "x_embedding_zwx"},
         ("x_embedding_sks", "x_embedding_zwx"), "x_embedding_sks dog, x_embedding_zwx duck toy",
         "Trigger: x_embedding_sks dog, x_embedding_zwx duck toy. Strength: 1, as trained. "
         "Needs the embedding x_embedding_sks, x_embedding_zwx."),
        ("textual-inversion", {"zwx": "x_zwx"}, (), "x_zwx duck toy", "Trigger: x_zwx duck toy."),
        ("textual-inversion", {}, (), "sks dog, zwx duck toy",
         "Trigger: sks dog, zwx duck toy. "
         "Holds an embedding for each cross-attention layer: not for WebUIs."),
        ("checkpoint", {}, (), "sks dog, zwx duck toy", "Trigger: sks dog, zwx duck toy."),
    ],
)  # fmt: skip
def test_trigger_and_hint_are_what_one_types_for_the_file(kind, words, needs, trigger, hint):
    run = facts(concepts=CONCEPTS, words=words, needs=needs)
    written = metadata(run=run, kind=kind)
    assert written["modelspec.trigger_phrase"] == trigger
    assert written["modelspec.usage_hint"] == hint
    assert written["ss_mlm_placeholder_token"] == "sks, zwx"


def test_a_hint_without_a_known_concept_says_the_strength_alone():
    run = facts(concepts=())
    assert metadata(run=run)["modelspec.usage_hint"] == "Strength: 1, as trained."
    assert "modelspec.usage_hint" not in metadata(run=run, kind="checkpoint")


def test_the_mlm_term_is_on_record():
    written = metadata(mlm_loss_weight=0.01, mlm_end_step=100)
    assert {key: value for key, value in written.items() if key.startswith("ss_mlm_")} == {
        "ss_mlm_loss_weight": "0.01",
        "ss_mlm_batch_size": "8",
        "ss_mlm_probability": "0.5",
        "ss_mlm_replace": "mask",
        "ss_mlm_every_n_steps": "1",
        "ss_mlm_start_step": "0",
        "ss_mlm_end_step": "100",
        "ss_mlm_prompt_syntax": "natural",
        "ss_mlm_joint_share": "0.5",
        "ss_mlm_read_at": "encoder",
        "ss_mlm_target": "class",
        "ss_mlm_prompt_set": "living",
        "ss_mlm_contextualizer": "0123",
        "ss_mlm_seed": "5",
        "ss_mlm_version": __version__,
        "ss_mlm_method": "lora",
        "ss_mlm_placeholder_token": "sks",
        "ss_mlm_class_token": "dog",
    }
    assert "ss_mlm_probability" not in metadata(mlm_loss_weight=0.0)


# --- kinds of files and concepts ------------------------------------------------------------

KINDS = ("textual-inversion", "custom-diffusion", "checkpoint")
METHODS = {
    "lora": "pivotal",
    "textual-inversion": "textual_inversion",
    "custom-diffusion": "custom_diffusion",
    "checkpoint": "dreambooth",
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_lora_says_what_network_it_is(kind):
    options = {"network_args": ("conv_dim=4",), "network_dim": 8}
    lora, other = metadata(**options), metadata(kind=kind, **options)
    network = {key for key in lora if key.startswith("ss_network_")}
    assert {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"} <= network
    assert other.keys() == lora.keys() - network
    differing = {key for key in other if other[key] != lora[key]}
    assert differing == {"modelspec.architecture", "modelspec.usage_hint"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_metadata_a_file_still_says_its_base_model_and_kind(kind):
    written = metadata(kind=kind, no_metadata=True, network_args=("conv_dim=4",))
    assert {key for key in written if key.startswith("ss_")} == {"ss_v2", "ss_base_model_version"}
    assert "modelspec.architecture" in written
    assert "modelspec.trigger_phrase" not in written


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lora", "stable-diffusion-v1/lora"),
        ("textual-inversion", "stable-diffusion-v1/textual-inversion"),
        ("custom-diffusion", "stable-diffusion-v1/custom-diffusion"),
        ("checkpoint", "stable-diffusion-v1"),
    ],
)
def test_modelspec_names_the_kind_of_file(kind, expected):
    assert metadata(kind=kind)["modelspec.architecture"] == expected
    v2 = facts(base_model_version="sd_v2_v", prediction_type="v_prediction")
    found = metadata(kind=kind, run=v2)["modelspec.architecture"]
    assert found == expected.replace("-v1", "-v2-768-v")


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("lora", "LoRA@2000.75"),
        ("textual-inversion", "TextualInversion@2000.75"),
        ("custom-diffusion", "CustomDiffusion@2000.75"),
        ("checkpoint", "Checkpoint@2000.75"),
    ],
)
def test_a_file_without_a_name_is_titled_by_its_kind(kind, title):
    assert metadata(kind=kind, output_name=None)["modelspec.title"] == title
    assert metadata(kind=kind)["modelspec.title"] == "dog"
    assert metadata(kind=kind, metadata_title="Mine")["modelspec.title"] == "Mine"


@pytest.mark.parametrize(("kind", "method"), METHODS.items())
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_method_is_on_record_with_the_mlm_term_and_without(kind, method, weight):
    written = metadata(kind=kind, method=method, mlm_loss_weight=weight)
    assert written["ss_mlm_method"] == method


def test_what_a_method_was_given_is_on_record_and_defaults_are_not():
    given = {
        "embedding_lr": 5e-3,
        "num_vectors_per_token": 4,
        "directional_embedding": True,
        "directional_kappa": 1e-3,
        "stop_embedding_training": 0.6,
    }
    plain, written = metadata(method="pivotal"), metadata(method="pivotal", **given)
    added = {key: written[key] for key in written.keys() - plain.keys()}
    assert added == {
        "ss_mlm_embedding_lr": "0.005",
        "ss_mlm_num_vectors_per_token": "4",
        "ss_mlm_directional_embedding": "True",
        "ss_mlm_directional_kappa": "0.001",
        "ss_mlm_stop_embedding_training": "0.6",
    }


def test_what_each_of_two_text_encoders_was_given_is_on_record():
    given = {
        "learning_rate_te1": 1e-6,
        "learning_rate_te2": 0.0,
        "stop_text_encoder1_training": 0.5,
        "stop_text_encoder2_training": 40,
    }
    written = metadata(kind="checkpoint", method="dreambooth", **given)
    assert {name: written[f"ss_mlm_{name}"] for name in given} == {
        "learning_rate_te1": "1e-06",
        "learning_rate_te2": "0.0",
        "stop_text_encoder1_training": "0.5",
        "stop_text_encoder2_training": "40",
    }


def test_the_share_of_prompts_with_two_concepts_is_on_record():
    written = metadata(mlm_loss_weight=0.01, mlm_joint_share=0.25)
    assert written["ss_mlm_joint_share"] == "0.25"


def test_the_layers_of_the_term_in_xti_are_on_record():
    written = metadata(kind="textual-inversion", method="xti", xti_mlm_layers="all")
    assert written["ss_mlm_xti_mlm_layers"] == "all"


def test_two_concepts_are_both_on_record():
    run = facts(concepts=(Concept("sks", "dog"), Concept("zwx", "duck toy")))
    written = metadata(run=run)
    assert written["ss_mlm_placeholder_token"] == "sks, zwx"
    assert written["ss_mlm_class_token"] == "dog, duck toy"
    assert written["modelspec.trigger_phrase"] == "sks dog, zwx duck toy"


def test_a_run_without_a_known_concept_has_no_trigger():
    written = metadata(run=facts(concepts=()), mlm_loss_weight=0.0)
    assert "modelspec.trigger_phrase" not in written
    assert written["ss_mlm_placeholder_token"] == written["ss_mlm_class_token"] == "None"


def test_models_are_identified_by_name_and_hashes(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"abc")
    identity = file_identity(tmp_path / "m.safetensors")
    assert identity == FileIdentity(
        "m.safetensors",
        "e3b0c442",  # SHA-256 of nothing: the file ends before 1 MiB
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    )
    assert file_identity(tmp_path).hash == "IsADirectory"
    assert file_identity("org/model") == FileIdentity("org/model")
    written = metadata(run=facts(model=FileIdentity("org/model"), vae=identity))
    assert "ss_sd_model_hash" not in written
    assert written["ss_new_vae_hash"] == identity.new_hash
