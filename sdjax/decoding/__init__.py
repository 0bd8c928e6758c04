"""State, loop, sampling and scheduling of batched decoding."""
