"""CapFilt: caption, score, decide, write."""
