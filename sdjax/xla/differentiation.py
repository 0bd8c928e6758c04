"""The exceptions of operations that JAX cannot differentiate, which have no common class."""

# For operations without a derivative, or without one in reverse mode.
NOT_DIFFERENTIABLE = (NotImplementedError, TypeError, ValueError)
