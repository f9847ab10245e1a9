"""The demonstration: a small instruction-tuned model, trained on the spot, and the quiz it has to pass at 2 bits."""
