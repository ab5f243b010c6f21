"""Training: ONE-PEACE by contrast and denoising, UnIVAL by a curriculum of tasks."""
