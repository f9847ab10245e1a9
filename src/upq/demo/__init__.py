"""The demonstration: a small instruction-tuned model, trained on the spot, and the quiz that follows it down to 2 bits."""
