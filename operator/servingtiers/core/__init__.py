"""The types that layers hand to each other: signals, decisions, effective settings, what was seen, what to do."""
