"""Files: written whole, read with clear errors, locked."""
