"""Gradients: the gradient of a point is a point, too."""
