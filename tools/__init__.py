"""Tools of this checkout's developers; none of them is installed."""
