"""``onepeace-fast report``: pictures and a page of result files, and what changed between two."""
