"""Training σ: the pure update, its drivers, checkpoints and the loop."""
