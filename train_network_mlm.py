"""Train a LoRA with the MLM regularizer: kohya's options and TOML files, plus `--mlm_*`.

python train_network_mlm.py --config_file presets/quickstart.toml
accelerate launch train_network_mlm.py --config_file run.toml --dataset_config data.toml

Inside kohya's own trainer (docs/sd-scripts.md): put this file beside its train_network.py, or
python train_network_mlm.py --sd_scripts_dir ../sd-scripts --config_file run.toml
"""

import sys

from mlm_plugin.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
