"""A small captioned world and a small Stable Diffusion trained on it: the embedded default and the test bench."""
