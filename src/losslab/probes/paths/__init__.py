"""Paths between two solutions: chains with control points, and elastic bands."""
