"""The fleet simulator: real traffic against a tier on a virtual clock, by the operator's own policy or a rival's."""
