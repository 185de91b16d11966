"""The earlier name of ``preview``: ``python -m nvae_lightning.inspect`` still works.

This folder has no ``__init__.py``, so that it never shadows the standard library's ``inspect``
when a command is run as a file: ``python src/nvae_lightning/train.py``.
"""

from nvae_lightning.cli import run
from nvae_lightning.preview import main

run(main)
