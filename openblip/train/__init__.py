"""Training: one loop for every stage, with losses, tasks, optimizer, checkpoints, ranks and log."""
