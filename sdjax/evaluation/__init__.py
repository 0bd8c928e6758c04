"""Tasks, answer extraction and paired statistics."""
