"""More than one device: classes sharded over ranks, rows over others."""
