"""Tasks that score a candidate."""
