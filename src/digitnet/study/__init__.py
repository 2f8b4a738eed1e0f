"""Looking at data and runs: what to see before training, and how good the result is."""
