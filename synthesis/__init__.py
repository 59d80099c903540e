"""Instruction synthesis: the taxonomy, the planner, the prompts, the client that asks a VLM, and what its answers must pass."""
