"""Operations that merge methods share; programs in the sandbox may import them."""
