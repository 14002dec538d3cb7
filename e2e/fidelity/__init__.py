"""The simulator against a real engine: the same trace, measured and simulated with a profile of that engine."""
