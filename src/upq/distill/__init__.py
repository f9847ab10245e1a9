"""Quantisation-aware training: the student learns the original model's next-token distributions."""
