"""The untrusted side: source text in, traced IR out."""
