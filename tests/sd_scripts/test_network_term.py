"""Which text encoders of a base model are read, and how: small models of the real classes."""

import argparse
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.networks.network_args import parse_network_args
from mlm_plugin.sd_scripts.architectures import architecture_named
from mlm_plugin.sd_scripts.network_run import NetworkRun
from mlm_plugin.sd_scripts.network_term import Models, create_term, use_models
from mlm_plugin.sd_scripts.term import MLMTerm

DATA = [
    DatasetConfig(
        batch_size=1, resolution=(64, 64), subsets=(SubsetConfig(class_tokens="sks girl"),)
    )
]


class Transformer(nn.Module):
    """The first block of FLUX."""

    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.txt_norm1 = nn.LayerNorm(16, elementwise_affine=False)
        block.txt_attn = nn.Module()
        block.txt_attn.qkv = nn.Linear(16, 48)
        self.txt_in = nn.Linear(16, 16)
        self.double_blocks = nn.ModuleList([block])


def t5(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 1}
    return T5EncoderModel(T5Config(**sizes, **settings)).eval()


def prepared_for_fp8(model, dtype):
    """As by ``prepare_text_encoder_fp8`` of sd-scripts' ``flux_train_network.py``."""

    def forward_of(module):
        def forward(states):
            return module.wo(module.dropout(module.act(module.wi_0(states)) * module.wi_1(states)))

        return forward

    model.to(torch.float8_e4m3fn)
    for module in model.modules():
        if type(module).__name__ in ("T5LayerNorm", "Embedding"):
            module.to(dtype)
        if type(module).__name__ == "T5DenseGatedActDense":
            module.forward = forward_of(module)
    return model


def qwen(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return Qwen3Model(Qwen3Config(vocab_size=512, **sizes, **{**heads, **settings}))


@pytest.fixture
def term(byte_tokenizer, t5_tokenizer, toy_text_encoder):
    """The term of a run, from the options of host and term."""

    def term(arch, text_encoders, host=None, trains_t5=False, **options):
        options = MLMOptions(mlm_prompt_set="person", **options)
        args = argparse.Namespace(
            learning_rate=1e-3, seed=0, clip_skip=None, max_train_steps=3, **(host or {})
        )
        made = create_term(args, options, arch=arch)
        made.setup.num_targets = 8
        made.use_datasets(DATA, ())
        strategy = SimpleNamespace(
            clip_l=toy_text_encoder.tokenizer, t5xxl=t5_tokenizer, tokenizer=byte_tokenizer
        )
        network = SimpleNamespace(
            text_encoder_loras=[1],
            train_t5xxl=trains_t5,
            prepare_optimizer_params_with_multiple_te_lrs=None,
        )
        models = Models(network, text_encoders, strategy, Transformer())
        use_models(
            made,
            args,
            models,
            Accelerator(cpu=True),
            architecture_named(arch),
            network_args=parse_network_args((host or {}).get("network_args", ())),
        )
        return made

    return term


UNET_ONLY = {"network_train_unet_only": True}


@pytest.fixture
def readers(monkeypatch):
    """Kinds of the text encoders that are read."""
    found, original = [], MLMTerm.add_text_encoders

    def add(self, text_encoders, *args, **kwargs):
        found[:] = [type(one).__name__ for one in text_encoders]
        original(self, text_encoders, *args, **kwargs)

    monkeypatch.setattr(MLMTerm, "add_text_encoders", add)
    return found


def test_a_transformer_trained_alone_reads_the_states_of_t5(term, toy_text_encoder, readers):
    model = t5()
    made = term("flux", [toy_text_encoder.model, model], UNET_ONLY)
    assert (made.setup.read_at, made.options.mlm_target) == ("cross_attention", "states")
    assert readers == ["T5Encoder"]
    assert made.setup.encoders[0].targets[0].states_LD is not None
    is_there = weakref.ref(model)
    del model
    gc.collect()
    assert is_there() is None  # the trainer deletes its own to save memory


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_t5_that_is_prepared_for_fp8_is_read_in_the_precision_of_the_run(
    term, toy_text_encoder, precision
):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    kept = []
    for model in (t5(feed_forward_proj="gated-gelu"), t5(feed_forward_proj="gated-gelu")):
        if kept:
            model = prepared_for_fp8(model, dtype)
        host = {**UNET_ONLY, "mixed_precision": precision}
        made = term("flux", [toy_text_encoder.model, model], host)
        kept.append(made.setup.encoders[0].targets[0].states_LD.float())
    assert torch.cosine_similarity(*kept, dim=-1).min() > 0.9


@pytest.mark.parametrize("trains_t5", [False, True])
def test_t5_in_fp8_that_is_not_prepared_yet_is_refused(term, toy_text_encoder, refused, trains_t5):
    model = t5().to(torch.float8_e4m3fn)
    host = {"mixed_precision": "bf16", **({} if trains_t5 else UNET_ONLY)}
    with refused(["T5EncoderModel", "fp8", "cache_text_encoder_outputs", "fp16"]):
        term("flux", [nn.Linear(1, 1), model], host, trains_t5=trains_t5)


def test_chroma_has_t5_alone_whose_states_are_compared(term, readers):
    made = term("flux", [nn.Linear(1, 1), t5()], trains_t5=True)
    assert (made.setup.read_at, made.options.mlm_target) == ("encoder", "states")
    assert readers == ["T5Encoder"]


def test_t5_beside_clip_is_left_out_with_a_word(
    term, toy_text_encoder, toy_contextualizer, caplog, monkeypatch, readers
):
    given = {"mlm_target": "class", "mlm_contextualizer": str(toy_contextualizer)}
    with caplog.at_level(logging.WARNING):
        term("flux", [toy_text_encoder.model, t5()], trains_t5=True, **given)
    assert readers == ["TextEncoder"]
    assert "T5 is trained too" in caplog.text
    term("flux", [toy_text_encoder.model, t5()], trains_t5=True, mlm_target="states")
    assert readers == ["TextEncoder", "T5Encoder"]


@pytest.mark.parametrize(
    ("host", "options", "parts"),
    [
        (UNET_ONLY, {"mlm_target": "class"}, ["mlm_target = class", "take mlm_target = states"]),
        ({**UNET_ONLY, "blocks_to_swap": 4}, {}, ["blocks_to_swap", "mlm_read_at"]),
        (UNET_ONLY, {"mlm_read_at": "encoder"}, ["network_train_unet_only"]),
        ({**UNET_ONLY, "network_args": ["algo=full"]}, {}, ["algo=full", "mlm_read_at = encoder"]),
    ],
)
def test_what_a_transformer_cannot_do_is_refused(
    term, toy_text_encoder, refused, host, options, parts
):
    with refused(parts):
        term("flux", [toy_text_encoder.model, t5()], host, **options)


def test_a_language_model_reads_itself(term):
    made = term("lumina", [qwen()], mlm_target="class")
    assert (made.setup.read_at, made.options.mlm_target) == ("encoder", "class")
    assert made.setup.encoders[0].head is not None
    assert not made.setup.contextualizers


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ({}, {}),
        ({}, {"mlm_read_at": "encoder"}),
        ({"unet_lr": 0.0}, {}),
        ({"network_train_text_encoder_only": True}, {}),
    ],
)
def test_a_language_model_is_trained_while_its_outputs_are_cached(term, host, options):
    made = term("lumina", [qwen()], {"cache_text_encoder_outputs": True, **host}, **options)
    assert made.setup.read_at == "encoder"
    assert [encoder.is_trained for encoder in made.setup.encoders] == [True]


def test_a_language_model_without_its_own_head_is_compared_by_states(term, refused):
    model = qwen(tie_word_embeddings=False)
    assert [encoder.head for encoder in term("lumina", [model]).setup.encoders] == [None]
    with refused(["mlm_target = class", "take mlm_target = states"]):
        term("lumina", [model], mlm_target="class")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"mlm_target": "word"}, ["mlm_target = word", "take mlm_target = states"]),
        (
            {"mlm_target": "class", "mlm_contextualizer": "x.safetensors"},
            ["mlm_contextualizer = 'x.safetensors'"],
        ),
    ],
)
def test_what_a_language_model_cannot_do_is_refused(term, refused, options, parts):
    with refused(parts):
        term("lumina", [qwen()], **options)


@pytest.mark.parametrize(
    ("network_args", "is_wrong"),
    [(None, False), (["algo=locon", "dora_wd=True"], True),
     (["dora_wd=True", "wd_on_output=False"], False)],
)  # fmt: skip
def test_norms_that_a1111_misreads_are_named_here_too(network_args, is_wrong, caplog):
    args = argparse.Namespace(
        learning_rate=1e-3,
        seed=0,
        network_args=network_args,
        mlm_loss_weight=0.1,
        max_train_steps=3,
    )
    assert NetworkRun(args, architecture_named("sd")).term
    assert any("wd_on_output=False" in text for text in caplog.messages) == is_wrong


def test_words_that_are_not_masked_are_told(term, toy_text_encoder, caplog):
    term("flux", [toy_text_encoder.model, t5()], mlm_probability=0.3)
    assert "mlm_probability has no effect with mlm_target = states" in caplog.text
