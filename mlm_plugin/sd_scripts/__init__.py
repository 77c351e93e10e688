"""The MLM term inside kohya's own trainers.

Reading order: ``locate`` (which trainer runs, where the checkout is), ``launch`` (which script, its
command line), ``arguments`` (our options there), ``term`` (what is added to the loss),
``network_term`` (its set-up in network trainers), ``mixin`` (which adds it in the launcher),
``network_module`` (which adds it from inside the trainer, through ``accelerator_hooks``),
``patches`` (the other scripts), ``run_watch`` (pages and best files). sd-scripts itself is imported
inside functions alone, when a run starts: its scripts by ``launch``, its library by ``launch``,
``architectures`` and ``data``, its networks by ``network_module``.
"""
