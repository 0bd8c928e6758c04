"""Parameter specifications, the transformer families, KV cache and adapters."""
