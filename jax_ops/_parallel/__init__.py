"""More than one device: classes sharded over mesh axes, rows over others."""
