"""NVAE (Vahdat & Kautz, NeurIPS 2020): a deep hierarchical VAE for images."""
