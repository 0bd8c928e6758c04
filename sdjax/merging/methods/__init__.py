"""Human-designed merge methods, one file per method."""
