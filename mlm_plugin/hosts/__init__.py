"""Programs that bring the core to work: the standalone trainer."""
