"""Weights of other layouts into ours and back: key tables and one walker."""
