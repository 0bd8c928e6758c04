"""Tasks, answer extraction, grading, and paired statistics."""
