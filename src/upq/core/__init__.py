"""What every room builds on: errors, strict configuration, values, progress, processes."""
