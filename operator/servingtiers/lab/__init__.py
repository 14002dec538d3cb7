"""The local laboratory: a real control plane as processes, simulated engines and nodes, real load."""
