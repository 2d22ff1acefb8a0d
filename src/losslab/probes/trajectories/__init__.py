"""Snapshots of a training and what is measured at each."""
