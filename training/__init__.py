"""The trainer: reads the samples of a snapshot and leaves a vision-language model that transformers loads; never sees Beam."""
