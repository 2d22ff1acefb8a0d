"""Lines and planes: directions, coordinates, and grids of losses on them."""
