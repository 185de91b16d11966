"""What the commands share: configs, their checks, one-line errors, run folders."""
