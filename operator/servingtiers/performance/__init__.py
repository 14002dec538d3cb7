"""The performance model: step times, latencies of an engine and of a fleet, cost, and the planner."""
