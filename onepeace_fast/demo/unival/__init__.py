"""The demo of UnIVAL: what its paper claims, with a small model of handwritten and spoken digits."""
