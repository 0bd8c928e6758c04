"""Human-designed merge methods, one module per method."""
