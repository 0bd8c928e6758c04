"""The IR of array programs: allow-list, encoding, decoding and hashes."""
