"""How the miniature's weights were made: one command for each part, seeded and resumable.

python -m miniature.training vae|text|unet|judges
"""
