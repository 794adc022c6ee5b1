"""The model, and training it."""
