"""What every recipe shares: settings, run folder, training loop, checkpoints, records."""
