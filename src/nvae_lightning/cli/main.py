"""Names that moved, until all that import them here have followed."""

from nvae_lightning.cli.command import run
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.errors import one_line_errors
from nvae_lightning.cli.machine import HALF, check_precision, hide_warnings, keep_freed_memory
from nvae_lightning.cli.setting_types import check_seed

__all__ = [
    "CONFIG_ROOT",
    "HALF",
    "check_precision",
    "check_seed",
    "hide_warnings",
    "keep_freed_memory",
    "one_line_errors",
    "run",
]
