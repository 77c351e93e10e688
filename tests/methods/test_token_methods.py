"""What is special about each method that learns token embeddings or weights."""

import logging
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import layer_average
from mlm_plugin.methods import METHODS, Export
from mlm_plugin.methods.custom_diffusion import _rare_words
from mlm_plugin.methods.learned_tokens import embedding_files
from mlm_plugin.mlm.masking import MASK_ID, mask_tokens
from mlm_plugin.models.cross_attention import split_layers
from mlm_plugin.models.text_encoder import TextEncoder

TOKEN_METHODS = [name for name, method in METHODS.items() if method.learns_tokens]


def export(trainer, path, **settings):
    trainer.method.export(Export(path, metadata=lambda kind, file: {"kind": kind}, **settings))
    return trainer.method.files(path)


def embeddings(trainer):
    learned = trainer.method.only_tokens.embeddings
    return {name: tensor.detach().clone() for name, tensor in learned.items()}


def table(trainer):
    return trainer.models.text_encoders[0].token_embedding.weight.detach()


def token_id(trainer, word):
    (found,) = trainer.models.text_encoders[0].tokenizer(word, add_special_tokens=False).input_ids
    return found


# --- where embeddings start ---


def test_embeddings_start_at_the_class_word_or_at_the_word_that_is_given(trainer_of):
    plain = trainer_of("textual_inversion")
    assert torch.equal(embeddings(plain)["sks"][0], table(plain)[[token_id(plain, "dog")]])
    given = trainer_of("textual_inversion", init_word="cat", num_vectors_per_token=3)
    assert torch.equal(embeddings(given)["sks"][0], table(given)[[token_id(given, "cat")] * 3])


def test_a_class_of_two_words_starts_at_its_head(trainer_of):
    trainer = trainer_of("textual_inversion", placeholder_token="sks", class_token="dog house")
    assert torch.equal(embeddings(trainer)["sks"][0], table(trainer)[[token_id(trainer, "house")]])


def test_an_embedding_is_gone_on_with(trainer_of, tmp_path):
    first = trainer_of("textual_inversion", num_vectors_per_token=2)
    first.run()
    (path,) = export(first, tmp_path / "x.safetensors")
    second = trainer_of("textual_inversion", num_vectors_per_token=2, weights=path)
    assert torch.equal(embeddings(second)["sks"], embeddings(first)["sks"])


def test_an_embedding_of_another_kind_of_model_is_refused(trainer_of, tmp_path):
    save_file({"emb_params": torch.ones(1, 7)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="width 7, this text encoder has 32"):
        trainer_of("textual_inversion", weights=tmp_path / "x.safetensors")


def test_a_placeholder_of_more_than_half_a_caption_is_refused(trainer_of):
    with pytest.raises(UserError, match="at most 37"):
        trainer_of("textual_inversion", num_vectors_per_token=38)


TWO = (Concept("sks", "dog"), Concept("zwx", "cat"))


def check(method, *, concepts=TWO[:1], **options):
    METHODS[method].check(TrainConfig().replace(**options), concepts)


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([("dog", "dog")], "'dog' also occurs in 'dog'"),
        ([("sks", "dog"), ("sks dog", "cat")], "'sks' also occurs in 'sks dog cat'"),
        ([("sks dog", "cat"), ("sks", "dog")], "'sks dog' also occurs in 'sks dog'"),
        ([("sks", "dog"), ("zwx", "sks cat")], "'sks' also occurs in 'zwx sks cat'"),
        ([("a", "dog")], "everyday word"),
        ([("The", "dog")], "everyday word"),
    ],
)
def test_a_placeholder_that_other_words_would_be_taken_for_is_refused(method, concepts, message):
    with pytest.raises(UserError, match=message):
        check(method, concepts=[Concept(*pair) for pair in concepts])
    check(method, concepts=TWO)


@pytest.mark.parametrize("option", ["init_word", "weights"])
def test_a_list_must_have_one_entry_per_concept_and_names_their_order(option):
    with pytest.raises(
        UserError, match=f"{option}: 1 given, and the concepts are sks dog, zwx cat"
    ):
        check("textual_inversion", concepts=TWO, **{option: ("dog",)})


def test_a_file_is_read_before_the_model_is(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="is not a file"):
        check("custom_diffusion", weights=(str(path),))
    save_file({"emb_params": torch.ones(2, 32)}, path)
    with pytest.raises(UserError, match="2 vectors, num_vectors_per_token is 1; set it to 2"):
        check("pivotal", weights=(str(path),))
    check("pivotal", weights=(str(path),), num_vectors_per_token=2)


def test_a_damaged_xti_file_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "x.safetensors"
    codes = {code: torch.ones(1, 4) for code in ("IN01", "MID", "OUT02", "OUT03")}
    save_file({**codes, "MID": torch.full((1, 4), torch.inf)}, path)
    with pytest.raises(UserError, match="MID holds NaN or infinity"):
        check("xti", weights=(str(path),))


@pytest.mark.parametrize("names", [("a.b", "a_b"), ("<cat>", "cat"), ("🐶", "🐱"), ("Sks", "sks!")])
def test_no_two_concepts_share_a_file(names):
    files = embedding_files(Path("x.safetensors"), names)
    assert len({file.name.lower() for file in files}) == 2


# --- XTI ---


def test_every_layer_is_conditioned_on_the_embeddings_of_that_layer(trainer_of):
    trainer = trainer_of("xti")
    trainer.run()
    method, (text_encoder,) = trainer.method, trainer.models.text_encoders
    captions = ["a photo of sks dog", "a dog"]
    with torch.no_grad():
        states_KBLD = split_layers(method.encode(captions).states, 16)
        ids_BL = text_encoder.tokenize(captions)[:, 0]
        for k in range(16):
            expected = text_encoder.encode(method.only_tokens.variant(ids_BL, k))
            torch.testing.assert_close(states_KBLD[k], expected)
    assert not torch.equal(states_KBLD[0, 0], states_KBLD[1, 0])
    torch.testing.assert_close(states_KBLD[0, 1], states_KBLD[1, 1])  # it contains no learned token


def test_the_term_reads_each_prompt_with_one_random_layer_or_with_all(trainer_of):
    trainer, prompts = trainer_of("xti"), ["a sks dog at sea", "sks dog"]
    method, (text_encoder,) = trainer.method, trainer.models.text_encoders
    plain_BL = text_encoder.tokenize_trimmed(prompts)
    every = torch.stack([method.only_tokens.variant(plain_BL, k) for k in range(16)])
    rng, seen = random.Random(0), set()
    for _ in range(100):
        ids_BL, layers_B = method.mlm_variants(plain_BL, rng)
        layers = [(every[:, b] == ids_BL[b]).all(dim=-1).nonzero().item() for b in range(2)]
        assert layers_B.tolist() == layers
        seen.add(tuple(layers))
    assert {layer for pair in seen for layer in pair} == set(range(16))
    assert len(seen) > 50, "layers are drawn for each prompt"
    trainer.method.all_layers = True
    ids_BL, layers_B = method.mlm_variants(plain_BL, rng)
    assert torch.equal(ids_BL, every.flatten(0, 1))
    assert layers_B.tolist() == [k for k in range(16) for _ in prompts]


@pytest.mark.parametrize("layers", ["sample", "all"])
@pytest.mark.parametrize("target", ["states", "class"])
def test_the_term_of_an_xti_file_starts_at_zero_in_every_layer(
    trainer_of, tmp_path, target, layers
):
    """Each layer's own embedding is what its distance is measured from."""
    first = trainer_of("xti")
    with torch.no_grad():
        for vectors_KND in first.method.only_tokens.embeddings.values():
            vectors_KND += 0.2 * torch.randn(vectors_KND.shape, generator=torch.manual_seed(0))
    _average, full = export(first, tmp_path / "x.safetensors")
    options = {"mlm_read_at": "both", "mlm_target": target, "xti_mlm_layers": layers}
    trainer = trainer_of("xti", weights=full, mlm_batch_size=8, **options)
    trainer.method.train(False)
    losses = [trainer._term(call).loss.item() for call in range(3)]
    assert losses == pytest.approx([0, 0, 0], abs=2e-5)
    with torch.no_grad():
        for vectors_KND in trainer.method.only_tokens.embeddings.values():
            vectors_KND += 0.2 * torch.randn(vectors_KND.shape, generator=torch.manual_seed(1))
    assert trainer._term(0).loss.item() > 1e-3


def test_xti_continues_with_its_own_files_and_with_those_of_textual_inversion(trainer_of, tmp_path):
    first = trainer_of("xti")
    first.run()
    average, full = export(first, tmp_path / "x.safetensors")
    assert (average.name, full.name) == ("x.safetensors", "x_xti.safetensors")
    assert len(load_file(full)) == 16
    assert torch.equal(load_file(average)["emb_params"], layer_average(embeddings(first)["sks"]))
    assert torch.equal(embeddings(trainer_of("xti", weights=full))["sks"], embeddings(first)["sks"])
    spread = embeddings(trainer_of("xti", weights=average))["sks"]
    assert torch.equal(spread, layer_average(embeddings(first)["sks"]).expand(16, 1, 32))


def test_an_xti_file_under_the_plain_name_of_earlier_versions_is_gone_on_with(trainer_of, tmp_path):
    first = trainer_of("xti")
    first.run()
    old = shutil.copy(export(first, tmp_path / "x.safetensors")[1], tmp_path / "y.safetensors")
    assert torch.equal(embeddings(trainer_of("xti", weights=old))["sks"], embeddings(first)["sks"])


def test_going_on_with_the_average_names_the_file_of_all_layers(trainer_of, tmp_path, caplog):
    average, full = export(trainer_of("xti"), tmp_path / "x.safetensors")

    def said(file):
        caplog.clear()
        check("xti", weights=(str(file),))
        return [text for text in caplog.messages if "average" in text]

    (warning,) = said(average)
    assert str(full) in warning
    assert not said(full)
    average.write_bytes(full.read_bytes())  # a file of an earlier version, beside a new one
    assert not said(average)
    full.unlink()
    assert not said(average)


@pytest.mark.parametrize("placeholders", [("sks",), ("sks", "zwx"), ("<a.b>", "<a-b>", "ab")])
def test_the_plain_names_of_xti_are_those_of_textual_inversion(trainer_of, placeholders):
    method = trainer_of("xti").method
    vectors = dict.fromkeys(placeholders, method.only_tokens.vectors["sks"])
    method.learned_tokens = [SimpleNamespace(placeholders=placeholders, vectors=vectors)]
    plain = embedding_files(Path("x.safetensors"), placeholders)
    full = [file.with_name(f"{file.stem}_xti.safetensors") for file in plain]
    assert method.files(Path("x.safetensors")) == [*plain, *full]
    assert list(method.webui_files(Path("x.safetensors"))) == plain


# --- Custom Diffusion ---


def test_keys_and_values_get_no_gradient_from_the_first_token(trainer_of):
    trainer = trainer_of("custom_diffusion")
    layer = trainer.models.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    states_BLD = torch.randn(2, 5, 32)
    output = layer(states_BLD)
    torch.testing.assert_close(output, states_BLD @ layer.weight.T)
    (gradient,) = torch.autograd.grad(output.sum(), layer.weight)
    (expected,) = torch.autograd.grad((states_BLD[:, 1:] @ layer.weight.T).sum(), layer.weight)
    torch.testing.assert_close(gradient, expected)


def test_only_keys_and_values_are_held_in_fp32(trainer_of):
    trainer = trainer_of("custom_diffusion", mixed_precision="bf16")
    attention = trainer.models.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert attention.to_k.weight.dtype == attention.to_v.weight.dtype == torch.float32
    assert attention.to_q.weight.dtype == torch.bfloat16
    trainer.run()


def test_embeddings_start_at_rare_tokens_of_clips_vocabulary(toy_text_encoder):
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_hidden_layers=1,
    )  # fmt: skip
    real = TextEncoder(toy_text_encoder.tokenizer, CLIPTextModel(config))
    assert _rare_words(real, 2) == ["id:42170", "id:47629"]
    assert _rare_words(real, 4) == ["id:42170", "id:47629", "id:43514"]  # the fourth: its class
    assert _rare_words(toy_text_encoder, 1) == []


def test_the_change_as_a_lora_says_how_much_it_keeps(trainer_of, tmp_path, caplog):
    trainer = trainer_of("custom_diffusion", delta_lora_rank=2)
    trainer.run()
    with caplog.at_level(logging.INFO):
        *_, lora = export(trainer, tmp_path / "x.safetensors")
    (message,) = [m for m in caplog.messages if "of the change" in m]
    with safe_open(lora, framework="pt") as file:
        kept = float(file.metadata()["ss_mlm_energy_kept"])
    assert 0 < kept < 1
    said = float(message.partition("keeps ")[2].partition(" %")[0])
    assert said == pytest.approx(100 * kept, abs=0.06)
    assert {key.split(".")[0][-5:] for key in load_file(lora)} == {"_to_k", "_to_v"}


# --- DreamBooth ---


def test_a_frozen_text_encoder_stays_and_the_term_is_refused_there(trainer_of):
    trainer = trainer_of("dreambooth", no_train_text_encoder=True, mlm_loss_weight=0)
    text_encoder = trainer.models.text_encoders[0].model
    before = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    trainer.run()
    assert all(torch.equal(before[k], v) for k, v in text_encoder.state_dict().items())
    assert not trainer.method.trains_text_side
    with pytest.raises(UserError, match="no_train_text_encoder"):
        trainer_of("dreambooth", no_train_text_encoder=True, mlm_read_at="encoder")


def test_the_term_compares_with_the_table_as_it_was(trainer_of):
    trainer = trainer_of("dreambooth", mlm_loss_weight=1)
    (encoder,) = trainer.regularizer.encoders
    before = encoder.token_table.clone()
    trainer.run()
    assert torch.equal(encoder.token_table, before)
    assert not torch.equal(table(trainer), before)


def test_a_diffusers_folder_is_the_same_model(trainer_of, tmp_path):
    trainer = trainer_of("dreambooth", save_diffusers_folder=True)
    trainer.run()
    path, folder = export(trainer, tmp_path / "x.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for name, tensor in trainer.models.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], tensor)
    assert path.is_file()


# --- pivotal ---


def test_embeddings_lie_beside_the_lora_and_in_it_on_request(trainer_of, tmp_path):
    trainer = trainer_of("pivotal", bundle_embedding=True)
    trainer.run()
    lora, embedding, bundle = export(trainer, tmp_path / "x.safetensors")
    assert bundle.name == "x_bundle.safetensors"
    assert "12 text encoder + 192 U-Net modules" in trainer.method.verify(lora)
    bundled, plain = load_file(bundle), load_file(lora)
    added = bundled.pop("bundle_emb.sks.string_to_param.*")
    assert torch.equal(added, load_file(embedding)["emb_params"])
    assert bundled.keys() == plain.keys()
    assert all(torch.equal(bundled[key], plain[key]) for key in plain)
    assert len(export(trainer_of("pivotal"), tmp_path / "y.safetensors")) == 2


@pytest.mark.parametrize(
    "placeholders", [("sks",), ("s.k", "zwx"), ("<my-dog>", "v1.2.3")], ids=" ".join
)
def test_a_bundle_is_called_by_the_words_that_webuis_are_told(
    placeholders, trainer_of, toy_pictures, tmp_path
):
    (source,) = toy_pictures.iterdir()
    for placeholder in placeholders:
        folder = shutil.copytree(source, tmp_path / "train" / f"2_{placeholder} dog")
        for caption in folder.glob("*.txt"):
            caption.write_text(caption.read_text().replace("sks", placeholder))
    given = {"placeholder_token": list(placeholders), "class_token": ["dog"] * len(placeholders)}
    flags = {"train_data_dir": tmp_path / "train", "mlm_loss_weight": 0, **given}
    trainer = trainer_of("pivotal", bundle_embedding=True, **flags)
    *_, bundle = export(trainer, tmp_path / "x.safetensors")
    words = trainer.method.webui_files(tmp_path / "x.safetensors")[bundle]
    keys = {key for key in load_file(bundle) if key.startswith("bundle_emb")}
    assert list(words) == list(placeholders)
    assert keys == {f"bundle_emb.{word}.string_to_param.*" for word in words.values()}
    assert all(key.count(".") == 3 for key in keys)  # A1111 takes what is between the first two


# --- several concepts ---


@pytest.fixture
def two_concepts(toy_pictures, tmp_path):
    (source,) = toy_pictures.iterdir()
    for name in ("2_sks dog", "2_zwx cat"):
        folder = shutil.copytree(source, tmp_path / "train" / name)
        for caption in folder.glob("*.txt"):
            caption.write_text(caption.read_text().replace("sks dog", name[2:]))
    return tmp_path / "train"


@pytest.mark.parametrize("method", ["textual_inversion", "xti", "custom_diffusion", "pivotal"])
def test_two_concepts_learn_embeddings_of_their_own(trainer_of, two_concepts, tmp_path, method):
    trainer = trainer_of(method, train_data_dir=two_concepts, mlm_loss_weight=1)
    before = embeddings(trainer)
    assert list(before) == ["sks", "zwx"]
    trainer.run()
    after = embeddings(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    names = {path.name for path in export(trainer, tmp_path / "x.safetensors")}
    assert any(name.endswith("_sks.safetensors") for name in names)
    assert any(name.endswith("_zwx.safetensors") for name in names)


def test_prompts_of_the_term_hold_one_or_both_concepts(trainer_of, two_concepts):
    trainer = trainer_of("lora", train_data_dir=two_concepts)
    rng = random.Random(0)
    prompts = [trainer.regularizer.sample_prompt(rng) for _ in range(200)]
    has_dog = [("sks dog" in prompt, "zwx cat" in prompt) for prompt in prompts]
    both = sum(dog and cat for dog, cat in has_dog)
    assert all(dog or cat for dog, cat in has_dog)
    assert 60 < both < 140
    assert (True, False) in has_dog
    assert (False, True) in has_dog


def test_no_concept_word_of_either_is_masked(trainer_of, two_concepts):
    trainer = trainer_of("textual_inversion", train_data_dir=two_concepts, mlm_probability=1)
    (encoder,) = trainer.regularizer.encoders
    ids = encoder.tokenize(["sks dog next to zwx cat on a hill"])
    masked = mask_tokens(ids, encoder.vocabulary, mlm_probability=1.0, rng=random.Random(0))
    kept = ids[masked.input_ids != MASK_ID].tolist()
    tokens = trainer.models.text_encoders[0].tokenizer.convert_ids_to_tokens(kept)
    assert tokens[1:-1] == ["<|row_0_0|>", "dog</w>", "<|row_1_0|>", "cat</w>"]
