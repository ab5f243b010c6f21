"""The demo of MiCo: what a context of more modalities is worth, with a small model of handwritten and spoken digits."""
