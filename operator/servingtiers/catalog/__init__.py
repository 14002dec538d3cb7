"""Accelerators and model shapes: facts with their sources, pure data and its loaders."""
