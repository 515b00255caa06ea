"""Text: read from files, rendered and tokenised, and cut into rows."""
