"""Files of text to examples: found, decoded, parsed, and read as what they are."""
