"""Code shared by several rooms: atomic files, signals, figures, safe reading of data."""
