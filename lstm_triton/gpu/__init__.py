"""Plans for GPUs, also for those that aren't there: which fit, what they are predicted to take, what was measured."""
