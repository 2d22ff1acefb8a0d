"""The homotopy learning rate: curvature met on the way sets the step."""
