"""The commands of `mlm-plugin`, one file each."""
