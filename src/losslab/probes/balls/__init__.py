"""The neighbourhood of a solution: balls, points in them, ascents, predictions."""
