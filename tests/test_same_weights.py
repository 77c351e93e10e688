"""The same options give the same weights as before: every method, plain and with the term.

The values in ``assets/weights.json`` of plain runs and of masked words as targets were made at
6e73d21, before the method had a package of its own; those with a teacher when the term got its
start at zero, those of states when they became the default. ``python -m pytest
tests/test_same_weights.py --write-digests`` makes them again; do so only where the numbers are
meant to change.

A digest is exact, so it holds for one kind of processor and one set of libraries; both are in the
file. Elsewhere the sums of the weights are compared within a tolerance.
"""

from pathlib import Path

import pytest

from mlm_plugin.cli import train_main

pytestmark = pytest.mark.usefixtures("all_targets")

STORE = "weights.json"
POCKET = {
    "pretrained_model_name_or_path": "pocket",
    "train_data_dir": "pocket",
    "caption_extension": ".txt",
    "resolution": "64",
    "learning_rate": "1e-3",
    "train_batch_size": "2",
    "max_train_steps": "4",
    "max_data_loader_n_workers": "0",
    "seed": "7",
    "mlm_batch_size": "4",
    "mlm_prompt_set": "pocket",
    "mlm_target": "class",
    "mlm_contextualizer": "pocket",
}
OFF = {"mlm_loss_weight": "0"}
STATES = {"mlm_target": "states", "mlm_contextualizer": "auto"}
LORA = {"network_dim": "4", "network_alpha": "4"}
SEVERAL = {"gradient_accumulation_steps": "2", "mlm_every_n_steps": "2", "network_dropout": "0.1"}
RUNS = {
    "lora plain": {**LORA, **OFF, "method": "lora"},
    "lora": {**LORA, "method": "lora"},
    "lora, states": {**LORA, **STATES, "method": "lora"},
    "lora, hidden words": {**LORA, "method": "lora", "mlm_target": "word"},
    "lora, every second step": {**LORA, **SEVERAL, "method": "lora", "mlm_replace": "bert"},
    "dreambooth plain": {**OFF, "method": "dreambooth"},
    "dreambooth": {"method": "dreambooth"},
    "dreambooth, states": {**STATES, "method": "dreambooth"},
    "textual_inversion plain": {**OFF, "method": "textual_inversion"},
    "textual_inversion": {"method": "textual_inversion", "num_vectors_per_token": "2"},
    "xti plain": {**OFF, "method": "xti"},
    "xti": {"method": "xti"},
    "xti, states": {**STATES, "method": "xti"},
    "custom_diffusion plain": {**OFF, "method": "custom_diffusion"},
    "custom_diffusion": {"method": "custom_diffusion"},
    "custom_diffusion, states": {**STATES, "method": "custom_diffusion"},
    "pivotal plain": {**LORA, **OFF, "method": "pivotal"},
    "pivotal": {**LORA, "method": "pivotal", "stop_embedding_training": "0.5"},
}
SDXL = {
    "caption_extension": ".txt",
    "resolution": "64",
    "mlm_prompt_set": "living",
    "min_bucket_reso": "64",
    "method": "lora",
    **LORA,
}


def run(options: dict[str, str], folder: Path) -> list[Path]:
    argv = [f"--{name}={value}" for name, value in options.items()]
    assert train_main([*argv, "--output_dir", str(folder), "--output_name", "x"]) == 0
    return list(folder.glob("*.safetensors"))


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_weights_of_before(name, tmp_path, same_weights):
    same_weights(STORE, name, run({**POCKET, **RUNS[name]}, tmp_path))


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("weight", ["0", "0.1"])
def test_a_lora_of_sdxl_ends_with_the_weights_of_before(
    weight, toy_sdxl_folder, toy_sdxl_contextualizers, toy_pictures, tmp_path, same_weights
):
    options = {
        **POCKET,
        **SDXL,
        "pretrained_model_name_or_path": str(toy_sdxl_folder),
        "train_data_dir": str(toy_pictures),
        "mlm_contextualizer": toy_sdxl_contextualizers,
        "mlm_loss_weight": weight,
    }
    same_weights(STORE, f"SDXL lora, weight {weight}", run(options, tmp_path))
