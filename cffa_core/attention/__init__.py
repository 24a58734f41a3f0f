"""Attention maps: captured while a UNet runs, averaged, drawn over pictures (METHODS 4)."""
