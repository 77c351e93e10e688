"""Files of learned embeddings: keys, shapes, other software, and reading."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import (
    EMBEDDING_KEY,
    SD_LAYER_CODES,
    layer_average,
    read_embedding,
    read_xti,
    save_embedding,
    save_xti,
    verify_embedding,
)

K, N, D = 16, 3, 32
SUFFIXES = (".safetensors", ".pt", ".bin")

CHECKOUT = os.environ.get("SD_SCRIPTS_DIR")  # read here: tests run without it


def vectors_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def load(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def function_of_sd_scripts(script, name):
    """One function or method of sd-scripts, taken out of its file without importing it."""
    if CHECKOUT is None:
        pytest.skip("no sd-scripts checkout (SD_SCRIPTS_DIR) here")
    source = (Path(CHECKOUT) / script).read_text("utf-8")
    (found,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    scope = {"torch": torch, "os": os}
    exec(compile(ast.Module([found], type_ignores=[]), script, "exec"), scope)
    return scope[name]


# --- one embedding for all layers -----------------------------------------------------------


@pytest.mark.parametrize("num_vectors", [1, N])
def test_an_embedding_comes_back_from_its_file(tmp_path, num_vectors):
    path, vectors_ND = tmp_path / "my-dog.safetensors", vectors_of(num_vectors, D)
    save_embedding(path, {EMBEDDING_KEY: nn.Parameter(vectors_ND)}, metadata={"ss_steps": "3"})
    assert load(path).keys() == {"emb_params"}
    assert torch.equal(load(path)["emb_params"], vectors_ND)
    assert torch.equal(read_embedding(path), vectors_ND)
    assert verify_embedding(path) == num_vectors
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"ss_steps": "3"}


def test_precision_is_that_of_the_file_and_reading_gives_float32(tmp_path):
    path, vectors_ND = tmp_path / "x.safetensors", vectors_of(N, D)
    save_embedding(path, {EMBEDDING_KEY: vectors_ND}, metadata={}, dtype=torch.float16)
    assert load(path)["emb_params"].dtype == torch.float16
    assert torch.equal(read_embedding(path), vectors_ND.half().float())


def test_two_text_encoders_have_a_key_each(tmp_path):
    path = tmp_path / "x.safetensors"
    vectors = {"clip_l": vectors_of(N, D), "clip_g": vectors_of(N, 2 * D)}
    save_embedding(path, vectors, metadata={})
    assert {key: value.shape for key, value in load(path).items()} == {
        "clip_l": (N, D),
        "clip_g": (N, 2 * D),
    }
    assert verify_embedding(path) == N
    with pytest.raises(UserError, match="SDXL"):
        read_embedding(path)


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "x.safetensors"
    save_embedding(path, {EMBEDDING_KEY: vectors_of(N, D)}, metadata={})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_embedding(path, {EMBEDDING_KEY: vectors_of(N, D)}, metadata={"ss_steps": 3})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def states_of(pipeline, prompt):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("num_vectors", [1, N])
def test_diffusers_loads_the_file_and_encodes_what_vectors_placed_by_hand_encode(
    toy_folder, tmp_path, num_vectors
):
    vectors_ND = vectors_of(num_vectors, D)
    path = tmp_path / "my-dog.safetensors"
    save_embedding(path, {EMBEDDING_KEY: vectors_ND}, metadata={"ss_steps": "3"})
    pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name, token="<v>")
    loaded = states_of(pipeline, "a photo of <v> on the lawn")

    plain = StableDiffusionPipeline.from_pretrained(toy_folder)
    words = " ".join(["dog"] * num_vectors)  # as many tokens as the embedding has vectors
    ids = plain.tokenizer(
        f"a photo of {words} on the lawn", padding="max_length", return_tensors="pt"
    ).input_ids
    (dog,) = plain.tokenizer("dog", add_special_tokens=False).input_ids
    assert (ids == dog).sum() == num_vectors
    handle = plain.text_encoder.get_input_embeddings().register_forward_hook(
        lambda _module, args, output: output.index_put(((args[0] == dog),), vectors_ND)
    )
    with torch.no_grad():
        expected = plain.text_encoder(ids).last_hidden_state
    handle.remove()
    torch.testing.assert_close(loaded, expected)
    assert not torch.allclose(loaded, plain.text_encoder(ids).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sd_scripts_reads_the_file_and_we_read_its_file(tmp_path, suffix):
    script, vectors_ND = "train_textual_inversion.py", vectors_of(N, D)
    save_embedding(tmp_path / "x.safetensors", {EMBEDDING_KEY: vectors_ND}, metadata={})
    read = function_of_sd_scripts(script, "load_weights")
    assert torch.equal(read(None, tmp_path / "x.safetensors")[0], vectors_ND)
    write = function_of_sd_scripts(script, "save_weights")
    write(None, tmp_path / f"y{suffix}", [vectors_ND], torch.float32, {})
    assert torch.equal(read_embedding(tmp_path / f"y{suffix}"), vectors_ND)


def test_vectors_of_a_larger_table_and_vectors_that_share_memory_are_saved_as_such(tmp_path):
    path, table_VD = tmp_path / "x.safetensors", vectors_of(10_000, D)
    save_embedding(path, {EMBEDDING_KEY: table_VD[-N:]}, metadata={})
    assert torch.equal(read_embedding(path), table_VD[-N:])
    assert path.stat().st_size < 10_000
    shared_KND = table_VD[:N].expand(K, N, D)
    save_xti(path, shared_KND, metadata={})
    assert torch.equal(read_xti(path), shared_KND)


# --- files of other software ----------------------------------------------------------------


@pytest.mark.parametrize("token", ["<cat-toy>", "emb_params", "*"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(D,), (1, D), (N, D)])
def test_files_of_one_tensor_are_read_whatever_its_key_and_shape(tmp_path, token, suffix, shape):
    path, vectors = tmp_path / f"x{suffix}", vectors_of(*shape)
    save_file({token: vectors}, path) if suffix == ".safetensors" else torch.save(
        {token: vectors}, path
    )
    assert torch.equal(read_embedding(path), vectors.reshape(-1, D))


def old_parameter_dict(vectors_ND):
    """A ``ParameterDict`` as in PyTorch before 1.12."""
    old = nn.ParameterDict()
    old._parameters["*"] = nn.Parameter(vectors_ND)
    del old.__dict__["_keys"]
    return old


@pytest.mark.parametrize(
    "wrap",
    [
        lambda vectors_ND: {"*": vectors_ND},
        lambda vectors_ND: {"*": nn.Parameter(vectors_ND)},
        lambda vectors_ND: nn.ParameterDict({"*": nn.Parameter(vectors_ND)}),
        old_parameter_dict,
    ],
    ids=["tensor", "parameter", "ParameterDict", "old ParameterDict"],
)
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_files_of_a1111_are_read(tmp_path, suffix, wrap):
    if "ParameterDict" in str(type(wrap(torch.ones(1)))) and not hasattr(
        torch.serialization, "safe_globals"
    ):
        pytest.skip("PyTorch before 2.5 cannot read a ParameterDict without running code")
    path, vectors_ND = tmp_path / f"my-dog{suffix}", vectors_of(N, D)
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": wrap(vectors_ND),
        "name": "my-dog",
        "step": 999,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch.save(content, path)
    assert torch.equal(read_embedding(path), vectors_ND)
    assert not read_embedding(path).requires_grad
    assert verify_embedding(path) == N


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("created-by-pickle",))


@pytest.mark.parametrize("content", [{"*": Evil()}, {"string_to_param": {"*": Evil()}}])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.pt")
    with pytest.raises(UserError, match="can run code"):
        read_embedding("x.pt")
    assert not Path("created-by-pickle").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no tensors"),
        ({"string_to_param": {"*": 3}}, "no tensors"),
        ({"string_to_param": None, "step": 3}, "no tensors"),
        ({"a": torch.ones(2, D), "b": torch.ones(2, D)}, r"2 tensors \(a, b\)"),
        ({f"IN{i:02d}": torch.ones(1, D) for i in range(5)}, r"5 tensors \(IN00, .*, \.\.\.\)"),
        ({"*": torch.ones(1, 2, D)}, r"shape \(1, 2, 32\)"),
        ({"*": torch.ones(0, D)}, r"shape \(0, 32\)"),
        ({"*": torch.tensor(1.0)}, r"shape \(\)"),
        ({"*": torch.ones(2, D, dtype=torch.int64)}, "int64"),
        ({"*": torch.full((2, D), float("nan"))}, "NaN"),
        (torch.ones(2, D), "not weights by name"),
    ],
)
def test_what_is_not_an_embedding_is_refused_in_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as error:
        read_embedding(tmp_path / "x.pt")
    assert "x.pt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.txt"])
def test_missing_damaged_and_foreign_files_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not a file"):
        read_embedding(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=name):
        read_embedding(tmp_path / name)


# --- check ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "dtype"), [(float("inf"), None), (1e6, torch.float16)])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    path, vectors_KND = tmp_path / "x.safetensors", vectors_of(K, N, D)
    vectors_KND[6, 1, 2] = value
    save_embedding(path, {EMBEDDING_KEY: vectors_KND[6]}, metadata={}, dtype=dtype)
    with pytest.raises(UserError, match="emb_params holds NaN or infinity"):
        verify_embedding(path)
    save_xti(path, vectors_KND, metadata={}, dtype=dtype)
    with pytest.raises(UserError, match="MID holds NaN or infinity"):
        verify_embedding(path)


def test_different_numbers_of_vectors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"MID": torch.ones(1, D), "IN01": torch.ones(2, D)}, path)
    with pytest.raises(UserError, match=r"\[1, 2\] vectors"):
        verify_embedding(path)


# --- one embedding for each layer -----------------------------------------------------------


def test_an_xti_file_holds_the_layers_in_the_order_in_which_they_run(tmp_path):
    path, vectors_KND = tmp_path / "x.safetensors", vectors_of(K, N, D)
    save_xti(path, vectors_KND, metadata={"ss_steps": "3"}, dtype=torch.float32)
    # sd-scripts' trainer joins the values in the order of the file and knows no keys.
    assert list(load(path)) == list(SD_LAYER_CODES)
    assert torch.equal(torch.cat(list(load(path).values())), vectors_KND.flatten(0, 1))
    assert torch.equal(read_xti(path), vectors_KND)
    assert verify_embedding(path) == N


def test_an_xti_file_of_another_order_is_read_by_its_keys(tmp_path):
    vectors_KND = vectors_of(K, N, D)
    vectors = dict(zip(SD_LAYER_CODES, vectors_KND, strict=True))
    torch.save(dict(reversed(vectors.items())), tmp_path / "x.pt")
    assert torch.equal(read_xti(tmp_path / "x.pt"), vectors_KND)


def test_other_unets_have_their_own_keys(tmp_path):
    codes, vectors_KND = ["IN01", "MID", "OUT02", "OUT03"], vectors_of(4, N, D)
    save_xti(tmp_path / "x.safetensors", vectors_KND, metadata={}, codes=codes)
    assert load(tmp_path / "x.safetensors").keys() == set(codes)
    assert torch.equal(read_xti(tmp_path / "x.safetensors", codes=codes), vectors_KND)
    with pytest.raises(UserError, match=r"4 tensors.*each of its 16 .*OUT11"):
        read_xti(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="shorter"):
        save_xti(tmp_path / "y.safetensors", vectors_KND, metadata={})


def test_an_embedding_is_not_an_xti_file_and_the_other_way_round(tmp_path):
    save_embedding(tmp_path / "ti.safetensors", {EMBEDDING_KEY: vectors_of(N, D)}, metadata={})
    save_xti(tmp_path / "xti.safetensors", vectors_of(K, N, D), metadata={})
    with pytest.raises(UserError, match=r"1 tensors \(emb_params\), an XTI file"):
        read_xti(tmp_path / "ti.safetensors")
    with pytest.raises(UserError, match="16 tensors"):
        read_embedding(tmp_path / "xti.safetensors")


def test_layers_of_different_shape_are_refused(tmp_path):
    vectors = {code: torch.ones(1 + (code == "MID"), D) for code in SD_LAYER_CODES}
    torch.save(vectors, tmp_path / "x.pt")
    with pytest.raises(UserError, match="differ in shape"):
        read_xti(tmp_path / "x.pt")


def test_an_average_names_the_file_of_all_layers_beside_it(tmp_path):
    average, full = tmp_path / "x.v1.safetensors", tmp_path / "x.v1_xti.safetensors"
    save_embedding(average, {EMBEDDING_KEY: vectors_of(N, D)}, metadata={})
    with pytest.raises(UserError, match="use such a file"):
        read_xti(average)
    save_xti(full, vectors_of(K, N, D), metadata={})
    with pytest.raises(UserError, match=f"use {re.escape(str(full))}"):
        read_xti(average)


def test_the_average_is_one_embedding_for_all_layers():
    vectors_ND = vectors_of(N, D)
    torch.testing.assert_close(layer_average(vectors_ND.expand(K, N, D)), vectors_ND)
    assert layer_average(vectors_of(K, N, D)).shape == (N, D)


@pytest.mark.parametrize("num_vectors", [1, N])
def test_sd_scripts_reads_the_xti_file_and_we_read_its_file(tmp_path, num_vectors):
    script, vectors_KND = "train_textual_inversion_XTI.py", vectors_of(K, num_vectors, D)
    save_xti(tmp_path / "x.safetensors", vectors_KND, metadata={})
    read = function_of_sd_scripts(script, "load_weights")
    assert torch.equal(read(tmp_path / "x.safetensors"), vectors_KND.flatten(0, 1))
    write = function_of_sd_scripts(script, "save_weights")
    for suffix in (".safetensors", ".pt"):
        write(tmp_path / f"y{suffix}", vectors_KND.flatten(0, 1), torch.float32)
        assert torch.equal(read_xti(tmp_path / f"y{suffix}"), vectors_KND)
