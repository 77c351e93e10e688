"""The MLM term inside kohya's own trainers.

Reading order: ``locate`` (which trainer runs, where the checkout is), ``launch`` (which script, its
command line), ``term`` (what is added to the loss), ``mixin`` (network trainers), ``patches`` (the
other scripts). Only ``launch`` imports sd-scripts, when a run starts.
"""
