"""The untrusted side: check and trace source text inside a confined worker."""
