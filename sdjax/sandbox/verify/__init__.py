"""The trusted side: verify decoded IR, estimate its cost and run it on probe tensors."""
