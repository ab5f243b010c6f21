"""A user's own files for pretraining: manifests, captions, images, audio, and the batches made of them."""
