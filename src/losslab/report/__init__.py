"""Run folder -> figures and one HTML page; never imports a model or an optimizer."""
