"""The IR of an array program: encoding, decoding and hashes."""
