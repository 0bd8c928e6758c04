"""The trusted side: IR in, verified program out."""
