"""linear operator -> numbers; knows no networks."""
