"""The parts of TALT: layouts and options, coordinates, covariances and bases, responses."""
