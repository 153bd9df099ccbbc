"""The user's images and texts, from any source, to batches of tensors."""
