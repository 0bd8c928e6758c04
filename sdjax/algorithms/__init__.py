"""Human-designed merge methods, one file each, in the algorithm API."""
