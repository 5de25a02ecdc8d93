"""Recipes: what people build with recurrent layers, each one module, ``python -m examples.NAME --help``.

Run them from the root of the repository; their packages are the extra ``examples``. What they share is in
:mod:`examples.trainer` (training with early stopping and checkpoints) and :mod:`examples.common` (options of
the command line, plots).
"""
