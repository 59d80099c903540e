"""Image models and the search for near-duplicate vectors. Arrays in, arrays out; knows nothing of Beam."""
