"""The packed model as a Hugging Face directory: reading, writing, manifest, card."""
