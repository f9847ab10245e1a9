"""Layers that train on a grid (FakeQuantLinear) and layers that run from codes (PackedLinear, PackedEmbedding)."""
