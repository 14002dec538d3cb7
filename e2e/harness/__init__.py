"""What the scenarios share: the cluster they run on, the product in it, traffic and measurement."""
