"""What several test files share: the tolerance rule, ragged layouts, naive ops and checks that every op must pass."""
