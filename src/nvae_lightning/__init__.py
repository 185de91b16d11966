"""NVAE (Vahdat & Kautz, NeurIPS 2020): a deep hierarchical VAE for images."""

from nvae_lightning.cli.startup import begin_command

begin_command()
