"""Code that the commands share: configs, checks, one-line errors, run folders."""
