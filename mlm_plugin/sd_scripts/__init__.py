"""The MLM term inside kohya's own trainers.

Reading order: ``locate`` (which trainer runs, where the checkout is), ``launch`` (which script, its
command line), ``arguments`` (our options there), ``term`` (what is added to the loss),
``network_term`` (its set-up in network trainers), ``run_watch`` (pages and best files),
``network_run`` (both), ``mixin`` (in the launcher), ``network_module`` (inside the trainer),
``accelerator_hooks`` (how these two add it), ``patches`` (the other scripts).

sd-scripts itself is imported inside functions alone, when a run starts: its scripts by ``launch``,
its library by ``launch``, ``architectures`` and ``data``, its networks by ``network_module``.
"""
