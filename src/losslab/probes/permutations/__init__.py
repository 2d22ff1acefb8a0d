"""The order of units: found by tracing a network, matched between two, and repaired after mixing."""
