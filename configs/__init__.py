"""What may be configured, and how it is loaded; imports neither torch nor any other room."""
