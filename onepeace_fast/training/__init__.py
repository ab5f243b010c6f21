"""Pretraining of ONE-PEACE: masks of the denoising task, optimizer and learning rate."""
