"""A network module for kohya's trainers and every front end that has a field for one.

    --network_module mlm_plugin.kohya --network_args mlm_loss_weight=0.1 class_token=dog

It creates the network of another module (``inner=networks.lora`` by default, ``lycoris.kohya``
and any other work as well) and adds the MLM term to its training. Every ``mlm`` option is a network
argument; arguments that are not ours go to the inner module. The file that is saved is the inner
module's. See docs/kohya-gui.md.
"""

from mlm_plugin.sd_scripts.network_module import create_network, create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]
