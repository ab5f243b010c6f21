"""What a user runs on their own GPU: `onepeace-fast selftest` and `onepeace-fast tune`."""
