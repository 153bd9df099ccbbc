"""The whole story in one command: noisy pairs, BLIP, CapFilt, BLIP again, and what it gained."""
