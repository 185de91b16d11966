"""Reports that compare the results of runs with the paper's, or fit lines to their cost."""

from nvae_lightning.reporting.growth import growth
from nvae_lightning.reporting.layout import Layout, as_layout
from nvae_lightning.reporting.run import Run
from nvae_lightning.reporting.table import Report, report

__all__ = ["Layout", "Report", "Run", "as_layout", "growth", "report"]
